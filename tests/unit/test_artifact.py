"""A model folder comes back as it was written, and not at all when its parts do not belong together."""

import contextlib
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file

from model_architecture import VisionTransformerConfig, create_model
from tagger.artifact import (
    Artifact,
    ArtifactMetadata,
    TagRow,
    attach_thresholds,
    load_artifact,
    read_thresholds,
    save_artifact,
    store,
)
from tagger.files import FormatError, NewerFormatError
from tagger.metrics.thresholds import TagThresholds, ThresholdGoal
from tagger.preprocess import Preprocess
from vocabulary import TagVocabulary

CONFIG = VisionTransformerConfig(
    image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, num_tags=5
)
COUNTS = {"rating:general": 9, "rating:sensitive": 2, "sky": 5, 'say "hi", you': 4, "alice": 3}
CATEGORIES = {"alice": "character", "sky": "scenery"}
PREPROCESS = Preprocess(image_size=16, background=(0, 10, 250))


def save(folder: Path, seed: int = 0, **changes: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    vocabulary = TagVocabulary.from_counts(COUNTS, CATEGORIES)
    vocabulary.save(folder.parent / "vocabulary.json")
    weights = create_model(CONFIG).state_dict()
    rows = zip(vocabulary.tags, vocabulary.categories, vocabulary.counts.tolist(), strict=True)
    metadata = ArtifactMetadata(
        run="demo",
        step=900,
        threshold=0.35,
        vocabulary_sha256=vocabulary.sha256,
        metric="val/mAP",
        metric_value=0.97,
    )
    parts = {
        "weights": weights,
        "model_config": CONFIG.to_dict(),
        "tags": [TagRow(*row) for row in rows],
        "vocabulary_file": folder.parent / "vocabulary.json",
        "preprocess_json": PREPROCESS.to_json(),
        "metadata": metadata,
    }
    save_artifact(folder, **{**parts, **changes})
    return weights


def equal(artifact: Artifact, weights: dict[str, torch.Tensor]) -> bool:
    return artifact.weights.keys() == weights.keys() and all(
        torch.equal(artifact.weights[name], weights[name]) for name in weights
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    weights = save(tmp_path / "model")
    artifact = load_artifact(tmp_path / "model")
    vocabulary = TagVocabulary.load(tmp_path / "model" / "vocabulary.json")
    assert equal(artifact, weights)
    assert VisionTransformerConfig.from_dict(artifact.model_config) == CONFIG
    assert artifact.preprocess == PREPROCESS
    assert tuple(tag.name for tag in artifact.tags) == vocabulary.tags
    assert artifact.vocabulary_sha256 == vocabulary.sha256
    assert (artifact.threshold, artifact.metadata["step"], artifact.metadata["metric_value"]) == (0.35, 900, 0.97)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "vocabulary.json",
        "preprocess.json",
        "selected_tags.csv",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocabulary.json"}


def test_the_tags_table_is_what_other_programs_read(tmp_path: Path) -> None:
    save(tmp_path / "model")
    with (tmp_path / "model" / "selected_tags.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["tag_id", "name", "category", "count"],
        ["0", "rating:general", "9", "9"],
        ["1", "rating:sensitive", "9", "2"],
        ["2", 'say "hi", you', "0", "4"],
        ["3", "alice", "4", "3"],
        ["4", "sky", "0", "5"],
    ]


def test_the_configuration_says_what_the_model_is(tmp_path: Path) -> None:
    save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["format_version"], config["architecture"], config["num_classes"]) == (1, "vit", 5)
    assert config["model_args"]["embed_dim"] == 16 and config["threshold"] == 0.35


def test_weights_of_a_compiled_model_have_plain_names(tmp_path: Path) -> None:
    weights = create_model(CONFIG).state_dict()
    save(tmp_path / "model", weights={f"_orig_mod.{name}": tensor for name, tensor in weights.items()})
    assert equal(load_artifact(tmp_path / "model"), weights)
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == weights.keys()


def test_an_older_model_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "model", seed=0)
    weights = save(tmp_path / "model", seed=1)
    assert equal(load_artifact(tmp_path / "model"), weights)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocabulary.json"}


class KilledError(BaseException):
    """Stands for the end of the process: nothing of ours runs after it."""


@pytest.mark.parametrize("num_operations", range(24))
def test_a_save_that_is_killed_anywhere_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_operations: int
) -> None:
    """Dies before each fsync, rename, deletion in turn, with nothing cleaned up after it."""
    old = save(tmp_path / "model", seed=0)
    done = 0

    def dying(operation):
        def call(*arguments, **settings):
            nonlocal done
            if done == num_operations:
                raise KilledError
            done += 1
            return operation(*arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(KilledError):
            save(tmp_path / "model", seed=1)
    found = load_artifact(tmp_path / "model")
    torch.manual_seed(1)
    assert equal(found, old) or equal(found, create_model(CONFIG).state_dict())
    again = save(tmp_path / "model", seed=2)
    assert equal(load_artifact(tmp_path / "model"), again)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".vocabulary")} == {
        "model",
        "vocabulary.json",
    }


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "model", seed=1)
    assert equal(load_artifact(tmp_path / "model"), old)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocabulary.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json", "preprocess.json", "config.json"])
def test_a_missing_part_is_named(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(FormatError, match=name):
        load_artifact(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json", "preprocess.json"])
def test_a_changed_part_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model")
    path = tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name} is not the file that was written with this model"):
        load_artifact(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "update the program"),
        ({"threshold": 7}, "threshold"),
        ({"num_classes": 4}, "has 5 tags"),
        ({"vocabulary_sha256": "0" * 64}, "another vocabulary"),
        ({"model_args": None}, "not complete"),
        ({"files_sha256": {}}, "not complete"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(FormatError, match=words) as caught:
        load_artifact(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_belong_together_are_not_written(tmp_path: Path) -> None:
    other = CONFIG.to_dict() | {"num_tags": 7}
    for changes in ({"model_config": other}, {"tags": [TagRow("sky", "general", 1)] * 5}):
        with pytest.raises(ValueError, match="tags"):
            save(tmp_path / "model", **changes)
    assert not (tmp_path / "model").exists()


def thresholds_for(artifact: Artifact, **changes: object) -> TagThresholds:
    parts = {
        "logits": np.array([-3.0, -0.5, 0.0, 0.25, 7.125]),
        "support": np.array([9, 0, 1, 2, 3]),
        "global_logit": -1.0,
        "goal": ThresholdGoal("precision", precision=0.8),
        "num_images": 40,
        "on_calib": {"f1_macro": 0.5, "f1_micro": None},
        "weights_sha256": artifact.weights_sha256,
        "vocabulary_sha256": artifact.vocabulary_sha256,
        "calib_sha256": "0" * 64,
    }
    return TagThresholds(**{**parts, **changes})  # type: ignore[arg-type]


def test_thresholds_go_with_the_model_and_leave_the_rest_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weights = save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    assert load_artifact(folder).thresholds is None
    for goal in (ThresholdGoal("precision", precision=0.8), ThresholdGoal()):
        wanted = thresholds_for(load_artifact(folder), goal=goal)
        attach_thresholds(folder, wanted)
        artifact = load_artifact(folder)
        assert artifact.thresholds is not None and artifact.thresholds.goal == goal
        assert np.array_equal(artifact.thresholds.logits, wanted.logits)
        assert artifact.threshold == artifact.thresholds.global_probability == pytest.approx(0.26894142)
        assert equal(artifact, weights) and artifact.metadata["step"] == 900
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path.name for path in folder.iterdir()} == {*before, "config.json", "thresholds.json", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocabulary.json"}


def test_thresholds_of_another_model_do_not_come_with_this_one(tmp_path: Path) -> None:
    save(tmp_path / "one")
    save(tmp_path / "two", seed=1)
    one, two = load_artifact(tmp_path / "one"), load_artifact(tmp_path / "two")
    before = (tmp_path / "two" / "config.json").read_bytes()
    with pytest.raises(FormatError, match="fitted for other weights"):
        attach_thresholds(tmp_path / "two", thresholds_for(one))
    with pytest.raises(FormatError, match="of another vocabulary"):
        attach_thresholds(tmp_path / "two", thresholds_for(two, vocabulary_sha256="1" * 64))
    assert (tmp_path / "two" / "config.json").read_bytes() == before and load_artifact(tmp_path / "two")
    attach_thresholds(tmp_path / "one", thresholds_for(one))
    with pytest.raises(FormatError, match=r"thresholds\.json were fitted for other weights"):
        read_thresholds(tmp_path / "one" / "thresholds.json", two.weights_sha256, two.vocabulary_sha256)


@pytest.mark.parametrize("change", [{"global_logit": -2.0}, {"format_version": 2}], ids=str)
def test_thresholds_that_were_exchanged_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "model"
    save(folder)
    attach_thresholds(folder, thresholds_for(load_artifact(folder)))
    path = folder / "thresholds.json"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **change}))
    with pytest.raises(FormatError, match=r"thresholds\.json is not the file that was written with this model"):
        load_artifact(folder)
    if "format_version" in change:
        with pytest.raises(NewerFormatError, match="update the program"):
            TagThresholds.load(path)
    path.unlink()
    with pytest.raises(FormatError, match=r"thresholds\.json is missing"):
        load_artifact(folder)


def test_a_full_disk_while_thresholds_are_written_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    weights = save(folder)
    wanted = thresholds_for(load_artifact(folder))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        attach_thresholds(folder, wanted)
    artifact = load_artifact(folder)
    assert equal(artifact, weights) and artifact.thresholds is None
    assert {path.name for path in tmp_path.iterdir()} == {"model", "vocabulary.json"}
