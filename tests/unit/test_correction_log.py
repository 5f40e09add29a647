"""The journal of corrections: what is there after a kill, beside another process, and from another version."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.correction_log import Change, CorrectionLog, LastTagError, SidecarEdit, change_tags, locked_log
from tagger.errors import InputError
from tagger.files import FormatError

ROOT = Path(__file__).resolve().parents[2]


def change(number: int, tag: str = "sun", image: str = "a.png", sidecar: SidecarEdit | None = None) -> Change:
    return Change(number, "2025-01-01T00:00:00Z", "add", tag, "/set", image, "0" * 16, (("sea",), None), "s", sidecar)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corrections.jsonl"


def test_what_is_appended_is_read_again(path):
    log = CorrectionLog(path)
    changes = [change(1), change(2, "lone \udc80"), change(3, "Zoë", sidecar=SidecarEdit("a", "b"))]
    log.append(changes[:2])
    log.append(changes[2:])
    log.append_undo([2])
    read = CorrectionLog(path)
    assert list(read.changes.values()) == changes == list(log.changes.values())
    assert [c.id for c in read.active] == [1, 3] and read.last_id == log.last_id == 4
    assert read.sidecars == log.sidecars and read.sidecars[("/set", "a.png")].ids == [3]


def test_every_torn_end_is_left_out_said_and_cut_off_by_the_next_writer(path, caplog):
    CorrectionLog(path).append([change(1)])
    whole = path.read_bytes()
    CorrectionLog(path).append([change(2)])
    both = path.read_bytes()
    for length in range(len(whole) + 1, len(both) - 1):
        path.write_bytes(both[:length])
        caplog.clear()
        log = CorrectionLog(path)
        assert list(log.changes) == [1] and log.torn_bytes == length - len(whole)
        assert "the last line is torn" in caplog.text
    log.append([change(2, "moon")])
    assert log.torn_bytes == 0 and [c.tag for c in CorrectionLog(path).active] == ["sun", "moon"]
    path.write_bytes(both[:-1])  # whole but for the line's end
    log = CorrectionLog(path)
    log.append([change(3)])
    assert list(CorrectionLog(path).changes) == [1, 2, 3]


def test_a_torn_header_is_an_empty_journal(path):
    path.write_bytes(b'{"format_ver')
    log = CorrectionLog(path)
    log.append([change(1)])
    assert list(CorrectionLog(path).changes) == [1]


def test_damage_before_the_end_and_newer_versions_are_refused_by_line(path):
    CorrectionLog(path).append([change(1), change(2)])
    header, first, second = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        (header + b"{}\n" + second, r"line 2 is damaged \(KeyError"),
        (header + first + first, "line 3 is damaged.*id 1 does not follow 1"),
        (header + first.replace(b'"add"', b'"ad"') + second, "line 2 is damaged.*'ad' is not known"),
        (first + second, "line 1 is damaged"),
        (header.replace(b": 1,", b": 9,") + first, "format_version 9, this program reads up to 1; update the program"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=message):
            CorrectionLog(path)
    path.unlink()
    log = CorrectionLog(path)
    log.append([change(1)])
    log.append_undo([1])
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines()[2].replace(b'"id": 2', b'"id": 3') + b"\n")
    with pytest.raises(FormatError, match="correction 1 is undone twice"):
        CorrectionLog(path)


def test_another_process_is_kept_out_until_the_writer_is_done(path):
    code = (
        "import sys; from pathlib import Path; from tagger.data.correction_log import locked_log\n"
        "with locked_log(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"in use by process {holder.pid}.*try again when it is done"),
            locked_log(path),
        ):
            pass
    finally:
        holder.communicate("\n")
    assert holder.returncode == 0
    with locked_log(path) as log:
        log.append([change(1)])
    assert list(path.parent.iterdir()) == [path]


def test_a_journal_that_a_killed_writer_had_locked_is_free(path):
    code = (
        "import os, sys; from pathlib import Path; from tagger.data.correction_log import locked_log\n"
        "with locked_log(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False).returncode == 9
    with locked_log(path) as log:
        log.append([change(1)])


@given(
    st.lists(st.sampled_from("abc"), min_size=1, unique=True),
    st.sampled_from([None, "general", "explicit"]),
    st.sampled_from(["add", "remove"]),
    st.sampled_from(["a", "b", "d", "rating:general", "rating:sensitive"]),
)
def test_a_correction_changes_one_thing_or_is_needless(tags, rating, action, tag):
    content = {*tags, *([f"rating:{rating}"] if rating else [])}
    wanted = {name for name in content if action == "add" and not (tag[:2] == "ra" and name[:2] == "ra")} | {tag}
    wanted = wanted if action == "add" else content - {tag}
    try:
        after = change_tags(tuple(tags), rating, action, tag)
    except LastTagError:
        assert tags == [tag] and action == "remove"
        return
    assert (after is None) == (wanted == content)
    if after is not None:
        assert {*after[0], *([f"rating:{after[1]}"] if after[1] else [])} == wanted


def test_the_journal_is_plain_json_lines(path):
    CorrectionLog(path).append([change(1)])
    header, line = map(json.loads, path.read_text().splitlines())
    assert header == {"format_version": 1, "holds": "corrections"}
    assert (line["id"], line["action"], line["tag"], line["image"], line["root"]) == (1, "add", "sun", "a.png", "/set")
    assert line["before"] == {"tags": ["sea"], "rating": None}
