"""Tags of a sidecar change, and every other byte stays."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.correction_log import LastTagError, change_tags
from tagger.data.sidecar import SidecarError, parse_sidecar
from tagger.data.sidecar_edit import edit_sidecar

ADD = [("add", "moon")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"tags":["sun","sea"],"id":12345678901234567890}', '{"tags":["sun","sea","moon"],"id":12345678901234567890}'),
        ('{"x": 1.10, "tags": ["sun"] , "y":"é"}', '{"x": 1.10, "tags": ["sun", "moon"] , "y":"é"}'),
        ('{"tags": ["caf\\u00e9"]}', '{"tags": ["caf\\u00e9", "moon"]}'),
        (
            '{\n  "tags": [\n    "sun",\n    "sea"\n  ]\n}\n',
            '{\n  "tags": [\n    "sun",\n    "sea",\n    "moon"\n  ]\n}\n',
        ),
        ('{"tags": "sun, sea"}', '{"tags": "sun, sea, moon"}'),
        ('{"tags": "sun,sea"}', '{"tags": "sun,sea,moon"}'),
        ('{"tags": "sun sea"}', '{"tags": "sun sea moon"}'),
        ('\ufeff{"tags": ["sun"]}', '\ufeff{"tags": ["sun", "moon"]}'),
        ('{"nested": {"tags": [1]}, "tags": ["sun"]}', '{"nested": {"tags": [1]}, "tags": ["sun", "moon"]}'),
    ],
)
def test_a_tag_is_added_in_the_layout_that_is_there(before, after):
    assert edit_sidecar(before.encode(), ADD).decode() == after


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ('{"tags": [" sun", "sea", "sun"]}', ("remove", "sun"), '{"tags": ["sea"]}'),
        ('{"tags": "red sun, sea"}', ("remove", "sea"), '{"tags": ["red sun"]}'),
        ('{"tags": "sun sea"}', ("add", "red moon"), '{"tags": ["sun", "sea", "red moon"]}'),
        ('{"tags": ["a"], "rating": "g"}', ("add", "rating:explicit"), '{"tags": ["a"], "rating": "explicit"}'),
        ('{"tags": ["a"], "rating": 0}', ("remove", "rating:general"), '{"tags": ["a"], "rating": null}'),
        ('{"tags":["a"]}', ("add", "rating:sensitive"), '{"tags":["a"], "rating": "sensitive"}'),
        ('{"tags": ["a", "rating:safe"]}', ("add", "b"), '{"tags": ["a", "rating:safe", "b"]}'),
        ('{"tags": ["a", "rating:safe"]}', ("remove", "rating:general"), '{"tags": ["a"]}'),
        ('{"tags": ["a"]}', ("add", "a"), '{"tags": ["a"]}'),
    ],
)
def test_tags_and_ratings_come_out_as_wanted(before, change, after):
    assert edit_sidecar(before.encode(), [change]).decode() == after


def test_what_cannot_be_done_is_refused():
    with pytest.raises(SidecarError, match="invalid JSON"):
        edit_sidecar(b'{"tags": [', ADD)
    with pytest.raises(LastTagError, match="'sun' is its only one"):
        edit_sidecar(b'{"tags": ["sun"]}', [("remove", "sun")])


NAMES = st.text('ab é,"\\\n\u2028{}[]:x', min_size=1, max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(NAMES, min_size=1, max_size=5),
    st.dictionaries(NAMES, VALUES, max_size=4),
    st.sampled_from([None, 2, "\t"]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(["a", "b", "new tag", "rating:general"]))),
)
def test_any_sidecar_keeps_its_other_fields_and_gets_its_tags(tags, other, indent, escaped, changes):
    content = json.dumps({**other, "tags": tags}, indent=indent, ensure_ascii=escaped).encode()
    try:
        before = parse_sidecar(content)
        wanted = before.tags, before.rating
        for action, tag in changes:
            wanted = change_tags(*wanted, action, tag) or wanted
    except (SidecarError, LastTagError) as error:
        with pytest.raises(type(error)):
            edit_sidecar(content, changes)
        return
    edited = edit_sidecar(content, changes)
    after = parse_sidecar(edited)
    assert (set(after.tags), after.rating) == (set(wanted[0]), wanted[1])
    left = {key: value for key, value in json.loads(edited).items() if key not in ("tags", "rating")}
    assert left == other
