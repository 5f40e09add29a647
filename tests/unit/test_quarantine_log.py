import logging
import pickle
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tagger.data.decode import DecodeError
from tagger.data.quarantine import FileFacts, Refusal, UndecodableFile, UnreadableFile
from tagger.data.quarantine_log import FORMAT_VERSION, Quarantine
from tagger.files import FormatError

FACTS = FileFacts(120, 17)


def failure(path: str = "/a/b.jpg", content: bytes = b"bytes", facts: FileFacts = FACTS) -> Refusal:
    return Refusal.of(Path(path), UndecodableFile(DecodeError("truncated", "row 3"), facts, content))


def lines_of(path: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run" / "quarantine.jsonl"


def test_the_same_bytes_must_fail_twice(log: Path) -> None:
    quarantine = Quarantine(log, "1")
    quarantine.record(failure())
    assert not quarantine.is_known_bad("/a/b.jpg", FACTS) and quarantine.num_files == 0
    quarantine.record(failure(content=b"other bytes"))
    assert not quarantine.is_known_bad("/a/b.jpg", FACTS)
    quarantine.record(failure(content=b"other bytes"))
    assert quarantine.is_known_bad("/a/b.jpg", FACTS) and quarantine.num_files == 1
    assert quarantine.known_bad().reason("/a/b.jpg", FACTS) == "truncated"


def test_failures_count_from_one_start_to_the_next(log: Path) -> None:
    for expected in (False, True, True):
        quarantine = Quarantine(log, "1")
        quarantine.record(failure())
        assert quarantine.is_known_bad("/a/b.jpg", FACTS) is expected
    assert Quarantine(log, "1").known_bad() == quarantine.known_bad()
    assert len(lines_of(log)) == 3  # what is known already is not written again


def test_a_line_holds_the_evidence(log: Path) -> None:
    Quarantine(log, "decoder 7").record(failure())
    header, line = lines_of(log)
    assert header == {"format_version": FORMAT_VERSION}
    assert line == {
        "path": "/a/b.jpg",
        "reason": "truncated",
        "detail": "row 3",
        "size": 120,
        "mtime_ns": 17,
        "sha256": "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9",
        "decoder": "decoder 7",
        "failures": 1,
    }


@pytest.mark.parametrize("facts", [FileFacts(121, 17), FileFacts(120, 18)])
def test_a_changed_file_is_tried_again_and_then_cleared(log: Path, facts: FileFacts) -> None:
    quarantine = Quarantine(log, "1")
    for _ in range(2):
        quarantine.record(failure())
    assert not quarantine.is_known_bad("/a/b.jpg", facts)
    assert quarantine.known_bad().knows("/a/b.jpg")
    quarantine.clear("/a/b.jpg")
    quarantine.clear("/a/b.jpg")
    assert not Quarantine(log, "1").known_bad().knows("/a/b.jpg")
    assert lines_of(log)[-1] == {"path": "/a/b.jpg", "cleared": True} and len(lines_of(log)) == 4


def test_a_touched_file_with_the_same_bytes_stays(log: Path) -> None:
    quarantine = Quarantine(log, "1")
    for facts in (FACTS, FACTS, FileFacts(120, 99)):
        quarantine.record(failure(facts=facts))
    assert Quarantine(log, "1").is_known_bad("/a/b.jpg", FileFacts(120, 99))


def test_another_decoder_starts_anew(log: Path) -> None:
    for _ in range(2):
        Quarantine(log, "1").record(failure())
    newer = Quarantine(log, "2")
    assert not newer.is_known_bad("/a/b.jpg", FACTS) and not newer.known_bad().knows("/a/b.jpg")
    newer.record(failure())
    assert not newer.is_known_bad("/a/b.jpg", FACTS)


def test_missing_and_unreadable_files_are_not_recorded(log: Path) -> None:
    quarantine = Quarantine(log, "1")
    for _ in range(3):
        quarantine.record(Refusal.of(Path("/a/b.jpg"), UnreadableFile("missing")))
    assert not log.exists() and quarantine.num_files == 0


@pytest.mark.parametrize("keep", [1, 5, -1, -2, -20])
def test_a_torn_last_line_is_dropped_and_overwritten(log: Path, keep: int) -> None:
    quarantine = Quarantine(log, "1")
    quarantine.record(failure("/a/1.jpg"))
    quarantine.record(failure("/a/1.jpg"))
    log.write_bytes(log.read_bytes()[:keep])
    again = Quarantine(log, "1")
    assert again.num_files == 0
    for _ in range(2):
        again.record(failure("/a/2.jpg"))
    assert Quarantine(log, "1").is_known_bad("/a/2.jpg", FACTS)
    assert all(isinstance(line, dict) for line in lines_of(log))


def test_a_newer_log_is_refused_by_name(log: Path) -> None:
    log.parent.mkdir()
    log.write_bytes(b'{"format_version":2}\n')
    with pytest.raises(FormatError, match=r"quarantine\.jsonl has format_version 2, .*update the program"):
        Quarantine(log, "1")


def test_a_damaged_line_in_the_middle_is_refused_by_number(log: Path) -> None:
    quarantine = Quarantine(log, "1")
    quarantine.record(failure("/a/1.jpg"))
    log.write_bytes(log.read_bytes() + b"{]\n" + b'{"path":"/x","cleared":true}\n')
    with pytest.raises(FormatError, match=r"line 3 is damaged .*delete the file"):
        Quarantine(log, "1")


def test_a_log_that_cannot_be_written_stops_nothing(log: Path, caplog: pytest.LogCaptureFixture) -> None:
    log.mkdir(parents=True)
    quarantine = Quarantine.__new__(Quarantine)
    quarantine.__init__(None, "1")  # type: ignore[misc]
    quarantine.path = log
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            quarantine.record(failure())
    assert quarantine.is_known_bad("/a/b.jpg", FACTS)
    assert "cannot write" in caplog.text


def test_what_workers_get_and_report_can_be_sent_to_them() -> None:
    quarantine = Quarantine(None, "1")
    for _ in range(2):
        quarantine.record(failure())
    sent = pickle.loads(pickle.dumps((quarantine.known_bad(), failure())))
    assert sent == (quarantine.known_bad(), failure())
    assert sent[0].is_known_bad("/a/b.jpg", FACTS)


PATHS = st.sampled_from(["/a", "/b", "/ü", "/\u2028"])
STEPS = st.lists(st.tuples(PATHS, st.integers(0, 1), st.integers(0, 1), st.booleans()), max_size=15)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, cut=st.integers(0, 60))
def test_a_reopened_log_knows_what_its_owner_knew(steps: list[tuple[str, int, int, bool]], cut: int, log: Path) -> None:
    log.unlink(missing_ok=True)
    quarantine = Quarantine(log, "1")
    for path, content, mtime, mended in steps:
        if mended:
            quarantine.clear(path)
        else:
            quarantine.record(failure(path, bytes([content]), FileFacts(5, mtime)))
        assert Quarantine(log, "1").known_bad() == quarantine.known_bad()
    if log.exists():
        log.write_bytes(log.read_bytes()[: -cut or None])
        Quarantine(log, "1").record(failure("/new"))
        Quarantine(log, "1")
