"""Starts that are refused, that fail, and that are only checked: what is said, and that nothing is left behind."""

from pathlib import Path

import pytest

import train_direct
from tests.integration.test_train_direct import arguments


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
