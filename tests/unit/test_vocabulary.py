"""The vocabulary: which tags, in which order, tied to their hash; and its command."""

import hashlib
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tagger.data.index import open_index
from tagger.files import FormatError
from vocabulary import (
    TagVocabulary,
    VocabularyError,
    build_vocabulary,
    create_vocabulary_from_datasets,
    main,
    read_categories_file,
    read_ignore_file,
)


def _dataset(root: Path, rows: list[tuple[object, object]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, (tags, rating) in enumerate(rows):
        (root / f"{number}.png").touch()
        (root / f"{number}.json").write_bytes(
            orjson.dumps({"tags": tags, "rating": rating, "makers": f"m{number % 2}"})
        )
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = [(["sky"], "g"), (["sky", "tree"], "g"), (["tree", "sky", "robin"], "s"), (["robin", "ant"], None)]
    return _dataset(tmp_path / "set", rows)


def _create(root: Path, *arguments: object, **options: object) -> TagVocabulary:
    return create_vocabulary_from_datasets([root], *arguments, index_dir=root.parent / "index", **options)


def test_tags_are_ordered_by_category_then_count_then_name(root):
    vocabulary = _create(root, 1, categories={"robin": "character", "ant": "artist"})
    assert vocabulary.tags == ("rating:general", "rating:sensitive", "sky", "tree", "robin", "ant")
    assert vocabulary.counts.tolist() == [2, 1, 3, 2, 2, 1] and vocabulary.counts.dtype == np.int64
    assert vocabulary.categories == ("rating", "rating", "general", "general", "character", "artist")
    assert vocabulary.rating_indices == (0, 1)
    assert len(vocabulary) == 6 and "sky" in vocabulary and "sea" not in vocabulary
    assert all(vocabulary.index(vocabulary.tag(i)) == i == vocabulary.get(vocabulary.tag(i)) for i in range(6))
    assert vocabulary.sha256 == hashlib.sha256("\n".join(vocabulary.tags).encode()).hexdigest()


def test_options_choose_the_tags(root):
    assert _create(root, 2).tags == ("rating:general", "sky", "robin", "tree")
    assert _create(root, 2, ["sky", "rating:general"]).tags == ("robin", "tree")
    assert _create(root, 3, ratings="ignore").tags == ("sky",)
    assert _create(root, 2, (), ["makers"], "ignore").tags == ("sky", "maker:m0", "maker:m1", "robin", "tree")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=5), st.sampled_from(["g", "s", "q", "e", None])
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_counts_are_those_of_a_plain_count(tmp_path_factory, rows, min_frequency):
    folder = tmp_path_factory.mktemp("counted")
    expected = Counter(tag for tags, _ in rows for tag in set(tags))
    expected = {tag: count for tag, count in expected.items() if count >= min_frequency}
    index = open_index([_dataset(folder / "set", rows)], folder / "index")
    if not expected:
        with pytest.raises(VocabularyError, match="no tag occurs"):
            build_vocabulary(index, min_frequency, ratings="ignore")
        return
    vocabulary = build_vocabulary(index, min_frequency, ratings="ignore")
    assert dict(zip(vocabulary.tags, vocabulary.counts.tolist(), strict=True)) == expected
    assert list(vocabulary.tags) == sorted(expected, key=lambda tag: (-expected[tag], tag))


def test_a_rating_with_one_value_is_dropped_with_a_warning(tmp_path, caplog):
    root = _dataset(tmp_path / "set", [(["sky"], "g"), (["sky"], 0), (["sky"], None)])
    with caplog.at_level(logging.WARNING):
        assert _create(root, 1).tags == ("sky",)
    assert "every rated image (2) is general" in caplog.text


def test_no_tag_left_says_what_was_found(root):
    with pytest.raises(ValueError, match="found 6 distinct tags, the most frequent 'sky' has count 3; lower") as caught:
        _create(root, 50)
    assert str(caught.value).startswith("no tag occurs at least 50 times")
    assert str(caught.value).endswith("vocabulary.min_frequency to 3 or less")
    with pytest.raises(VocabularyError, match="ignore list covers every tag"):
        _create(root, 1, ["sky", "tree", "robin", "ant"], ratings="ignore")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "min_frequency=0 is below 1"), ((1, "sky"), "is one text"), ((1, (), (), "some"), "use tags or ignore")],
)
def test_arguments_that_cannot_work_are_refused(root, arguments, message):
    with pytest.raises(VocabularyError, match=message):
        _create(root, *arguments)


def test_an_unknown_tag_names_the_nearest():
    vocabulary = TagVocabulary.from_counts({"blue_hair": 3, "red_ball": 2})
    with pytest.raises(ValueError, match="tag 'blu_hair' is not in the vocabulary of 2 tags; did you mean 'blue_hair'"):
        vocabulary.index("blu_hair")
    with pytest.raises(ValueError, match=r"2 tags$"):
        vocabulary.index("zzzz")
    assert vocabulary.get("blu_hair") is None
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"not in 0\.\.1"):
            vocabulary.tag(index)


@pytest.mark.parametrize("tags", [[], ["a", "a"], ["a", ""], ["a\nb", "c"], [" a", "b"]])
def test_lists_that_are_no_vocabulary_are_refused(tags):
    with pytest.raises(VocabularyError):
        TagVocabulary(tags, [1] * len(tags), ["general"] * len(tags))


def test_counts_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        TagVocabulary.from_counts({"a": 1}).counts[0] = 2


_NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(_NAMES, st.integers(0, 2**40), min_size=1, max_size=8))
def test_a_saved_vocabulary_loads_equal(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("saved") / "vocabulary.json"
    vocabulary = TagVocabulary.from_counts(counts, dict.fromkeys(list(counts)[:2], "character"))
    vocabulary.save(path)
    loaded = TagVocabulary.load(path)
    assert loaded == vocabulary and loaded.sha256 == vocabulary.sha256


def test_the_file_has_the_agreed_form(tmp_path):
    path = tmp_path / "vocabulary.json"
    TagVocabulary.from_counts({"sky": 5, "rating:explicit": 1}).save(path)
    assert orjson.loads(path.read_bytes()) == {
        "format_version": 1,
        "sha256": "c6e75d3e554df0f2534b2c313f6c34832a1b71173182388ec0855c877a44d1d8",
        "tags": [
            {"name": "rating:explicit", "category": "rating", "count": 1},
            {"name": "sky", "category": "general", "count": 5},
        ],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": [{"name": "sea", "category": "general", "count": 5}]}, "does not match its sha256"),
        ({"sha256": None}, "does not match its sha256"),
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": None}, "no format_version"),
        ({"tags": []}, "at least one tag"),
        ({"tags": 5}, "has not the form"),
        ({"tags": ["sky"]}, "has not the form"),
        ({"tags": [{"name": "sky"}]}, "has not the form"),
        ({"tags": [{"name": 3, "category": "general", "count": 5}]}, "has not the form"),
        ({"tags": [{"name": "sky", "category": "general", "count": "5"}]}, "has not the form"),
        ({"tags": [{"name": "sky", "category": 0, "count": 5}]}, "has not the form"),
    ],
)
def test_a_changed_or_newer_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "vocabulary.json"
    TagVocabulary.from_counts({"sky": 5}).save(path)
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **change}))
    with pytest.raises(FormatError, match=message) as caught:
        TagVocabulary.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FormatError, match=r"gone\.json does not exist"):
        TagVocabulary.load(tmp_path / "gone.json")


def test_vocabularies_of_other_trainers_are_read_without_their_placeholders(tmp_path):
    path = tmp_path / "vocabulary.json"
    names = ["<PAD>", "<UNK>", "tree", "rating:general", "sky"]
    numbers = {name: index for index, name in enumerate(names)}
    for content in (
        {"tag_to_index": dict(reversed(numbers.items())), "tag_frequencies": {"tree": 9, "sky": 4}},
        {
            "index_to_tag": {str(index): name for name, index in numbers.items()},
            "tag_frequencies": {"tree": 9, "sky": 4},
        },
    ):
        path.write_bytes(orjson.dumps(content))
        vocabulary = TagVocabulary.load(path)
        assert vocabulary.tags == ("tree", "rating:general", "sky")
        assert vocabulary.counts.tolist() == [9, 0, 4] and vocabulary.rating_indices == (1,)
    for content in ({"tag_to_index": {"a": 0, "b": 0}}, {"tag_to_index": {"a": "x"}}, {"index_to_tag": ["a"]}):
        path.write_bytes(orjson.dumps(content))
        with pytest.raises(FormatError, match=r"vocabulary\.json"):
            TagVocabulary.load(path)


def test_lists_of_tags_are_read_and_their_faults_named_with_the_line(tmp_path):
    ignore = tmp_path / "ignore.txt"
    ignore.write_text("\ufeff# not wanted\n\n  sky \nred ball\nsky\n", encoding="utf-8")
    assert read_ignore_file(ignore) == ("sky", "red ball")
    table = tmp_path / "categories.csv"
    table.write_text('name,category\nrobin,Character\n"a, b",general\nrating:general,9\n')
    assert read_categories_file(table) == {"robin": "character", "a, b": "general", "rating:general": "rating"}
    table.write_text("tag_id,name,category,count\n1,robin,4,5\n")  # the table that published models carry
    assert read_categories_file(table) == {"robin": "character"}
    for content, message in (
        ("robin,character\n", "no column category and name"),
        ("name,category\nrobin,character\nrobin,artist\n", "line 3: 'robin' is artist here and character before"),
        ("name,category\nrobin\n", "line 2: 'robin,' is not a tag and its category"),
        ("name,category\nrobin,7\n", "line 2: 'robin,7'"),
        ("name,category\nrobin,rating\n", "line 2: the category rating is that of"),
        ("", "no column"),
    ):
        table.write_text(content)
        with pytest.raises(VocabularyError, match=message):
            read_categories_file(table)
    with pytest.raises(VocabularyError, match=r"vocabulary\.ignore_file: cannot read"):
        read_ignore_file(tmp_path / "gone.txt")
    ignore.write_bytes(b"caf\xe9")
    with pytest.raises(VocabularyError, match="not UTF-8 text"):
        read_ignore_file(ignore)


def test_the_command_writes_the_vocabulary_that_the_function_gives(root, tmp_path, capsys):
    (tmp_path / "ignore.txt").write_text("ant\n")
    (tmp_path / "categories.csv").write_text("name,category\nrobin,character\n")
    output = tmp_path / "out/vocabulary.json"
    words = [str(root), "--min-frequency", "1", "--output", str(output), "--index-dir", str(tmp_path / "index")]
    words += ["--ignore-file", str(tmp_path / "ignore.txt"), "--categories-file", str(tmp_path / "categories.csv")]
    assert main([*words, "--extra-fields", "makers", "--ratings", "ignore"]) == 0
    expected = _create(root, 1, ["ant"], ["makers"], "ignore", categories={"robin": "character"})
    assert TagVocabulary.load(output) == expected
    printed = capsys.readouterr().out
    assert "4 images with 6 distinct tags" in printed and "5 tags (4 general, 1 character)" in printed
    annotations = tmp_path / "tags.json"
    annotations.write_bytes(b'{"0.png": ["sun"]}')
    assert main([*words[:7], "--annotations", str(annotations)]) == 0
    assert TagVocabulary.load(output).tags == ("sun",)


def test_the_command_fails_with_one_line_and_exit_code_2(root, tmp_path):
    script = Path(__file__).parents[2] / "vocabulary.py"
    words = ["--min-frequency", "99", "--output", "v.json"]
    for folder, message in ((root, "error: no tag occurs at least 99 times"), ("nowhere", "error: data.roots: ")):
        command = [sys.executable, str(script), str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert not done.stdout and not (tmp_path / "v.json").exists()


def test_help_shows_the_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "python vocabulary.py data/demo --min-frequency 20 --output vocabulary.json" in " ".join(
        capsys.readouterr().out.split()
    )
