"""Starting from another run's weights, and going on with other settings: what carries over, and that it is said."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_direct
from tagger.config_io import ConfigError
from tagger.transfer import find_initial_weights
from tests.integration.test_train_direct import arguments, lines_of, results_of, run


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("runs"), "whole")


def learning_rates(folder: Path) -> dict[int, float]:
    return {int(line["step"]): line["train/learning_rate"] for line in lines_of(folder) if "train/loss" in line}


@pytest.mark.parametrize("place", ["", "model", "checkpoints/newest"])
def test_a_run_starts_from_another_ones_weights(
    finished: Path,
    images: Path,
    tmp_path: Path,
    place: str,
) -> None:
    newest = sorted((finished / "checkpoints").glob("step-*"))[-1].name
    source = finished / place.replace("newest", newest)
    # A rate of nearly nothing: what is saved at the end is what the run started from.
    words = ("optimizer.learning_rate=1e-12", "optimizer.muon_learning_rate=1e-12", "optimizer.weight_decay=0")
    folder = run(images, tmp_path, "tuned", "--init-from", str(source), "training.num_epochs=1", *words)
    expected = find_initial_weights(source).tensors
    found = load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    names = [name for name in expected if expected[name].is_floating_point() and "running_" not in name]
    assert names and all(torch.allclose(found[name], expected[name], atol=1e-6) for name in names)


def test_other_tags_and_another_image_size(
    finished: Path,
    images: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        folder = run(
            images,
            tmp_path,
            "larger",
            "--init-from",
            str(finished),
            "training.num_epochs=1",
            "data.image_size=48",
            "vocabulary.min_frequency=12",
        )
    assert "tags known there" in caplog.text and "resized from 4x4 to 6x6" in caplog.text
    assert results_of(folder)["status"] == "completed"


def test_another_body_is_refused_and_leaves_nothing(
    finished: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(images, tmp_path, "other", "--init-from", str(finished), "model.depth=3")
    assert train_direct.main(words) == 2
    assert "blocks.2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert train_direct.main(arguments(images, tmp_path, "none", "--init-from", str(tmp_path / "nowhere"))) == 2


@pytest.mark.parametrize("on_change", ["rescale", "keep", "error"])
def test_more_epochs_bend_the_schedule_as_asked(
    images: Path,
    tmp_path: Path,
    on_change: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(images, tmp_path, "run", "training.num_epochs=2")
    before = learning_rates(tmp_path / "run")
    words = ("training.num_epochs=4", "--resume", "latest", f"checkpoint.on_schedule_change={on_change}")
    if on_change == "error":
        assert train_direct.main(arguments(images, tmp_path, "run", *words)) == 2
        assert "checkpoint.on_schedule_change=rescale or keep" in capsys.readouterr().err
        return
    run(images, tmp_path, "run", *words)
    assert "was to end at update" in caplog.text
    after = learning_rates(tmp_path / "run")
    last = max(before)
    if on_change == "keep":
        assert after[last + 1] == pytest.approx(1e-3 * 0.01)
    else:
        # Half the images seen: the cosine goes on from its middle.
        assert after[last + 1] == pytest.approx(0.5 * 1e-3, rel=0.1)
    assert after[max(after)] < 0.1 * 1e-3


def test_another_batch_size_alone_does_not_move_the_learning_rate(
    images: Path,
    tmp_path: Path,
) -> None:
    run(images, tmp_path, "straight", "training.num_epochs=4")
    short = ("training.num_epochs=4", "training.batch_size=8")
    words = arguments(images, tmp_path, "run", *short)
    with pytest.MonkeyPatch.context() as patch:
        real = train_direct.train_step

        def stop_at_ten(parts, window):  # type: ignore[no-untyped-def]
            if parts.state.step == 9:
                parts.folder.stop_path.touch()
                parts.stop._looked_at = 0.0
            return real(parts, window)

        patch.setattr(train_direct, "train_step", stop_at_ten)
        assert train_direct.main(words) == 0
    run(images, tmp_path, "run", "training.num_epochs=4", "training.batch_size=4", "--resume", "latest")
    rates, straight = learning_rates(tmp_path / "run"), learning_rates(tmp_path / "straight")
    assert rates[11] == pytest.approx(straight[11], rel=0.25)  # each epoch drops its last few images
    assert max(rates) > max(straight)


def test_an_unknown_choice_names_the_known_ones(images: Path, tmp_path: Path) -> None:
    from Configuration_System import load_config

    words = arguments(images, tmp_path, "x", "checkpoint.on_schedule_change=stretch")
    with pytest.raises(ConfigError, match="rescale"):
        load_config(Path(words[1]), words[2:])


def stopped_at(step: int, images: Path, runs: Path, *words: str) -> None:
    real = train_direct.train_step

    def stopping(parts, window):  # type: ignore[no-untyped-def]
        if parts.state.step == step - 1:
            parts.folder.stop_path.touch()
            parts.stop._looked_at = 0.0
        return real(parts, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_direct, "train_step", stopping)
        run(images, runs, "run", *words)


@pytest.mark.parametrize(("stop_at", "said", "epochs"), [(7, "starts again", [0, 1, 2]), (10, "was over", [0, 2])])
def test_another_data_set_is_gone_on_with_and_said(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stop_at: int, said: str, epochs: list[int]
) -> None:
    more = tmp_path / "more" / "images"
    shutil.copytree(images, more)
    stopped_at(stop_at, more, tmp_path)
    assert caplog.text.count("images to train on are not those") == 0
    for number in range(30):
        shutil.copy(more / "even" / "img000.jpg", more / f"new{number}.jpg")
        shutil.copy(more / "even" / "img000.json", more / f"new{number}.json")
    words = arguments(more, tmp_path, "run", "--resume", "latest")
    words.append("checkpoint.on_schedule_change=error")
    # The number of updates changes with the images, and what that means for the learning rate is the user's to say.
    assert train_direct.main(words) == 2
    assert results_of(tmp_path / "run")["steps"] == stop_at
    seen: dict[int, set[int]] = {}
    real = train_direct.train_step

    def recording(parts, window):  # type: ignore[no-untyped-def]
        seen.setdefault(window.epoch, set()).update(*(batch.row_ids.tolist() for batch in window.batches))
        return real(parts, window)

    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_direct, "train_step", recording)
        assert train_direct.main([*words, "checkpoint.on_schedule_change=rescale"]) == 0
    (line,) = [r.message for r in caplog.records if "images to train on are not those of the checkpoint" in r.message]
    assert f"epoch {stop_at // 5 + (stop_at % 5 > 0)} {said}" in line and "number of images 4" in line
    assert sorted(seen) == epochs[1:]
    # Whole epochs of the new images, less the incomplete last batch.
    assert all(len(rows) > 56 for rows in seen.values())
    assert results_of(tmp_path / "run")["status"] == "completed"


def steps_kept(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")}


def test_scores_of_other_held_out_images_are_not_compared(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patience = "training.early_stopping_patience=2"
    run(images, tmp_path, "run", patience)
    first = results_of(tmp_path / "run")["best"]
    assert isinstance(first, dict)
    record = tmp_path / "run" / "checkpoints" / "best.json"
    name = json.loads(record.read_text())["checkpoint"]
    caplog.clear()
    words = ("training.num_epochs=5", patience, "checkpoint.keep_last=1", "data.val_fraction=0.4", "--resume", "latest")
    run(images, tmp_path, "run", *words)
    assert "data.val_fraction: 0.2 -> 0.4: images that this run has trained on may be validation" in caplog.text
    lines = [each.message for each in caplog.records if "held-out images" in each.message]
    assert len(lines) == 2 and f"({name}, which stays) has val/mAP {first['value']:.4f}" in lines[0]
    assert lines[1].startswith("early stopping: ")
    second = results_of(tmp_path / "run")["best"]
    assert isinstance(second, dict) and second["step"] > first["step"]
    assert (tmp_path / "run" / "checkpoints" / name).is_dir()
    # The same images again: the old best is known again, and the newer one stays beside it.
    caplog.clear()
    run(images, tmp_path, "run", *words[:-3], "--resume", "latest")
    assert (
        results_of(tmp_path / "run")["best"] == first or results_of(tmp_path / "run")["best"]["value"] > first["value"]
    )  # type: ignore[index]
    assert "all 5 epochs are done" in caplog.text


def test_fewer_epochs_than_were_trained_end_the_run_with_a_line_and_a_score(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(12, images, tmp_path)
    before = learning_rates(tmp_path / "run")
    run(images, tmp_path, "run", "training.num_epochs=2", "--resume", "latest")
    lines = [each.message for each in caplog.records if "training.num_epochs=2, but the run" in each.message]
    assert len(lines) == 1 and "is in epoch 3 already (step 12): nothing is trained" in lines[0]
    results = results_of(tmp_path / "run")
    assert (results["status"], results["exit_code"], results["steps"]) == ("completed", 0, 12)
    assert learning_rates(tmp_path / "run") == before
    scored = [int(line["step"]) for line in lines_of(tmp_path / "run") if "val/mAP" in line]
    assert scored == [5, 10, 12]  # the weights as they are were never scored before
    assert (tmp_path / "run" / "model").is_dir()
    caplog.clear()
    run(images, tmp_path, "run", "training.num_epochs=2", "--resume", "latest")
    assert scored == [int(line["step"]) for line in lines_of(tmp_path / "run") if "val/mAP" in line]
    run(images, tmp_path, "run", "training.num_epochs=3", "--resume", "latest")
    assert results_of(tmp_path / "run")["steps"] == 15


def test_another_seed_is_no_change_of_data(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_at(7, images, tmp_path)
    before = results_of(tmp_path / "run")
    assert train_direct.main(arguments(images, tmp_path, "run", "--resume", "latest", "training.seed=77")) == 2
    assert "training.seed" in capsys.readouterr().err
    assert results_of(tmp_path / "run") == before


def test_a_kept_course_is_no_change_the_next_time(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "run", "training.num_epochs=2")
    more = ("training.num_epochs=3", "--resume", "latest")
    run(images, tmp_path, "run", *more, "checkpoint.on_schedule_change=keep")
    run(images, tmp_path, "run", *more, "checkpoint.on_schedule_change=error")


def test_another_vocabulary_is_refused_on_resume_and_says_how_to_carry_over(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path, "run", "training.num_epochs=1")
    words = arguments(images, tmp_path, "run", "training.num_epochs=2", "--resume", "latest")
    assert train_direct.main([*words, "vocabulary.min_frequency=12"]) == 2
    assert "--init-from" in capsys.readouterr().err


def test_a_broken_checkpoint_is_passed_over(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "model")
    (copy / "checkpoints" / "best.json").unlink()
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    (newest / "ema.safetensors").write_bytes(b"x")
    found = find_initial_weights(copy)
    assert found.source != newest and "the next newest is tried" in caplog.text


@pytest.mark.parametrize("case", ["another split", "no settings", "the same split"])
def test_a_checkpoint_of_another_run_brings_its_split_with_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    run(images, tmp_path, "a", "training.num_epochs=1")
    checkpoint = sorted((tmp_path / "a" / "checkpoints").glob("step-*"))[-1]
    if case == "no settings":
        (tmp_path / "a" / "config.yaml").unlink()
    held_out = () if case == "the same split" else ("data.val_fraction=0.3", "data.test_fraction=0.1")
    words = arguments(images, tmp_path, "b", "training.num_epochs=2", *held_out, "--resume", str(checkpoint))
    assert train_direct.main(words) == (0 if case == "the same split" else 2)
    said = capsys.readouterr().err
    assert (tmp_path / "b").exists() == (case == "the same split")
    if case == "the same split":
        assert "changed since this run last started: training.num_epochs: 1 -> 2" in said
        assert "run.name" not in said
        capsys.readouterr()
        words = arguments(images, tmp_path, "c", "training.num_epochs=1", "--resume", str(checkpoint))
        assert train_direct.main(words) == 0
        assert "the configuration differs" not in capsys.readouterr().err
    else:
        (line,) = [each for each in said.splitlines() if each.startswith("error: ")]
        assert ("--init-from" if case == "no settings" else "data.val_fraction: ") in line


def test_a_place_for_checkpoints_that_is_none_stops_the_start(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "whole")
    shutil.rmtree(copy / "checkpoints")
    before = {path: path.read_bytes() for path in (copy / "metrics.jsonl", copy / "results.json")}
    words = arguments(images, tmp_path, "whole", "--resume", "auto")
    assert train_direct.main(words) == 2
    assert "would erase its history" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    for path in before:
        path.unlink()
    (copy / "checkpoints").write_text("a file", encoding="utf-8")
    assert train_direct.main(words) == 2
    assert f"cannot be written into {copy / 'checkpoints'}" in capsys.readouterr().err
