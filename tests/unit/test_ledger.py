"""What a loader's ledger says and forgets: which loader speaks, few lines for many files, files that come back."""

import logging
from pathlib import Path, PurePosixPath
from typing import cast

import pytest

from tagger.data.batch_job import Outcome
from tagger.data.index import MetadataIndex
from tagger.data.ledger import ImageLedger
from tagger.data.quarantine import FailureBudget, FileFacts, Refusal
from tagger.data.quarantine_log import Quarantine


class Rows:
    """What a ledger asks of an index."""

    def image_path(self, row: int) -> PurePosixPath:
        return PurePosixPath(f"/set/{row}.png")


def refused(row: int, reason: str = "missing", *, bytes_failed: bool = False) -> Outcome:
    evidence = (FileFacts(9, 9), "0" * 64) if bytes_failed else (None, None)
    return Outcome(row, Refusal(f"/set/{row}.png", reason, "", *evidence))


@pytest.fixture
def ledger() -> ImageLedger:
    budget = FailureBudget(100_000, max_in_a_row=1000)
    return ImageLedger(cast(MetadataIndex, Rows()), budget, Quarantine(None, "a decoder"), "validation")


def test_lines_are_few_and_say_which_loader_and_nothing_is_uncounted(
    ledger: ImageLedger, caplog: pytest.LogCaptureFixture
) -> None:
    for row in range(200):
        ledger.judge([refused(row), refused(row)])
    assert caplog.text.count("left out of validation: /set/") == 10 and len(ledger.refusals) == 200
    with caplog.at_level(logging.INFO):
        ledger.report()
    assert "images left out of validation or used in part, so far: missing 200; in quarantine: 0" in caplog.text


def test_a_file_that_comes_back_is_forgotten_and_told_again_when_it_goes(
    ledger: ImageLedger, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        ledger.judge([refused(7), refused(8, "truncated", bytes_failed=True)])
        ledger.judge([Outcome(1, None), Outcome(7, None), Outcome(8, None, mended=True)])
        assert ledger.refusals == () and ledger.num_quarantined == 0
    assert caplog.text.count("left out of validation: ") == 6


def test_a_run_with_files_that_come_and_go_is_not_stopped_for_them(tmp_path: Path) -> None:
    """Every file away once, never two at a time: a share that is locked now and then, say."""
    budget = FailureBudget(2000)
    ledger = ImageLedger(cast(MetadataIndex, Rows()), budget, Quarantine(tmp_path / "log.jsonl", "x"), "training")
    for row in range(2000):
        ledger.judge([refused(row), Outcome(row, None)])
    assert ledger.refusals == ()
