"""A whole run on a tiny data set: what it leaves behind, how it goes on, how it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import torch
from safetensors.torch import load_file

import start_up
import train_direct
import validation_loop
from scripts import predict, report_run

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "tiny_run_losses.json"
SMALL = (
    "data.image_size=32",
    "data.val_fraction=0.2",
    "data.num_threads=2",
    "vocabulary.min_frequency=1",
    "model.preset=vit_tiny",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.stem=conv",
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "augment.rotation={probability: 0.5, strength: 10}",
    "optimizer.name=muon",
    "training.device=cpu",
    "training.batch_size=8",
    "training.num_epochs=3",
    "monitor.log_every_steps=1",
)


def arguments(images: Path, runs: Path, name: str, *more: str) -> list[str]:
    words = [f"data.roots=[{images}]", f"data.index_dir={images.parent / 'index'}", f"run.output_dir={runs}"]
    return ["--config", str(ROOT / "configs" / "unified_config.yaml"), *SMALL, *words, f"run.name={name}", *more]


def run(images: Path, runs: Path, name: str, *more: str) -> Path:
    assert train_direct.main(arguments(images, runs, name, *more)) == 0
    return runs / name


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    return {int(line["step"]): line["train/loss"] for line in lines_of(folder) if "train/loss" in line}


def results_of(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    parts = ("model", "optimizer", "ema", "rng")
    return {f"{part}/{k}": v for part in parts for k, v in load_file(newest / f"{part}.safetensors").items()}


def copy_half(straight: Path, half: Path) -> Path:
    """What a run that kept every checkpoint had left inside an epoch, half-way."""
    steps = sorted((straight / "checkpoints").glob("step-*"))
    for path in steps[: len(steps) // 2 - 1]:
        shutil.copytree(path, half / "checkpoints" / path.name)
    for name in ("config.yaml", "vocabulary.json", "metrics.jsonl"):
        shutil.copy(straight / name, half / name)
    return half


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("runs"), "whole")


def test_a_run_leaves_everything_that_others_rely_on(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "vocabulary.json",
        "model",
    }
    assert "run.lock" not in names
    results = results_of(finished)
    assert results["status"] == "completed"
    assert set(results["final"]) == {"val/mAP", "val/f1_macro", "val/f1_micro", "val/loss"}  # type: ignore[call-overload]
    assert {path.name for path in (finished / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "vocabulary.json",
        "preprocess.json",
        "selected_tags.csv",
    }
    assert list((finished / "tensorboard").iterdir())


def test_every_line_of_the_metrics_has_step_epoch_and_time(finished: Path) -> None:
    lines = lines_of(finished)
    assert all({"step", "epoch", "time"} <= line.keys() for line in lines)
    names = {"loss", "learning_rate", "grad_norm", "images_per_second", "data_wait_fraction"}
    assert {f"train/{name}" for name in names} <= {key for line in lines for key in line}


def test_online_weights_are_scored_beside_the_average(finished: Path, images: Path, tmp_path: Path) -> None:
    beside = run(images, tmp_path, "beside", "validation.online_weights=true")
    alone = run(images, tmp_path, "alone", "training.ema_decay=null", "validation.online_weights=true")

    def scores(folder: Path, start: str) -> list[dict[str, float]]:
        found = [
            {k.removeprefix(start): v for k, v in line.items() if k.startswith(start)} for line in lines_of(folder)
        ]
        return [line for line in found if line]

    # Scoring them changes neither training nor the average's scores.
    assert losses_of(beside) == losses_of(finished) and scores(beside, "val/") == scores(finished, "val/")
    assert scores(beside, "val_online/") == scores(alone, "val/") != scores(beside, "val/")
    assert not scores(alone, "val_online/") and not scores(finished, "val_online/")
    assert results_of(beside)["final"] == results_of(finished)["final"]


def test_standalone_validation_gives_the_trainers_numbers(finished: Path, images: Path, tmp_path: Path) -> None:
    assert images.is_dir()
    output = tmp_path / "evaluation.json"
    best = results_of(finished)["best"]
    assert validation_loop.main(["--run", str(finished), "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["val/mAP"] == best["value"]  # type: ignore[index]
    checkpoint = sorted((finished / "checkpoints").glob("step-*"))[-1]
    assert validation_loop.main(["--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    scores = json.loads(output.read_text(encoding="utf-8"))
    final = results_of(finished)["final"]
    assert {name: scores[name] for name in final} == final  # type: ignore[attr-defined]


def test_the_closing_report_fits_80_columns(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert report_run.main([str(finished), "--predict", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) > 10
    assert all(len(row) <= 80 and row.endswith("│") for row in rows)


def test_the_model_tags_an_image(finished: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next(images.rglob("*.png"))
    assert predict.main([str(finished), str(image), "--json", "--threshold", "0.0"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert len(line["tags"]) == len(json.loads((finished / "vocabulary.json").read_text(encoding="utf-8"))["tags"])


def test_an_existing_run_is_not_written_into(finished: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert train_direct.main(arguments(images, finished.parent, "whole")) == 2
    error = capsys.readouterr().err
    assert "--resume latest" in error and "run.name=whole-2" in error
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished: Path, images: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "whole")
    before = final_state(runs / "whole")
    run(images, runs, "whole", "--resume", "latest")
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_state(runs / "whole").items())
    assert losses_of(runs / "whole") == losses_of(finished)
    assert results_of(runs / "whole")["status"] == "completed"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_continues_bitwise(images: Path, tmp_path: Path, accumulation: int) -> None:
    more = (f"training.accumulation_steps={accumulation}", "checkpoint.every_steps=1", "checkpoint.keep_last=100")
    straight = run(images, tmp_path, "straight", *more)
    resumed = copy_half(straight, tmp_path / "resumed")
    run(images, tmp_path, "resumed", *more, "--resume", "latest")
    expected, found = final_state(straight), final_state(resumed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses_of(resumed) == losses_of(straight)
    final, again = results_of(straight)["final"], results_of(resumed)["final"]
    assert final == again


def test_an_automatic_resume_starts_fresh_where_there_is_nothing_and_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path, "fresh", "--resume", "auto", "training.num_epochs=1")
    assert "holds no checkpoint: starting fresh" in capsys.readouterr().err
    run(images, tmp_path, "fresh", "--resume", "auto", "training.num_epochs=2")
    assert results_of(tmp_path / "fresh")["steps"] == 10
    assert "resumed from" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--resume", "latest"), ("--resume", "best"), ("checkpoint.resume=latest",)])
@pytest.mark.parametrize("only_checking", [(), ("--validate-only",)])
def test_a_mistyped_name_is_no_fresh_start(
    finished: Path,
    images: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    only_checking: tuple[str, ...],
) -> None:
    assert train_direct.main(arguments(images, finished.parent, "wholle", *words, *only_checking)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean run.name=whole?" in line and "--resume auto" in line
    assert not (finished.parent / "wholle").exists()


def test_twenty_losses_equal_their_golden(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regenerate by deleting the file and running this test twice; it holds the arithmetic of a whole CPU step."""
    # What trunc_normal_ draws from a seed differs between releases of torch; normal_ gives the same in all of them.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)
    folder = run(images, tmp_path, "golden", "training.num_epochs=4", "model.dropout=0", "orientation.map_path=null")
    losses = [losses_of(folder)[step] for step in range(1, 21)]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
        pytest.fail(f"{GOLDEN} was missing and is written; run again")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8")), rel=1e-3)


def test_early_stopping_ends_the_run(images: Path, tmp_path: Path) -> None:
    words = ("training.early_stopping_patience=1", "training.early_stopping_min_delta=10", "training.num_epochs=5")
    folder = run(images, tmp_path, "early", *words)
    steps_an_epoch = 5
    assert results_of(folder)["steps"] == 2 * steps_an_epoch  # the first check sets the mark, the second misses it
    assert results_of(folder)["status"] == "completed"


def test_patience_counts_validations_and_not_epochs(images: Path, tmp_path: Path) -> None:
    words = ("training.early_stopping_patience=1", "training.early_stopping_min_delta=10", "training.num_epochs=9")
    folder = run(images, tmp_path, "seldom", *words, "validation.every_epochs=2", "checkpoint.best_metric=val/loss")
    steps_an_epoch = 5
    validated = [line for line in lines_of(folder) if "val/loss" in line]
    assert [line["step"] for line in validated] == [2 * steps_an_epoch, 4 * steps_an_epoch]
    best = min(validated, key=lambda line: line["val/loss"])
    found = results_of(folder)["best"]
    assert found == {"metric": "val/loss", "value": best["val/loss"], "step": best["step"]}


def test_validate_only_checks_and_writes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_direct.main(arguments(images, tmp_path / "runs", "none", "--validate-only")) == 0
    assert "training and" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("training.num_epoch=3",), "did you mean 'training.num_epochs'"),
        (("data.roots=[/nowhere]",), "data.roots: /nowhere is not a folder"),
        (("vocabulary.min_frequency=1000",), "vocabulary.min_frequency"),
        (("loss.ignored_tags=[arow]",), "arrow"),
        (("augment.rotation={probability: 1, strength: 4000}",), "augment.rotation.strength"),
        (("loss.name=focal", "loss.gamma_pos=1"), "loss.gamma_pos"),
        (("training.mixed_precision=fp16",), "training.mixed_precision=fp16 needs a CUDA device"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_no_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert train_direct.main(arguments(images, tmp_path, "bad", *words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "bad").exists()


def test_no_images_says_where_it_looked_and_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing", encoding="utf-8")
    assert train_direct.main(arguments(tmp_path / "empty", tmp_path / "runs", "x")) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "empty") in error and ".txt" in error


def test_a_loss_that_is_no_number_ends_as_diverged(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train_direct.train_step

    def broken(parts: start_up.Parts, window: train_direct.Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, norm, _ = real(parts, window)
        return loss, norm, torch.tensor(parts.state.step >= 6)

    monkeypatch.setattr(train_direct, "train_step", broken)
    assert train_direct.main(arguments(images, tmp_path, "nan")) == 4
    assert "ERROR: 4 updates in a row were not finite" in capsys.readouterr().err
    results = results_of(tmp_path / "nan")
    assert (results["status"], results["exit_code"]) == ("diverged", 4)
    assert "Traceback" in (tmp_path / "nan" / "train.log").read_text(encoding="utf-8")


def test_the_room_that_checkpoints_take_is_said_at_the_start(finished: Path) -> None:
    log = (finished / "train.log").read_text(encoding="utf-8")
    newest = sorted((finished / "checkpoints").glob("step-*"))[-1]
    size = sum(path.stat().st_size for path in newest.iterdir() if path.name != "rng.safetensors")
    (said,) = re.findall(r"checkpoints take about ([\d.]+) ([kM])B each: .* for checkpoint.keep_last=3", log)
    assert float(said[0]) * {"k": 1e3, "M": 1e6}[said[1]] == pytest.approx(size, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send to another process")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_with_a_checkpoint_that_resumes(images: Path, tmp_path: Path, number: int, code: int) -> None:
    words = arguments(images, tmp_path, "stopped", "training.num_epochs=200", "checkpoint.every_steps=100000")
    process = subprocess.Popen([sys.executable, "train_direct.py", *words], cwd=ROOT)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    results = results_of(tmp_path / "stopped")
    assert results["status"] == "stopped"
    steps = results["steps"]
    assert isinstance(steps, int)
    last = sorted((tmp_path / "stopped" / "checkpoints").glob("step-*"))[-1]
    assert int(last.name.removeprefix("step-")) == steps
    run(images, tmp_path, "stopped", f"training.num_epochs={steps // 5 + 2}", "--resume", "latest")
    assert results_of(tmp_path / "stopped")["status"] == "completed"
