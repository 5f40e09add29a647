"""Sidecars of every form found in the wild, and what is wrong with the others."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tagger.data.sidecar import (
    MAX_SIDECAR_BYTES,
    RATINGS,
    SidecarError,
    clean_tag,
    parse_entry,
    parse_extra_fields,
    parse_json,
    parse_sidecar,
)


def _tags(value: object) -> tuple[str, ...]:
    return parse_sidecar(orjson.dumps({"tags": value})).tags


def _reason(content: bytes) -> str:
    with pytest.raises(SidecarError) as caught:
        parse_sidecar(content)
    assert str(caught.value) == caught.value.reason and "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["red_ball", "blue_sky"], ("red_ball", "blue_sky")),
        ("red ball, blue sky", ("red ball", "blue sky")),
        ("red_ball  blue_sky\ttree", ("red_ball", "blue_sky", "tree")),
        ([" tree ", "", "tree", "  "], ("tree",)),
        ("tree,,tree, ", ("tree",)),
        (["line\nbreak", "no\u00a0break", "bell\u0007", "del\u007f!"], ("line break", "no break", "bell", "del !")),
        (["two  blanks", "^_^", "\\o/", "日本"], ("two  blanks", "^_^", "\\o/", "日本")),
    ],
)
def test_tags_are_read_in_every_form(value, expected):
    assert _tags(value) == expected
    assert parse_entry({"tags": value}).tags == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("general", "general"),
        ("Sensitive ", "sensitive"),
        ("safe", "general"),
        *zip("gsqe", RATINGS, strict=True),
        *zip(range(4), RATINGS, strict=True),
        (2.0, "questionable"),
        (None, None),
        ("", None),
    ],
)
def test_ratings_are_normalised(value, expected):
    parsed = parse_sidecar(orjson.dumps({"tags": ["tree"], "rating": value}))
    assert parsed.rating == expected and parsed.bad_rating is None


@pytest.mark.parametrize("value", ["unrated", 4, -1, 1.5, True, ["general"], "x" * 500])
def test_a_rating_not_understood_is_said_and_the_row_stays(value):
    parsed = parse_sidecar(orjson.dumps({"tags": ["tree"], "rating": value}))
    assert parsed.tags == ("tree",) and parsed.rating is None
    assert parsed.bad_rating and len(parsed.bad_rating) <= 40


def test_a_rating_among_the_tags_becomes_the_rating_unless_a_field_says_otherwise():
    parsed = parse_sidecar(b'{"tags": ["rating:safe", "tree", "rating:story"]}')
    assert (parsed.tags, parsed.rating) == (("tree", "rating:story"), "general")
    parsed = parse_sidecar(b'{"tags": "tree rating:g", "rating": "e"}')
    assert (parsed.tags, parsed.rating) == (("tree",), "explicit")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b" \n", "empty file"),
        (b'{"tags": [', "invalid JSON: "),
        (b'{"tags": ["tree"], "score": NaN}', "invalid JSON: NaN is not a JSON number"),
        (b'{"tags": ["tree"], "score": -Infinity}', "invalid JSON: -Infinity is not a JSON number"),
        (b'{"tags": ["NaN"], "score": }', "invalid JSON: unexpected"),
        (b'{"tags": ["tree"], "tags": ["sky"]}', "a key given twice: 'tags'"),
        (b'{"tags" :["tree"],"tags" :["tree"]}', "a key given twice: 'tags'"),
        (b'{"t\\u0061gs": ["tree"], "tags": ["sky"]}', "a key given twice: 'tags'"),
        (b'{"tags": ["a:b"], "more": {"x": 1, "x": 1}}', "a key given twice: 'x'"),
        (b'{"tags": ["a"], "more": {"x": ' + b"[" * 900 + b"]" * 900 + b', "x": 1}}', "a key given twice: 'x'"),
        (b'{"tags": ["caf\xe9"]}', "not UTF-8 text: byte 14"),
        ('{"tags": "a"}'.encode("utf-16"), "not UTF-8 text: it starts with a UTF-16 mark"),
        ('{"tags": "a"}'.encode("utf-16-le"), "not UTF-8 text: it looks like UTF-16"),
        ('{"tags": "a"}'.encode("utf-16-be"), "not UTF-8 text: it looks like UTF-16"),
        (b'["tree"]', "not a JSON object: the file holds a list"),
        (b"null", "not a JSON object: the file holds null"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "no 'tags' key"),
        (b'{"tags": []}', "no tags"),
        (b'{"tags": " , "}', "no tags"),
        (b'{"tags": null}', "'tags' is not a list or a string: it is null"),
        (b'{"tags": {"tree": 1}}', "'tags' is not a list or a string: it is an object"),
        (b'{"tags": ["tree", 3]}', "a tag is not a string: tags[1] is a number"),
        (b'{"tags": [null]}', "a tag is not a string: tags[0] is null"),
        (b'{"tags": ["tree", ["sky"]]}', "a tag is not a string: tags[1] is a list"),
        (b'{"tags": ["a", "b", true]}', "a tag is not a string: tags[2] is true or false"),
        (b'{"tags": "' + b"a" * MAX_SIDECAR_BYTES + b'"}', "too large: more than 16 MiB"),
    ],
)
def test_each_fault_has_its_reason(content, reason):
    assert _reason(content).startswith(reason)


def test_a_byte_order_mark_is_passed_over():
    assert parse_sidecar(b'\xef\xbb\xbf{"tags": ["tree"]}').tags == ("tree",)


@pytest.mark.parametrize(
    "content",
    [
        b'{"tags": [":d", "a:b"], "source": "http://x"}',
        b'{"tags" : ["tree", "\\"quoted\\": yes"], "n": {"tags": 1, "m": [{"tags": 2}, {"tags": 3}]}}',
        b'{"tags": "tree", "big": ' + b"1" * 300 + b', "text": "\\\\"}',
    ],
)
def test_keys_that_only_look_repeated_are_taken(content):
    assert parse_sidecar(content).tags


@pytest.mark.parametrize(
    ("field", "prefix"),
    [
        ("categories", "category"),
        ("artists", "artist"),
        ("class", "class"),
        ("genre", "genre"),
        ("series=from", "from"),
    ],
)
def test_extra_fields_get_a_singular_or_a_given_prefix(field, prefix):
    assert parse_extra_fields([field])[0].prefix == prefix


def test_extra_fields_become_prefixed_tags():
    fields = parse_extra_fields(["categories", "artist=by"])
    content = b'{"tags": "sun", "categories": ["food-beverage", "food-beverage"], "artist": "A. Person, B", "n": 1}'
    assert parse_sidecar(content, fields).tags == ("sun", "category:food-beverage", "by:A. Person", "by:B")
    assert parse_sidecar(b'{"tags": [], "categories": "food"}', fields).tags == ("category:food",)
    with pytest.raises(SidecarError, match=r"a tag is not a string: categories\[0\] is a number"):
        parse_sidecar(b'{"tags": "sun", "categories": [4]}', fields)
    with pytest.raises(SidecarError, match="'artist' is not a list or a string: it is a number"):
        parse_sidecar(b'{"tags": "sun", "artist": 4}', fields)


@pytest.mark.parametrize("names", [["tags"], ["rating"], ["mood=rating"], ["=x"], ["x="], [""], ["a", "a=b"]])
def test_extra_fields_that_cannot_work_are_refused(names):
    with pytest.raises(ValueError, match="extra field"):
        parse_extra_fields(names)


def test_filename_is_kept_where_it_is_text():
    assert parse_sidecar(b'{"tags": "sun", "filename": "1.jpg"}').filename == "1.jpg"
    assert parse_sidecar(b'{"tags": "sun", "filename": 1}').filename is None


def _objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    keys = st.sampled_from(['"a"', '"b"', '"tags"', '"\\u0061"', '":"', '"\\\\"', '"\\"\\":"'])
    gap = st.sampled_from(["", " ", "\n"])
    pairs = st.lists(st.tuples(keys, gap, inner).map(lambda p: f"{p[0]}{p[1]}:{p[1]}{p[2]}"), max_size=4)
    return pairs.map(lambda items: "{" + ",".join(items) + "}")


@given(
    _objects(
        st.recursive(
            st.sampled_from(["1", "null", '"x"', '"a\\":"', '":d"', '"\\\\"']),
            lambda inner: st.one_of(_objects(inner), st.lists(inner, max_size=3).map(lambda x: f"[{','.join(x)}]")),
            max_leaves=6,
        )
    )
)
def test_a_key_is_refused_exactly_when_it_comes_twice(text):
    repeated = []

    def note(pairs):
        repeated.append(len(pairs) != len(dict(pairs)))
        return dict(pairs)

    json.loads(text, object_pairs_hook=note)
    try:
        parse_json(text.encode())
    except SidecarError as error:
        assert any(repeated) and error.reason.startswith("a key given twice: ")
    else:
        assert not any(repeated)


@given(st.lists(st.text(max_size=8), max_size=8))
def test_tags_come_out_clean_distinct_and_in_order(values):
    values = [value.encode("utf-8", "ignore").decode() for value in values]
    ratings = {f"rating:{word}" for word in (*RATINGS, *"gsqe", "safe")}
    expected = tuple(dict.fromkeys(tag for tag in map(clean_tag, values) if tag and tag.lower() not in ratings))
    for escaped in (True, False):
        content = json.dumps({"tags": values}, ensure_ascii=escaped).encode()
        if expected:
            found = parse_sidecar(content).tags
            assert found == expected
            assert all(clean_tag(tag) == tag for tag in found)
        else:
            assert _reason(content) == "no tags"


@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), st.text(max_size=4)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["tags", "rating", "filename", "categories"]), inner, max_size=4),
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_no_input_escapes_as_another_error(content):
    try:
        parsed = parse_sidecar(content, parse_extra_fields(["categories"]))
    except SidecarError as error:
        assert error.reason
    else:
        assert parsed.tags and parsed.rating in (None, *RATINGS)
