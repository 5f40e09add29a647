"""Parsing many sidecars in flat arrays says what `parse_sidecar` says of each."""

import errno
import json
import os
import tempfile
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tagger.data.scan import DatasetError
from tagger.data.sidecar import MAX_SIDECAR_BYTES, RATINGS, SidecarError, parse_extra_fields, parse_sidecar
from tagger.data.sidecar_rows import FileReader, ReadFiles, SidecarParser, _RepeatFinder
from tagger.rng import stable_id

FIELDS = parse_extra_fields(["categories", "artist=by"])

_names = st.sampled_from(
    ["sun", " sun", "sky", "SKY", "", "rating:g", "rating:odd", "\u00a0sea", "a:b", ":d", "\u2028"]
)
_tags = st.one_of(
    st.lists(_names, max_size=5),
    st.lists(_names, max_size=4).map(", ".join),
    st.lists(_names, max_size=4).map(" ".join),
    st.lists(st.one_of(_names, st.sampled_from([None, 1, True, [], {}])), max_size=3),
    st.sampled_from([None, 3, {}, True]),
)
_ratings = st.sampled_from([None, "g", "Safe ", "odd", 0, 3, 1.0, 4, True, False, [], {}, ""])
_entries = st.fixed_dictionaries(
    {}, optional={"tags": _tags, "rating": _ratings, "categories": _tags, "artist": _tags, "filename": _names}
).map(lambda entry: json.dumps(entry).encode())
_contents = st.one_of(
    _entries,
    st.tuples(_entries, _entries).map(lambda pair: pair[0].replace(b"}", b", ", 1) + pair[1].lstrip(b"{")),
    st.binary(max_size=30),
    st.sampled_from([b"[]", b'"tags"', b"1", b'\xef\xbb\xbf{"tags": ["sun"]}', b'{"tags" : ["a"], "tags" :["a"]}']),
)


class _Given:
    """Stands for a reader of files."""

    def __init__(self, contents):
        self.contents = contents

    def read(self, _root, _paths):
        half = len(self.contents) // 2
        for part in (self.contents[:half], self.contents[half:]):
            yield ReadFiles(list(part), [len(content) for content in part], [7] * len(part))


def _column(values):
    return array("q", values)


@given(st.lists(_contents, max_size=8), st.booleans())
@example([b'{"tags": ["sun", " sun", "sky", "sun"], "artist": "sky"}', b'{"tags": "sea sea"}'], True)
@example([b'{"tags": ["sun"], "rating": true}', b'{"tags": ["sun"], "rating": 1}'], False)
def test_many_at_once_say_what_each_says(contents, with_fields):
    fields = FIELDS if with_fields else ()
    parser = SidecarParser(fields)
    for _ in range(2):  # the second time every text is known
        parser._reader = _Given(contents)
        parsed = parser.parse("root", [f"{number}.json" for number in range(len(contents))])
        names = list(parser._numbers)
        ends = np.cumsum(parsed.counts)
        notes = {place: (kind, text) for place, kind, text in parsed.notes}
        for place, content in enumerate(contents):
            found = tuple(names[i] for i in parsed.tag_ids[ends[place] - parsed.counts[place] : ends[place]])
            try:
                expected = parse_sidecar(content, fields)
            except SidecarError as error:
                assert not found and notes[place] == ("rejected", error.reason)
                continue
            assert found == expected.tags
            assert parsed.ratings[place] == (1 + RATINGS.index(expected.rating) if expected.rating else 0)
            assert notes.get(place) == (None if expected.bad_rating is None else ("rating", expected.bad_rating))
        assert parsed.image_ids.tolist() == [stable_id(str(number)) for number in range(len(contents))]


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=20), st.sampled_from([1, 7, 1 << 22]))
def test_repeats_are_found_whatever_the_number_of_slots(rows, slots):
    finder = _RepeatFinder()
    finder._SLOTS = 1 << (slots.bit_length() - 1)
    ids = np.array([tag for row in rows for tag in row], dtype=np.uint32)
    counts = np.array([len(row) for row in rows], dtype=np.int32)
    ids, counts = finder.without_repeats(ids, counts, 31)
    expected = [list(dict.fromkeys(row)) for row in rows]
    assert counts.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [tag for row in expected for tag in row]


def _read_all(root: Path, names: list[str]) -> list[object]:
    reader = FileReader()
    try:
        return [content for files in reader.read(str(root), names) for content in files.contents]
    finally:
        reader.close()


def test_files_of_every_length_are_read_whole_and_huge_ones_not_at_all(tmp_path):
    sizes = [0, 1, 500, 70_000, MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES + 1, 100 << 20]
    for number, size in enumerate(sizes):
        with (tmp_path / str(number)).open("wb") as stream:
            stream.truncate(size)  # sparse
    *contents, over, huge = _read_all(tmp_path, [str(number) for number in range(len(sizes))])
    assert [len(content) for content in contents] == sizes[:-2]
    assert str(over) == str(huge) == "too large: more than 16 MiB"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert _read_all(tmp_path, ["pipe"]) == [b""]


def test_a_file_that_comes_in_pieces_or_grows_is_read_whole(monkeypatch):
    read = os.read
    monkeypatch.setattr(os, "read", lambda handle, size: read(handle, min(size, 3)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").write_bytes(b"0123456789")
        assert _read_all(Path(folder), ["a"]) == [b"0123456789"]


def test_each_failure_of_the_system_is_told_from_the_others(tmp_path, monkeypatch):
    (missing,) = _read_all(tmp_path, ["missing"])
    assert isinstance(missing, OSError) and missing.errno == errno.ENOENT
    monkeypatch.setattr("tagger.data.sidecar_rows._RETRY_WAITS_S", (0.0,))

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DatasetError, match=r"cannot read .*missing: .*check the disk"):
        _read_all(tmp_path, ["missing"])
