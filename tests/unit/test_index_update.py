"""An index brought up to date is, byte for byte, the one that reading everything would give."""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tagger.data import index_update, parse_pool, sidecar_rows
from tagger.data.index import DatasetError, MetadataIndex, Update, open_index
from tagger.data.index_update import match_paths

TAGS = ("sun", "moon", "sky", " sea ", "boat", "sun", "")


def _pair(path: Path, content: bytes, time_ns: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    _write(path.with_suffix(".json"), content, time_ns)


def _write(path: Path, content: bytes, time_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))


def _content(index: MetadataIndex) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(index.path.iterdir())}


def _read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    read = sidecar_rows._read_once

    def note(path, folder=None):
        names.append(Path(path).name)
        return read(path, folder)

    monkeypatch.setattr(sidecar_rows, "_read_once", note)
    return names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(8):
        folder = tmp_path / "set" / ("x", "x/inner", "x.y", "")[number % 4]
        _pair(folder / f"{number}.png", orjson.dumps({"tags": [f"tag{number}", "all"], "rating": number % 4}))
    return tmp_path / "set"


def test_only_what_changed_is_read_and_the_line_says_so(root, monkeypatch, caplog):
    index_dir = root.parent / "index"
    first = open_index([root], index_dir)
    assert first.update == Update(new=8)
    names = _read_names(monkeypatch)
    assert open_index([root], index_dir).update == Update(kept=8) and not names
    (root / "x/0.json").unlink()
    (root / "x/inner/1.png").unlink()
    _write(root / "x.y/2.json", b'{"tags": "other"}', 5)
    _pair(root / "x/new.png", b'{"tags": "fresh all"}')
    caplog.set_level("INFO")
    second = open_index([root], index_dir)
    assert sorted(names) == ["2.json", "new.json"]
    assert second.update == Update(new=1, changed=1, vanished=2, kept=5)
    assert "index: +1 new, 1 changed, 2 vanished images; 5 kept" in caplog.messages
    assert [record.tags for record in map(second.record, range(len(second))) if "other" in record.tags] == [("other",)]
    assert _content(second) == _content(open_index([root], root.parent / "anew"))


def test_what_was_refused_is_not_read_again_until_it_changes(root, monkeypatch):
    index_dir = root.parent / "index"
    _pair(root / "bad.png", b"{}")
    _pair(root / "odd.png", b'{"tags": "a", "rating": "unrated"}')
    open_index([root], index_dir)
    names = _read_names(monkeypatch)
    _pair(root / "another.png", b'{"tags": "a"}')
    index = open_index([root], index_dir)
    assert names == ["another.json"] and index.update == Update(new=1, kept=10)
    assert [Path(item.path).name for item in index.rejected] == ["bad.json"]
    assert [item.reason for item in index.unknown_ratings] == ["rating: unrated"]
    _write(root / "bad.json", b'{"tags": "a"}', 7)
    (root / "odd.json").unlink()
    index = open_index([root], index_dir)
    assert index.update == Update(changed=1, vanished=1, kept=9) and not index.rejected and not index.unknown_ratings


def test_a_sidecar_that_could_not_be_read_is_read_alone_next_time(root, monkeypatch):
    read = sidecar_rows._read_once

    def refuse(path, folder=None):
        if Path(path).name == "3.json":
            raise PermissionError(13, "Permission denied")
        return read(path, folder)

    monkeypatch.setattr(sidecar_rows, "_read_once", refuse)
    assert len(open_index([root], root.parent / "index")) == 7
    monkeypatch.setattr(sidecar_rows, "_read_once", read)
    names = _read_names(monkeypatch)
    index = open_index([root], root.parent / "index")
    assert names == ["3.json"] and len(index) == 8 and index.complete


def test_roots_that_lose_all_their_pairs_keep_their_place(tmp_path):
    for name in "abc":
        _pair(tmp_path / name / "1.png", b'{"tags": "x"}')
    roots = [tmp_path / name for name in "abc"]
    open_index(roots, tmp_path / "index")
    (tmp_path / "b/1.json").unlink()
    index = open_index(roots, tmp_path / "index")
    assert [index.image_path(row).parent.name for row in range(2)] == ["a", "c"]
    (tmp_path / "a/1.json").unlink()
    _write(tmp_path / "b/1.json", b'{"tags": "x"}', 3)
    index = open_index(roots, tmp_path / "index")
    assert [index.image_path(row).parent.name for row in range(2)] == ["b", "c"]
    assert index.update == Update(new=1, vanished=1, kept=1)


def test_several_processes_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(index_update, "BLOCK_ROWS", 16)
    for number in range(150):
        tags = [f"tag{number * 7 % 40}", f"own{number}", "caf\u00e9"]
        body = orjson.dumps({"tags": tags, "rating": "?" if number % 50 == 0 else "g", "artist": "some one"})
        _pair(tmp_path / "set" / f"{number % 3}\u00e9" / f"{number}.png", b"{" if number % 40 == 7 else body)
    fields = ["artist"]
    alone = open_index([tmp_path / "set"], tmp_path / "one", extra_fields=fields, processes=1)
    several = open_index([tmp_path / "set"], tmp_path / "two", extra_fields=fields, processes=2)
    assert _content(alone) == _content(several) and len(alone.rejected) == 4 and len(alone.unknown_ratings) == 3


def test_work_of_a_process_that_dies_is_done_here(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(index_update, "BLOCK_ROWS", 8)
    for number in range(40):
        _pair(tmp_path / "set" / f"{number:02}.png", orjson.dumps({"tags": [f"tag{number}"]}))
    calls: list[str] = []
    parse = parse_pool._Helper.parse

    def die(helper, root, sidecars):
        calls.append(root)
        if len(calls) == 2:
            helper._process.kill()
        return parse(helper, root, sidecars)

    monkeypatch.setattr(parse_pool._Helper, "parse", die)
    index = open_index([tmp_path / "set"], tmp_path / "index", processes=2)
    assert len(index) == 40 and "doing that work here" in caplog.text


def test_where_no_process_can_be_started_this_one_does_the_work(root, monkeypatch, caplog):
    monkeypatch.setattr("tagger.data.parse_pool.sys.executable", str(root / "no python"))
    assert len(open_index([root], root.parent / "index", processes=2)) == 8
    assert "cannot start a process" in caplog.text


def test_failing_storage_stops_the_build_from_another_process(root, monkeypatch):
    monkeypatch.setattr(parse_pool._Helper, "_call", lambda *_, **__: ({"error": "data.roots: cannot read it"}, b""))
    with pytest.raises(DatasetError, match="cannot read it"):
        open_index([root], root.parent / "index", processes=2)


@pytest.mark.parametrize("time_ns", [-(10**18), 2**62 * 2 - 1, 17 * 10**18])
def test_times_far_away_are_kept(tmp_path, time_ns):
    _pair(tmp_path / "set/1.png", b'{"tags": "x"}')
    try:
        os.utime(tmp_path / "set/1.json", ns=(time_ns, time_ns))
    except (OSError, OverflowError):
        pytest.skip("this file system has no such time")
    open_index([tmp_path / "set"], tmp_path / "index")
    assert open_index([tmp_path / "set"], tmp_path / "index").update == Update(kept=1)


@given(st.sets(st.text("ab/\u00e9", max_size=6)), st.sets(st.text("ab/\u00e9", max_size=6)), st.integers(0, 3))
def test_paths_are_matched_like_a_dictionary_would(new, old, skipped):
    def flat(paths):
        encoded = sorted(path.encode() for path in paths)
        ends = np.concatenate([[0], np.cumsum([len(path) for path in encoded], dtype=np.int64)]).astype(np.int64)
        return encoded, np.frombuffer(b"".join(encoded), dtype=np.uint8), ends

    new_paths, new_bytes, new_ends = flat(new)
    old_paths, old_bytes, old_ends = flat(old)
    skipped = min(skipped, len(old_paths))
    places = {path: place for place, path in enumerate(old_paths[skipped:])}
    found = match_paths(new_bytes, new_ends, old_bytes, old_ends[skipped:])
    assert found.tolist() == [places.get(path, -1) for path in new_paths]


class UpdatedIndex(RuleBasedStateMachine):
    """Files come, change and go in any order; after each step the index is that of a fresh build."""

    folders = st.sampled_from(["", "b", "b/c", "b.d", "a"])
    stems = st.sampled_from(["1", "2", "b", "\u00e9"])
    contents = st.one_of(
        st.builds(
            lambda tags, rating, name: orjson.dumps({"tags": tags, "rating": rating, "filename": name}),
            st.lists(st.sampled_from(TAGS), max_size=4),
            st.sampled_from([None, "g", 2, "odd", "explicit"]),
            st.sampled_from([None, "1.png", "b.jpg"]),
        ),
        st.sampled_from([b"", b"{}", b'{"tags": "one two"}', b'{"tags": "a", "tags": "b"}', b'{"tags": "rating:g x"}']),
    )

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.no_sync = mock.patch("os.fsync")  # most of the time of so small an index
        self.no_sync.start()
        self.time_ns = 0
        _pair(self.home / "set/0.png", b'{"tags": "first"}')

    def teardown(self) -> None:
        self.no_sync.stop()
        shutil.rmtree(self.home)

    @rule(folder=folders, stem=stems, suffix=st.sampled_from(["png", "jpg"]), content=contents)
    def add(self, folder, stem, suffix, content):
        self.time_ns += 1
        _pair(self.home / "set" / folder / f"{stem}.{suffix}", content, self.time_ns)

    @rule(data=st.data(), content=contents)
    def change(self, data, content):
        self.time_ns += 1
        _write(data.draw(st.sampled_from(self._files("*.json"))), content, self.time_ns)

    @rule(data=st.data())
    def remove(self, data):
        path = data.draw(st.sampled_from(self._files("*.*")))
        if path.name != "0.png" and path.name != "0.json":
            path.unlink()

    def _files(self, pattern: str) -> list[Path]:
        return sorted(path for path in (self.home / "set").rglob(pattern) if path.is_file())

    @invariant()
    def the_same_as_anew(self) -> None:
        if not (self.home / "set/0.json").read_bytes().startswith(b'{"tags": "first'):
            _write(self.home / "set/0.json", b'{"tags": "first"}', 0)
        updated = open_index([self.home / "set"], self.home / "index")
        anew = open_index([self.home / "set"], self.home / "anew")
        assert _content(updated) == _content(anew)
        assert updated.update is not None and anew.update is not None
        assert updated.update.kept + updated.update.num_read == anew.update.new
        shutil.rmtree(self.home / "anew")


TestUpdatedIndex = UpdatedIndex.TestCase
TestUpdatedIndex.settings = settings(max_examples=10, stateful_step_count=8, deadline=None)
