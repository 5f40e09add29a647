"""Ontologies: what is read, what is refused and where, and the arrays that come of it."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import orjson
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orientation_handler import OrientationError, OrientationHandler
from scripts.demo_scene import sample_scene, tags_of
from tagger import ontology_file
from tagger.data.closed_counts import closed_counts
from tagger.data.index import open_index
from tagger.errors import InputError
from tagger.files import FormatError, NewerFormatError
from tagger.ontology import Ontology, OntologyError, close_up, expand, relate
from tagger.ontology_file import read_ontology, require_unchanged
from vocabulary import TagVocabulary, build_vocabulary, main, tag_shares

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = """\
format_version: 1
aliases:
  kitty: cat
  kit: kitty
  no: night
implications:
  cat: animal
  tabby: [cat, striped, striped]
exclusive:
  - [day, night]
flip_pairs:
  - [waving_left, waving_right]
"""
NAMES = "abcdefgh"


def write(folder: Path, text: str, name: str = "tags.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read_ontology(write(folder, text))
    message = str(caught.value)
    assert message.startswith(f"ontology {folder / 'tags.yaml'}") and "\n" not in message
    return message


@st.composite
def ontologies(draw: st.DrawFn) -> Ontology:
    """Implications from later letters to earlier ones, and aliases in capitals."""
    implications = {}
    for number, child in enumerate(NAMES[1:], start=1):
        if parents := draw(st.lists(st.sampled_from(NAMES[:number]), unique=True, max_size=3)):
            implications[child] = tuple(parents)
    return Ontology({alias: draw(st.sampled_from(NAMES)) for alias in "XYZ"}, implications)


def closure_by_hand(ontology: Ontology, tags: set[str]) -> set[str]:
    closed = {ontology.canonical(tag) for tag in tags}
    while True:
        more = closed | {parent for tag in closed for parent in ontology.implications.get(tag, ())}
        if more == closed:
            return closed
        closed = more


@pytest.mark.parametrize("loader", [ontology_file._Loader, yaml.BaseLoader])  # yaml's C library may be missing
def test_what_a_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: type) -> None:
    monkeypatch.setattr(ontology_file, "_Loader", loader)
    ontology = read_ontology(write(tmp_path, EXAMPLE))
    assert ontology.aliases == {"kitty": "cat", "kit": "cat", "no": "night"}
    assert ontology.closed("kit") == ("cat", "animal") and ontology.closed("tabby")[0] == "tabby"
    assert set(ontology.closed("tabby")) == {"tabby", "cat", "animal", "striped"}
    assert ontology.closed("unheard_of") == ("unheard_of",)
    assert ontology.exclusive == (("day", "night"),) and ontology.flip_pairs == (("waving_left", "waving_right"),)
    line = ontology.describe(["kitty", "day", "sky"])
    assert "3 aliases, 2 tags with implications" in line and "7 of its 11 tags are on no image, e.g. kit, night" in line


def test_json_is_read_too_and_a_saved_copy_is_the_same(tmp_path: Path) -> None:
    ontology = read_ontology(write(tmp_path, EXAMPLE))
    ontology.save(tmp_path / "copy.json")
    copy = read_ontology(tmp_path / "copy.json")
    assert copy == ontology and copy.sha256 == ontology.sha256
    plain = {"format_version": 1, "aliases": {"ein Kätzchen 🐈": "cat"}, "implications": {"cat": ["animal"]}}
    found = read_ontology(write(tmp_path, json.dumps(plain, ensure_ascii=False, indent="\t")))
    assert found.closed("ein Kätzchen 🐈") == ("cat", "animal")


def test_the_hash_is_of_what_is_said_and_not_of_how(tmp_path: Path) -> None:
    detour = "format_version: 1\nimplications:\n  a: b\n  b: c\n"
    other = "format_version: 1\nimplications: {b: [c], a: [c, b]}\nexclusive:\n"
    assert (
        read_ontology(write(tmp_path, detour)).sha256 == (changed := read_ontology(write(tmp_path, other, "o"))).sha256
    )
    assert changed.sha256 != read_ontology(write(tmp_path, detour.replace("b: c", "b: d"))).sha256
    require_unchanged(tmp_path / "o", tmp_path / "o")
    with pytest.raises(OntologyError, match=r"tags\.yaml has changed since this run started"):
        require_unchanged(tmp_path / "tags.yaml", tmp_path / "o")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("alias: {a: b}", r"line 2: unknown section 'alias'; did you mean 'aliases'"),
        ("aliases: {a: b}\naliases: {c: d}", r"line 3: section 'aliases' is there twice"),
        ("aliases:\n  a: b\n  a: c", r"line 4: aliases: 'a' has an entry in line 3 already"),
        ("aliases:\n  a: b\n  b: c\n  c: a", r"line 3: aliases go in a circle: 'a' -> 'b' -> 'c' -> 'a'"),
        ("aliases: {a: a}", r"line 2: aliases go in a circle: 'a' -> 'a'"),
        ("aliases: {a: [b]}", r"line 2: aliases: an entry is a list or a table"),
        ("aliases: [a, b]", r"line 2: aliases is no table; .* e\.g\. kitty: cat"),
        ("aliases: {a: ' b'}", r"line 2: aliases: ' b' is not a tag"),
        ("aliases: {a: }", r"line 2: aliases: '' is not a tag"),
        ("aliases: {a: rating:general}", r"line 2: aliases: 'rating:general' is a rating"),
        ("implications:\n  a: b\n  b: [c]\n  c: a", r"in a circle: 'a' -> 'b' -> 'c' -> 'a'; remove one"),
        ("implications: {a: a}", r"line 2: implications: 'a' implies itself"),
        ("implications: {rating:explicit: a}", r"is a rating"),
        ("aliases: {old: a}\nimplications:\n  b: old", r"line 4: implications: 'old' is an alias; write its tag, 'a'"),
        ("aliases: {old: a}\nimplications:\n  old: b", r"line 4: implications: 'old' is an alias"),
        ("aliases: {old: a}\nexclusive: [[old, b]]", r"line 3: exclusive: 'old' is an alias"),
        ("exclusive: [[a]]", r"line 2: exclusive: a group has two or more different tags"),
        ("exclusive: [[a, b, a]]", r"line 2: exclusive: a group has two or more"),
        ("exclusive: [a, b]", r"line 2: exclusive: a group has"),
        ("exclusive: {a: b}", r"line 2: exclusive is no list"),
        ("implications: {a: b}\nexclusive:\n- [a, c]\n- [a, b]", r"line 5: exclusive: 'a' implies 'b', so they cannot"),
        ("implications: {a: [b, c]}\nexclusive: [[b, c]]", r"line 3: exclusive: 'a' implies 'b' and 'c'"),
        ("flip_pairs: [[a, a]]", r"line 2: flip_pairs: a group has two different tags"),
        ("flip_pairs:\n- [a, b]\n- [b, c]", r"line 4: flip_pairs: 'b' has a mirror in line 3 already"),
        ("aliases: {a: b", r"is not valid YAML: .* line 3.*; quote tags"),
        ('aliases: {a: "\\ud83d"}', r"not valid YAML|half a character"),
        ("aliases: {a: &x b, c: *x}", r"line 2: '\*x' points to another place"),
        ("aliases: {a: b}\n---\naliases: {a: b}", r"line 4: another document begins"),
        ("exclusive: [[[a, b]]]", r"line 2: lists and tables are nested too deeply"),
        ("sha256: 00", r"does not match its sha256: it was changed"),
    ],
)
def test_faults_are_refused_in_one_line_that_says_where(tmp_path: Path, body: str, message: str) -> None:
    assert re.search(message, refusal(tmp_path, f"format_version: 1\n{body}\n"))


def test_versions_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "begin it with format_version: 1" in refusal(tmp_path, "aliases: {a: b}")
    assert "line 1: format_version is 'x'; expected 1" in refusal(tmp_path, "format_version: x")
    assert "it has no sections" in refusal(tmp_path, "- a")
    assert "it has no sections" in refusal(tmp_path, "")
    with pytest.raises(NewerFormatError, match="has format_version 2, this program reads up to 1"):
        read_ontology(write(tmp_path, "format_version: 2\nnovelty: 3"))
    with pytest.raises(OntologyError, match="does not exist"):
        read_ontology(tmp_path / "nowhere.yaml")
    (tmp_path / "latin").write_bytes(b"format_version: 1\naliases: {caf\xe9: b}")
    with pytest.raises(OntologyError, match="is not UTF-8 text"):
        read_ontology(tmp_path / "latin")


def test_long_chains_are_followed_and_endless_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = "".join(f"  t{n}: t{n + 1}\n" for n in range(1000))
    ontology = read_ontology(write(tmp_path, f"format_version: 1\nimplications:\n{chain}aliases:\n  a0: t0\n"))
    assert len(ontology.closed("a0")) == 1001
    monkeypatch.setattr("tagger.ontology.MAX_CLOSURE_PAIRS", 100_000)
    assert "more than 100,000 things" in refusal(tmp_path, f"format_version: 1\nimplications:\n{chain}")


@given(ontologies(), st.sets(st.sampled_from(NAMES + "XYZ")))
def test_closure_is_that_of_a_plain_loop_and_closing_twice_changes_nothing(ontology: Ontology, tags: set[str]) -> None:
    closed = {name for tag in tags for name in ontology.closed(tag)}
    assert closed == closure_by_hand(ontology, tags)
    assert {name for tag in closed for name in ontology.closed(tag)} == closed


@given(ontologies(), st.permutations(NAMES), st.integers(0, 2**32 - 1))
def test_closed_scores_are_the_highest_of_all_descendants(ontology: Ontology, order: list[str], seed: int) -> None:
    outputs = order[:6]  # two tags are no outputs; what they pass on stays
    relations = relate(ontology, outputs)
    scores = np.random.default_rng(seed).random((3, 6)).astype(np.float32)
    closed = close_up(scores, relations)
    for column, tag in enumerate(outputs):
        below = [i for i, other in enumerate(outputs) if tag in ontology.closed(other)]
        assert np.array_equal(closed[:, column], scores[:, below].max(axis=1))
    assert np.array_equal(close_up(closed, relations), closed) and closed.dtype == np.float32
    decisions = close_up(scores > 0.7, relations)
    assert np.array_equal(decisions, closed > 0.7)


def test_relations_leave_out_what_is_no_output() -> None:
    ontology = Ontology({"X": "a"}, {"b": ("a",), "c": ("b",)}, (("d", "e", "f"), ("d", "g")))
    relations = relate(ontology, ["c", "e", "a", "d"])
    assert relations.child.tolist() == [0] and relations.parent.tolist() == [2]
    assert relations.num_groups == 1 and relations.group(0) == (3, 1)
    nothing = relate(Ontology(), ["c"])
    assert nothing.num_groups == 0 and close_up(np.ones((1, 1)), nothing).tolist() == [[1]]
    with pytest.raises(OntologyError, match="the model has the tag 'X', which the ontology makes an alias of 'a'"):
        relate(ontology, ["X"])


def _dataset(root: Path, rows: list[list[str]]) -> Path:
    root.mkdir(parents=True)
    for number, tags in enumerate(rows):
        (root / f"{number}.png").touch()
        (root / f"{number}.json").write_bytes(orjson.dumps({"tags": tags, "rating": "gs"[number % 2]}))
    return root


@settings(max_examples=25)
@given(
    ontologies(),
    st.lists(st.lists(st.sampled_from(NAMES + "XYZ"), min_size=1, max_size=5, unique=True), min_size=1, max_size=9),
)
def test_counts_are_those_of_closed_rows(
    tmp_path_factory: pytest.TempPathFactory, ontology: Ontology, rows: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("counted")
    index = open_index([_dataset(folder / "set", rows)], folder / "index")
    closed = [closure_by_hand(ontology, set(tags)) for tags in rows]
    expected = {tag: sum(tag in row for row in closed) for tag in itertools.chain(*closed)}
    assert closed_counts(index, ontology) == expected
    vocabulary = build_vocabulary(index, 1, ratings="ignore", ontology=ontology)
    assert dict(zip(vocabulary.tags, vocabulary.counts.tolist(), strict=True)) == expected
    assert tag_shares(index, vocabulary, ontology) == pytest.approx(vocabulary.counts / len(rows))


def test_a_tag_that_only_implications_give_is_learnt_and_an_ignored_alias_is_its_tag(tmp_path: Path) -> None:
    index = open_index([_dataset(tmp_path / "set", [["kitty"], ["cat", "day"], ["kit", "cat"]])], tmp_path / "index")
    ontology = read_ontology(write(tmp_path, EXAMPLE))
    vocabulary = build_vocabulary(index, 2, ontology=ontology)
    assert vocabulary.tags == ("rating:general", "animal", "cat") and vocabulary.counts.tolist() == [2, 3, 3]
    assert build_vocabulary(index, 1, ["kit"], "ignore", ontology=ontology).tags == ("animal", "day")


def test_the_vocabulary_command_takes_an_ontology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _dataset(tmp_path / "set", [["kitty"], ["cat"]])
    words = [str(root), "--min-frequency", "1", "--index-dir", str(tmp_path / "index")]
    words += ["--output", str(tmp_path / "v.json"), "--ontology-file", str(write(tmp_path, EXAMPLE))]
    assert main(words) == 0
    assert TagVocabulary.load(tmp_path / "v.json").tags[-2:] == ("animal", "cat")
    assert "tags are on no image" in capsys.readouterr().out
    write(tmp_path, EXAMPLE.replace("kit: kitty", "cat: kitty"))
    assert main(words) == 2
    assert "aliases go in a circle" in capsys.readouterr().err


def handler(ontology: Ontology, folder: Path, mode: str = "balanced", **sections: object) -> OrientationHandler:
    path = write(folder, json.dumps({"format_version": 1, **sections}), "map.json")
    return OrientationHandler(path, mode, ontology)


def test_flip_pairs_join_the_map_and_may_not_contradict_it(tmp_path: Path) -> None:
    pair = Ontology(flip_pairs=(("west", "east"),))
    assert handler(pair, tmp_path).mirror_tag("east") == "west"
    assert handler(pair, tmp_path, explicit_mappings={"west": "east"}).mirror_tag("west") == "east"
    assert not handler(Ontology(flip_pairs=(("sock left", "sock right"),)), tmp_path, "conservative").blocks(
        "sock left"
    )
    with pytest.raises(OrientationError, match=r"'west' becomes 'east', but in orientation map .* it becomes 'ost'"):
        handler(pair, tmp_path, explicit_mappings={"west": "ost"})
    with pytest.raises(OrientationError, match=r"'east' becomes 'west', but in .* it becomes 'east'; keep one"):
        handler(pair, tmp_path, symmetric_tags=["east"])


def test_implications_and_mirroring_must_not_depend_on_their_order(tmp_path: Path) -> None:
    lopsided = Ontology(implications={"sock_left": ("sock",)})
    with pytest.raises(OntologyError, match="'sock_left' implies 'sock', so its mirror 'sock_right' must imply 'sock'"):
        handler(lopsided, tmp_path)
    handler(lopsided, tmp_path, "conservative")  # there images with such tags are not mirrored
    handler(lopsided, tmp_path, skip_flip_tags=["sock_left", "sock_right"])
    handler(Ontology(implications={"sock_left": ("sock",), "sock_right": ("sock",)}), tmp_path)
    renamed = Ontology(
        {"sock_right": "right_sock"}, {"sock_left": ("sock",), "left_sock": ("sock",), "right_sock": ("sock",)}
    )
    with pytest.raises(OntologyError, match=r"'sock_left' becomes 'sock_right' .* an alias of 'right_sock'"):
        handler(renamed, tmp_path)


def test_a_tag_forbids_the_mirror_by_what_it_implies(tmp_path: Path) -> None:
    ontology = Ontology(
        {"sign": "board", "txt": "text"}, {"board": ("text",), "a left": ("b left",), "a right": ("b right",)}
    )
    vocabulary = TagVocabulary.from_counts({"board": 1, "text": 1, "b left": 1})
    found = handler(ontology, tmp_path, skip_flip_tags=["text"])
    # "a left" and its mirror are not learnt, "b left" is and its mirror is not: the label would be lost.
    names = ["sign", "board", "txt", "sky", "a left", "a right"]
    assert found.forbids(names, vocabulary).tolist() == [True, True, True, False, True, True]
    plain = handler(Ontology(), tmp_path, skip_flip_tags=["text"])
    assert np.array_equal(plain.forbids(names, vocabulary), plain.vetoes(names, vocabulary) != 0)
    by_alias = handler(Ontology({"sign": "board"}), tmp_path, skip_flip_tags=["sign"])
    assert by_alias.forbids(["sign", "board"], vocabulary).tolist() == [True, False]


SIDES = ["cup_left", "cup_right", "cup", "mug_left", "mug_right", "thing", "lamp"]


@given(st.sets(st.sampled_from(SIDES)), st.permutations(SIDES), st.integers(1, 7))
def test_mirroring_commutes_with_closing(tags: set[str], order: list[str], num_outputs: int) -> None:
    ontology = Ontology(
        {},
        {
            "mug_left": ("cup_left",),
            "mug_right": ("cup_right",),
            "cup_left": ("cup",),
            "cup_right": ("cup",),
            "cup": ("thing",),
        },
        flip_pairs=(("mug_left", "mug_right"),),
    )
    rules = OrientationHandler(None, "balanced", ontology)
    vocabulary = TagVocabulary.from_counts(dict.fromkeys(order[:num_outputs], 1))
    if rules.forbids(sorted(tags), vocabulary).any():
        return
    mirror_of = rules.compile(vocabulary).mirror_of

    def outputs_of(names: set[str]) -> set[int]:
        found = expand(ontology, sorted(names), vocabulary.get)
        return set(found.values.tolist())

    mirrored_after = {int(mirror_of[output]) for output in outputs_of(tags)}
    assert mirrored_after == outputs_of({rules.mirror_tag(tag) for tag in tags})


def test_the_demos_ontology_is_true_of_its_scenes_and_fits_the_map() -> None:
    ontology = read_ontology(ROOT / "configs" / "demo_ontology.yaml")
    seen: set[str] = set()
    for number in range(400):
        tags = set(tags_of(sample_scene(f"ontology/{number}", transparent=False)))
        assert {name for tag in tags for name in ontology.closed(tag)} == tags
        assert all(len(tags & set(group)) <= 1 for group in ontology.exclusive)
        seen |= tags
    assert not ontology.tags - seen - ontology.aliases.keys()
    for mode in ("conservative", "balanced", "permissive"):
        rules = OrientationHandler(ROOT / "configs" / "orientation_map.json", mode, ontology)
        assert rules.mirror_tag("arrow_left") == "arrow_right"


def test_a_vocabulary_file_with_aliases_is_refused(tmp_path: Path) -> None:
    from Configuration_System import VocabularySection
    from vocabulary import configured_vocabulary

    index = open_index([_dataset(tmp_path / "set", [["kitty"]])], tmp_path / "index")
    TagVocabulary.from_counts({"kitty": 1}).save(tmp_path / "v.json")
    section = VocabularySection(file=str(tmp_path / "v.json"))
    ontology = read_ontology(write(tmp_path, EXAMPLE))
    with pytest.raises(OntologyError, match=r"vocabulary\.file: .* has the tag 'kitty', which .* an alias of 'cat'"):
        configured_vocabulary(section, index, ontology)
    with pytest.raises(FormatError, match="does not exist"):
        configured_vocabulary(VocabularySection(file=str(tmp_path / "none.json")), index, ontology)
