"""Predicting takes training's own path to the same scores, whatever the batch; the command says what failed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_metrics import MetricComputer
from model_architecture import SimplifiedTagger, VisionTransformerConfig, create_model
from scripts import predict as command
from tagger.artifact import Artifact, ArtifactMetadata, TagRow, attach_thresholds, load_artifact, save_artifact
from tagger.data.decode import decode_image
from tagger.errors import InputError
from tagger.files import FormatError
from tagger.metrics.keys import from_keys, lowest_keys
from tagger.metrics.thresholds import TagThresholds, ThresholdGoal
from tagger.predict import Prediction, Tagger, Unreadable, find_images
from tagger.preprocess import Preprocess
from tagger.run_folder import RunResults
from vocabulary import TagVocabulary

ROOT = Path(__file__).resolve().parents[2]
CONFIG = VisionTransformerConfig(
    image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, num_tags=6, mask_padding=True
)
TAGS = {"rating:general": 9, "rating:sensitive": 8, "cat": 7, "dog": 6, "tree": 5, "sky": 4}


def write_run(run: Path, *, exclusive_ratings: bool = False) -> Path:
    torch.manual_seed(0)
    run.mkdir()
    (run / "config.yaml").write_text("run: {}\n", encoding="utf-8")
    vocabulary = TagVocabulary.from_counts(TAGS)
    vocabulary.save(run / "vocabulary.json")
    model = create_model(CONFIG)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.5)
        model.head.bias.zero_()
    rows = zip(vocabulary.tags, vocabulary.categories, vocabulary.counts.tolist(), strict=True)
    save_artifact(
        run / "model",
        weights=model.state_dict(),
        model_config=CONFIG.to_dict(),
        tags=[TagRow(*row) for row in rows],
        vocabulary_file=run / "vocabulary.json",
        preprocess_json=Preprocess(image_size=32).to_json(),
        metadata=ArtifactMetadata(
            run="demo",
            step=10,
            threshold=0.5,
            vocabulary_sha256=vocabulary.sha256,
            metric=None,
            metric_value=None,
            exclusive_ratings=exclusive_ratings,
        ),
    )
    return run


def write_images(folder: Path, number: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for index in range(number):
        size = (int(random.integers(10, 70)), int(random.integers(10, 70)), 3)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        suffix = ("png", "jpg", "webp")[index % 3]
        paths.append(folder / f"{index}.{suffix}")
        coarse.resize(size[:2]).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def artifact(run: Path) -> Artifact:
    return load_artifact(run / "model")


def tagger_of(artifact: Artifact, batch_size: int = 4) -> Tagger:
    return Tagger(create_model(CONFIG), artifact, torch.device("cpu"), batch_size)


def all_scores(prediction: object) -> dict[str, float]:
    assert isinstance(prediction, Prediction)
    return {tag.name: tag.score for tag in prediction.tags}


def test_scores_are_those_of_decoding_preprocessing_and_the_model(tmp_path: Path, artifact: Artifact) -> None:
    paths = write_images(tmp_path, 5)
    model = create_model(CONFIG)
    model.load_state_dict(artifact.weights)
    assert isinstance(model, SimplifiedTagger)
    model.eval()
    for path, prediction in zip(paths, tagger_of(artifact).predict(paths, threshold=0.0), strict=True):
        image, valid_size = artifact.preprocess.apply(decode_image(path.read_bytes(), max_pixels=10**6))
        with torch.no_grad():
            expected = model(image[None], torch.tensor([valid_size])).sigmoid()[0]
        found = all_scores(prediction)
        assert [found[tag.name] for tag in artifact.tags] == pytest.approx(expected.tolist(), abs=1e-5)


def test_batched_predictions_equal_single_ones(tmp_path: Path, artifact: Artifact) -> None:
    paths = write_images(tmp_path, 7)
    single = [all_scores(p) for p in tagger_of(artifact, 1).predict(paths, threshold=0.0)]
    for batch_size in (2, 5, 16):
        batched = [all_scores(p) for p in tagger_of(artifact, batch_size).predict(paths, threshold=0.0)]
        for one, other in zip(single, batched, strict=True):
            assert other == pytest.approx(one, abs=1e-5)


def test_images_of_one_bucket_go_together_and_come_back_in_order(tmp_path: Path, artifact: Artifact) -> None:
    bucketed = dataclasses.replace(artifact, preprocess=Preprocess.create(32, "buckets", 8))
    paths = write_images(tmp_path, 30)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    paths.insert(4, broken)
    single = [next(iter(tagger_of(bucketed, 1).predict([path], threshold=0.0))) for path in paths]
    assert len({one.image.shape for one in single if isinstance(one, Prediction)}) == 3
    for batch_size in (1, 2, 5, 64):
        tagger = tagger_of(bucketed, batch_size)
        sizes: list[int] = []
        tagger._model.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        found = list(tagger.predict(paths, threshold=0.0))
        assert [outcome.path for outcome in found] == paths
        assert isinstance(found[4], Unreadable)
        for one, other in zip(single, found, strict=True):
            if one.path != broken:
                assert isinstance(one, Prediction) and isinstance(other, Prediction)
                assert torch.equal(one.image, other.image)
                assert all_scores(other) == pytest.approx(all_scores(one), abs=1e-5)
        assert sum(sizes) == 30 and max(sizes) <= batch_size
        assert batch_size < 64 or len(sizes) == 3


def test_threshold_and_top_choose_the_tags(tmp_path: Path, artifact: Artifact) -> None:
    paths = write_images(tmp_path, 4)
    everything = list(tagger_of(artifact).predict(paths, threshold=0.0))
    default = list(tagger_of(artifact).predict(paths))
    first = list(tagger_of(artifact).predict(paths, threshold=0.0, top=2))
    for whole, chosen, two in zip(everything, default, first, strict=True):
        assert isinstance(whole, Prediction) and isinstance(chosen, Prediction) and isinstance(two, Prediction)
        scores = [tag.score for tag in whole.tags]
        assert scores == sorted(scores, reverse=True) and len(scores) == 6
        assert chosen.tags == tuple(tag for tag in whole.tags if tag.score >= 0.5)
        assert two.tags == whole.tags[:2]


def test_exclusive_ratings_sum_to_one_and_the_best_is_given(tmp_path: Path) -> None:
    artifact = load_artifact(write_run(tmp_path / "run", exclusive_ratings=True) / "model")
    paths = write_images(tmp_path / "images", 3)
    plain = load_artifact(write_run(tmp_path / "plain") / "model")
    sigmoids = [all_scores(p) for p in tagger_of(plain).predict(paths, threshold=0.0)]
    for outcome, sigmoid in zip(tagger_of(artifact).predict(paths, threshold=0.99), sigmoids, strict=True):
        assert isinstance(outcome, Prediction)
        (rating,) = [tag for tag in outcome.tags if tag.category == "rating"]
        odds = {name: sigmoid[name] / (1 - sigmoid[name]) for name in ("rating:general", "rating:sensitive")}
        assert rating.score == pytest.approx(max(odds.values()) / sum(odds.values()), abs=1e-5)
        assert rating.name == max(odds, key=odds.__getitem__)


def test_unreadable_images_do_not_stop_the_others(tmp_path: Path, artifact: Artifact) -> None:
    good = write_images(tmp_path, 3)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("not an image")
    bad = [tmp_path / name for name in ("empty.png", "cut.png", "text.jpg", "missing.png")]
    outcomes = list(tagger_of(artifact, 2).predict([bad[0], good[0], *bad[1:], *good[1:]]))
    assert [type(outcome) for outcome in outcomes] == [Unreadable, Prediction] + [Unreadable] * 3 + [Prediction] * 2
    assert all(isinstance(o, Prediction) or ("\n" not in o.reason and o.reason) for o in outcomes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path: Path, artifact: Artifact) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (outcome,) = tagger_of(artifact).predict([tmp_path / "pipe.png"])
    assert outcome == Unreadable(tmp_path / "pipe.png", "not a regular file")


def test_weights_that_do_not_fit_are_refused(artifact: Artifact) -> None:
    with pytest.raises(InputError, match="do not fit"):
        Tagger(torch.nn.Linear(3, 6), artifact, torch.device("cpu"))


def test_folders_are_searched_in_order_and_paths_come_once(tmp_path: Path) -> None:
    names = ("b/2.PNG", "b/1.jpg", "a.webp", "b/c/3.jpeg", "b/note.txt", ".hidden/4.png", "b/.5.png", "b/png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path / "b" / "note.txt", tmp_path, tmp_path / "a.webp"])
    expected = ["b/note.txt", "a.webp", "b/1.jpg", "b/2.PNG", "b/c/3.jpeg"]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected
    with pytest.raises(InputError, match="does not exist"):
        find_images([tmp_path / "nothing"])


def test_the_command_writes_one_object_a_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_images(tmp_path, 3)
    assert command.main([str(run), str(tmp_path), "--json", "--threshold", "0", "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in sorted(paths)]
    assert rows[0]["tags"][0].keys() == {"name", "category", "score"} and len(rows[0]["tags"]) == 6


def test_the_command_takes_a_model_folder_and_writes_a_table(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = write_images(tmp_path, 1)
    assert command.main([str(run / "model"), str(path), "--top", "1", "--threshold", "0", "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(path) and second.startswith("  0.")


def test_the_command_names_what_it_could_not_read(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, 2)
    (tmp_path / "empty.png").write_bytes(b"")
    assert command.main([str(run), str(tmp_path), "--json", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"{tmp_path / 'empty.png'}: empty file", "1 of 3 images could not be read"]
    assert len(shown.out.splitlines()) == 2


def test_the_command_draws_a_sheet(tmp_path: Path, run: Path) -> None:
    write_images(tmp_path, 2)
    assert command.main([str(run), str(tmp_path), "--sheet", str(tmp_path / "sheet.png"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "{tmp}/nothing"], "does not exist"),
        (["{run}", "{tmp}"], "no images found in"),
        (["{tmp}", "{image}"], "is no run and no model"),
        (["{image}", "{image}"], "is not a folder"),
        (["{running}", "{image}"], r"has no model yet \(interrupted, step 40\)"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    empty, running = tmp_path / "empty", tmp_path / "running"
    empty.mkdir()
    running.mkdir()
    (running / "config.yaml").write_text("run: {}\n", encoding="utf-8")
    RunResults("running", steps=40).write(running / "results.json")
    (image,) = write_images(tmp_path / "images", 1)
    places = {"run": run, "tmp": empty, "image": image, "running": running}
    assert command.main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert re.search(words, shown.err)
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ")


def test_the_command_stops_quietly_when_its_reader_does(tmp_path: Path, run: Path) -> None:
    write_images(tmp_path, 6)
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.predict", str(run), str(tmp_path), "--json", "--batch-size", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


def own_thresholds(artifact: Artifact, logits: list[float]) -> TagThresholds:
    return TagThresholds(
        logits=np.array(logits),
        support=np.arange(6),
        global_logit=0.5,
        goal=ThresholdGoal(),
        num_images=10,
        on_calib={},
        weights_sha256=artifact.weights_sha256,
        vocabulary_sha256=artifact.vocabulary_sha256,
        calib_sha256="0" * 64,
    )


def test_each_tag_must_reach_its_own_threshold_unless_one_is_given(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run") / "model"
    paths = write_images(tmp_path / "images", 6)
    plain = load_artifact(folder)
    everything = [all_scores(p) for p in tagger_of(plain).predict(paths, threshold=0.0)]
    names = [tag.name for tag in plain.tags]
    scores = np.array([[scores[name] for name in names] for scores in everything])
    middle = np.median(np.log(scores / (1 - scores)), axis=0)
    attach_thresholds(folder, own_thresholds(plain, (middle + 1e-3).tolist()))
    artifact = load_artifact(folder)
    limits = 1 / (1 + np.exp(-middle))
    expected = [{name for name, p, limit in zip(names, row, limits, strict=True) if p > limit} for row in scores]
    assert [set(all_scores(p)) for p in tagger_of(artifact).predict(paths)] == expected
    assert any(0 < len(given) < 6 for given in expected)
    explicit = [set(all_scores(p)) for p in tagger_of(plain).predict(paths, artifact.thresholds)]
    assert explicit == expected
    one = [set(all_scores(p)) for p in tagger_of(artifact).predict(paths, 0.5)]
    assert one == [{name for name, p in zip(names, row, strict=True) if p >= 0.5} for row in scores]


def test_predictions_are_what_evaluation_counts(tmp_path: Path, artifact: Artifact) -> None:
    paths = write_images(tmp_path, 8)
    scores = [all_scores(p) for p in tagger_of(artifact).predict(paths, threshold=0.0)]
    logits = np.array([[scores[i][tag.name] for tag in artifact.tags] for i in range(8)], dtype=np.float64)
    logits = np.log(logits / (1 - logits))
    limits = from_keys(lowest_keys(np.median(logits, axis=0))).astype(np.float64)
    computer = MetricComputer(6, logit_thresholds=limits)
    model = create_model(CONFIG)
    model.load_state_dict(artifact.weights)
    decoded = [decode_image(path.read_bytes(), max_pixels=10**6) for path in paths]
    prepared = [artifact.preprocess.apply(image) for image in decoded]
    with torch.inference_mode():
        for image, size in prepared:
            found = model.eval()(image[None], torch.tensor([size], dtype=torch.int32))
            computer.update(found, torch.zeros(1, 6))
    given = [
        len(all_scores(p)) for p in tagger_of(artifact, 1).predict(paths, own_thresholds(artifact, limits.tolist()))
    ]
    assert given == computer.per_image("predicted").tolist()


def test_a_thresholds_file_of_another_model_is_refused(
    tmp_path: Path, run: Path, artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_images(tmp_path / "images", 1)[0]
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    thresholds = own_thresholds(artifact, [-99.0] * 6)
    good.write_bytes(thresholds.to_json())
    bad.write_bytes(replace(thresholds, weights_sha256="1" * 64).to_json())
    words = [str(run), str(image), "--device", "cpu"]
    assert command.main([*words, "--json", "--thresholds", str(good)]) == 0
    assert len(json.loads(capsys.readouterr().out)["tags"]) == 6
    assert command.main([*words, "--thresholds", str(bad)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: thresholds") and "bad.json were fitted for other weights" in line
    with pytest.raises(SystemExit) as raised:
        command.main([*words, "--thresholds", str(good), "--threshold", "0.5"])
    assert raised.value.code == 2
    with pytest.raises(FormatError, match="the thresholds were fitted for other weights"):
        list(tagger_of(artifact).predict([image], replace(thresholds, weights_sha256="1" * 64)))
