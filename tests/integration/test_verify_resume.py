"""The command that checks exact resume finds equality where it is, and names what differs where it is not."""

from pathlib import Path

import pytest
import torch

from scripts import verify_resume
from tagger.checkpoint.format import LoadedCheckpoint, Manifest
from tests.integration.test_train_direct import SMALL

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(weight: float = 1.0, seen: int = 8) -> LoadedCheckpoint:
    tensors = {"model": {"w": torch.tensor([weight])}, "rng": {"torch": torch.tensor([3])}}
    state = {"samples_seen": seen, "seconds": float(seen), "extra": {"meter": {"waited_s": weight, "images": [1]}}}
    return LoadedCheckpoint(Path("x"), Manifest(1, 1, {}), tensors, state)  # type: ignore[arg-type]


ROWS = {0: [1, 2], 1: [3, 4]}


@pytest.mark.parametrize(
    ("ours", "theirs", "rows", "expected"),
    [
        (checkpoint(), checkpoint(), ROWS, None),
        (checkpoint(), checkpoint(), {0: [1, 2], 1: [4, 3]}, ("order of images", "at update 2")),
        (checkpoint(), checkpoint(), {0: [1, 2]}, ("order of images", "at update 2")),
        (checkpoint(), checkpoint(weight=2.0), ROWS, ("model", "w")),
        (checkpoint(), checkpoint(seen=9), ROWS, ("counters", "state.samples_seen: 8 straight, 9 resumed")),
    ],
)
def test_the_first_difference_is_named(
    ours: LoadedCheckpoint,
    theirs: LoadedCheckpoint,
    rows: dict[int, list[int]],
    expected: tuple[str, str] | None,
) -> None:
    assert verify_resume.first_difference(ours, theirs, (ROWS, rows)) == expected


@pytest.mark.slow
def test_a_run_with_everything_on_resumes_exactly(
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [f"data.roots=[{images}]", f"data.index_dir={tmp_path / 'index'}", "training.accumulation_steps=2"]
    config = str(ROOT / "configs" / "unified_config.yaml")
    assert verify_resume.main(["--config", config, "--steps", "8", *SMALL, *words]) == 0
    assert "equal: images of 8 updates" in capfd.readouterr().out
    assert verify_resume.main(["--config", config, "--steps", "80", *SMALL, *words]) == 2
    assert "ask for fewer --steps" in capfd.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_resume.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
