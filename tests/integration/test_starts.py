"""Starts that are refused, that fail, and that are only checked: what is said, and that nothing is left behind."""

from pathlib import Path

import pytest

import start_up
import train_direct
from Configuration_System import load_config
from tagger.distributed import Ranks
from tagger.errors import InputError, RunFailedError
from tests.integration.test_train_direct import arguments, run


@pytest.mark.parametrize("only_checking", [("--validate-only",), ()])
def test_a_rank_without_a_group_is_a_process_by_itself(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only_checking: tuple[str, ...],
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = arguments(images, tmp_path, "run", "training.num_epochs=1", *only_checking)
    assert train_direct.main(words) == 0
    assert ("ready: " if only_checking else f"run: {tmp_path / 'run'}") in capsys.readouterr().out
    assert train_direct.main([*words, "--resume", "latest", "run.name=none"]) == 2
    assert "rank 1" not in capsys.readouterr().err


def test_a_start_that_fails_says_why_and_keeps_the_traceback_of_an_unknown_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path, "old", "training.num_epochs=1")
    capsys.readouterr()

    def broken(*_: object) -> None:
        raise RuntimeError("the flux is out of order")

    monkeypatch.setattr(start_up, "create_optimizer", broken)
    said = "ERROR: the run could not start: RuntimeError: the flux is out of order"
    # The run's folder and its train.log go, so the error itself goes on to the interpreter, which prints it.
    with pytest.raises(RuntimeError, match="flux"):
        train_direct.main(arguments(images, tmp_path, "new"))
    assert said in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "new").exists()
    # In a folder that was there the log has it.
    assert train_direct.main(arguments(images, tmp_path, "old", "training.num_epochs=2", "--resume", "latest")) == 1
    assert said in capsys.readouterr().err.splitlines()
    assert "in broken" in (tmp_path / "old" / "train.log").read_text(encoding="utf-8")


def test_a_rank_without_a_log_leaves_the_traceback_of_an_unknown_error_to_the_console(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the flux is out of order")

    monkeypatch.setattr(train_direct, "build", broken)
    monkeypatch.setattr(train_direct, "log_as_rank", lambda *_: None)
    words = arguments(images, tmp_path, "run")
    with pytest.raises(RuntimeError, match="flux") as caught:
        train_direct.follow(load_config(words[1], words[2:], environment={}), Ranks(rank=1))
    assert not isinstance(caught.value, RunFailedError)


def test_a_start_without_memory_says_so_in_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no memory for a state")

    monkeypatch.setattr(start_up, "create_optimizer", broken)
    assert train_direct.main(arguments(images, tmp_path, "new")) == 5
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("ERROR")]
    assert "could not start: out of memory (no memory for a state); lower training.batch_size" in line


def test_a_schedule_that_does_not_fit_the_updates_is_bad_input_and_leaves_the_run_as_it_was(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(images, tmp_path, "old", "training.num_epochs=1")
    before = (folder / "config.yaml").read_bytes()
    cycles = ("scheduler.name=cosine_restarts", "scheduler.num_cycles=20")
    for words in (arguments(images, tmp_path, "new"), arguments(images, tmp_path, "old", "--resume", "latest")):
        capsys.readouterr()
        assert train_direct.main([*words, *cycles, "training.num_epochs=2"]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
        assert "scheduler.name=cosine_restarts does not fit this run: num_cycles=20 is more than total_steps=10" in line
    assert (folder / "config.yaml").read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("training.phases=[{image_size: 16, share: 0.999}, {image_size: 32}]",), "training.phases, item 2 of 2"),
        (("scheduler.name=cosine_restarts", "scheduler.num_cycles=2000"), "num_cycles=2000 is more than total_steps"),
        (("--init-from", "nowhere"), "nowhere holds no usable weights"),
        (("training.mixed_precision=fp16",), "training.mixed_precision=fp16 needs a CUDA device"),
        (("augment.rotation={probability: 1, strength: 4000}",), "augment.rotation.strength"),
        (
            ("training.phases=[{image_size: 32, augment: {rotation: {probability: 1, strength: 4000}}}]",),
            "training.phases, item 1: augment.rotation.strength",
        ),
    ],
)
def test_a_check_finds_what_would_stop_the_start(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert train_direct.main(arguments(images, tmp_path, "run", *words, "--validate-only")) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_check_builds_the_optimizer_of_the_model(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(*_: object) -> None:
        raise InputError("this model has nothing to optimise")

    monkeypatch.setattr(start_up, "create_optimizer", refusing)
    assert train_direct.main(arguments(images, tmp_path, "run", "--validate-only")) == 2
    assert "nothing to optimise" in capsys.readouterr().err


def test_a_check_looks_at_weights_to_start_from_unless_the_run_goes_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(images, tmp_path, "old", "training.num_epochs=1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = ("--init-from", str(folder), "model.depth=3", "--validate-only")
    assert train_direct.main(arguments(images, tmp_path, "new", *other)) == 2
    assert "blocks.2" in capsys.readouterr().err
    for name, resume in (("old", "auto"), ("old", "latest")):
        words = arguments(images, tmp_path, name, "--init-from", "nowhere", "--resume", resume, "--validate-only")
        assert train_direct.main(words) == 0
    assert train_direct.main(arguments(images, tmp_path, "new", *other[:2], "--resume", "auto", "--validate-only")) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_check_knows_of_how_many_ranks_a_run_is(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded = ("training.parallel=fsdp", "optimizer.name=muon", "--validate-only")
    assert train_direct.main(arguments(images, tmp_path, "run", *sharded)) == 0
    assert "WARNING: in one process this trains, in several it does not: " in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_direct.main(arguments(images, tmp_path, "run", *sharded)) == 2
    # As many updates as two ranks make: three epochs of two batches of 16 images.
    cycles = ("training.num_epochs=3", "scheduler.name=cosine_restarts", "scheduler.num_cycles=2000", "--validate-only")
    assert train_direct.main(arguments(images, tmp_path, "run", *cycles)) == 2
    assert "total_steps=6;" in capsys.readouterr().err
