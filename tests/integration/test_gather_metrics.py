"""Two ranks that score a share of the images each say, to the last digit, what one says of all of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tagger.evaluation.gather import gather_metrics
from tests.gather_ranks import counted, everything

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("form", ["keys", "histograms"])
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_ranks_give_what_one_gives(tmp_path: Path, form: str) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-m", "tests.gather_ranks", str(rank), "2", str(tmp_path), form], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert (tmp_path / f"{form}.json").read_bytes() == everything(counted(form, slice(None)))
    assert "12 images were scored by two ranks" in (tmp_path / f"{form}.txt").read_text(encoding="utf-8")


def test_one_process_has_everything_already() -> None:
    computer = counted("keys", slice(None))
    before = everything(computer)
    assert gather_metrics(computer)
    assert everything(computer) == before
