"""Mirroring: tags swap and come back, faulty maps are refused, and images that must not be mirrored stay as is."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orientation_handler import MODES, OrientationError, OrientationHandler, Veto, read_orientation_map
from tagger.data.sidecar import clean_tag
from tagger.files import FormatError
from tagger.mirror_rules import make_rule, rewrite
from vocabulary import TagVocabulary

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED_MAP = REPOSITORY / "configs" / "orientation_map.json"
PORT = {"pattern": "(?<![a-z])port(?![a-z])", "replacement": "starboard"}
STARBOARD = {"pattern": "(?<![a-z])starboard(?![a-z])", "replacement": "port"}


@pytest.fixture
def handler_of(tmp_path: Path) -> Any:
    """A handler from the sections of a map, given as Python values or as the file's text."""

    def build(content: Any = None, mode: str = "conservative") -> OrientationHandler:
        path = tmp_path / "map.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content or {}), encoding="utf-8")
        return OrientationHandler(path, mode)

    return build


def vocabulary_of(*tags: str) -> TagVocabulary:
    return TagVocabulary.from_counts(dict.fromkeys(tags, 10), {})


# --- swap -----------------------------------------------------------------------------------------------------------

SIDES = [
    ("left", "right"),
    ("arm_left", "arm_right"),
    ("left_hand_on_left_hip", "right_hand_on_right_hip"),
    ("left-handed", "right-handed"),
    ("left-to-right_manga", "right-to-left_manga"),
    ("right-over-left_kimono", "left-over-right_kimono"),
    ("category:left-hand", "category:right-hand"),
    ("category:left", "category:right"),
    ("left hand", "right hand"),
    ("left_left:left-left left", "right_right:right-right right"),
    ("_left_", "_right_"),
    ("Left_Hand", "Right_Hand"),
    ("LEFT", "RIGHT"),
]
UNCHANGED = ["leftover", "copyright", "bright", "upright", "lefthand", "left2", "lEft", "left/right", "(left)", "", "_"]


@pytest.mark.parametrize(("tag", "mirrored"), SIDES)
def test_every_directional_part_swaps_without_any_map(tag: str, mirrored: str) -> None:
    handler = OrientationHandler(None)
    assert handler.mirror_tag(tag) == mirrored
    assert handler.mirror_tag(mirrored) == tag


@pytest.mark.parametrize("tag", UNCHANGED)
def test_words_that_only_contain_a_side_stay(tag: str) -> None:
    assert OrientationHandler(None).mirror_tag(tag) == tag


def test_symmetric_then_explicit_then_the_maps_patterns_then_the_built_in_ones(handler_of: Any) -> None:
    handler = handler_of(
        {
            "symmetric_tags": ["left_right_symmetry"],
            "explicit_mappings": {"left_lane": "fast_lane"},
            "regex_patterns": [PORT, STARBOARD],
        }
    )
    assert handler.swap("left_right_symmetry").source == "symmetric"
    assert handler.mirror_tag("left_right_symmetry") == "left_right_symmetry"
    assert handler.mirror_tag("left_lane") == "fast_lane"
    assert handler.mirror_tag("port_cabin_left_of_starboard_lamp") == "starboard_cabin_right_of_port_lamp"
    assert handler.swap("left_cabin").source == "pattern"
    assert handler.swap("cabin").source == "unchanged"


def test_one_way_entries_are_completed_with_their_reverse(handler_of: Any) -> None:
    handler = handler_of(
        {"explicit_mappings": {"port": "starboard", "up_to_left": "up_to_right", "up_to_right": "up_to_left"}}
    )
    assert handler.mirror_tag("starboard") == "port"
    assert handler.mirror_tag("up_to_right") == "up_to_left"
    assert handler_of({"explicit_mappings": {"left_wing": "right_wing"}}).may_mirror(["right_wing"])


def test_an_entry_that_maps_to_itself_is_symmetric(handler_of: Any) -> None:
    for mode in MODES:
        handler = handler_of({"explicit_mappings": {"looking_back": "looking_back"}}, mode)
        assert handler.swap("looking_back").source == "symmetric"
        assert handler.may_mirror(["looking_back"])


def test_a_pattern_that_copies_a_group_leaves_the_sides_within_it_to_swap(handler_of: Any) -> None:
    pair = [
        {"pattern": r"^left_(.*)$", "replacement": r"right_\1", "description": "a prefix"},
        {"pattern": r"^right_(?P<rest>.*)$", "replacement": r"left_\g<rest>"},
    ]
    handler = handler_of({"regex_patterns": pair})
    for tag in ("left_hand_on_left_hip", "left_left_left", "left_over_right", "left_"):
        assert handler.mirror_tag(tag) == OrientationHandler(None).mirror_tag(tag)


def test_patterns_with_separators_at_their_ends_share_the_one_between(handler_of: Any) -> None:
    pair = [{"pattern": "_port_", "replacement": "_starboard_"}, {"pattern": "_starboard_", "replacement": "_port_"}]
    assert handler_of({"regex_patterns": pair}).mirror_tag("a_port_starboard_port_b") == "a_starboard_port_starboard_b"


def test_a_pattern_may_reorder_its_groups() -> None:
    rule = make_rule("swap ends", r"^(\w)-(\w)$", r"\2-\1")
    assert rewrite("a-b", [rule]) == "b-a"
    assert rewrite("a\\b", [make_rule("slash", r"a\\b", r"b\\a")]) == "b\\a"


PARTS = ["left", "right", "Left", "RIGHT", "hand", "bright", "leftover", "port", "starboard", "x", "", "(left)"]
tags_from_parts = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).flatmap(
    lambda parts: st.lists(st.sampled_from("_-: "), min_size=len(parts), max_size=len(parts)).map(
        lambda marks: "".join(part + mark for part, mark in zip(parts, [*marks[:-1], ""], strict=True))
    )
)


@given(st.one_of(tags_from_parts, st.text(max_size=20)))
def test_mirroring_twice_gives_any_tag_back(tag: str) -> None:
    handler = OrientationHandler(None)
    assert handler.mirror_tag(handler.mirror_tag(tag)) == tag


clean_tags = tags_from_parts.map(clean_tag).filter(bool)


@pytest.fixture(scope="module")
def property_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("maps")


pattern_entries = st.sampled_from(
    [
        PORT,
        STARBOARD,
        {"pattern": "left", "replacement": "right"},
        {"pattern": "right", "replacement": "left"},
        {"pattern": "left", "replacement": "middle"},
        {"pattern": "_left_", "replacement": "_right_"},
        {"pattern": r"^left_(.*)$", "replacement": r"right_\1"},
        {"pattern": "hand", "replacement": "foot"},
    ]
)


@given(
    explicit=st.dictionaries(clean_tags, clean_tags, max_size=3),
    symmetric=st.lists(clean_tags, max_size=3),
    patterns=st.lists(pattern_entries, max_size=3),
    tags=st.lists(clean_tags, min_size=1, max_size=8, unique=True),
    mode=st.sampled_from(MODES),
)
def test_any_map_gives_every_tag_of_the_vocabulary_back_or_is_refused(
    property_folder: Path, explicit: Any, symmetric: Any, patterns: Any, tags: Any, mode: str
) -> None:
    path = property_folder / "map.json"
    path.write_text(
        json.dumps({"explicit_mappings": explicit, "symmetric_tags": symmetric, "regex_patterns": patterns})
    )
    vocabulary = vocabulary_of(*tags)
    try:
        handler = OrientationHandler(path, mode)
        table = handler.compile(vocabulary)
    except OrientationError as error:
        assert "\n" not in str(error)
        return
    assert [handler.mirror_tag(handler.mirror_tag(tag)) for tag in vocabulary.tags] == list(vocabulary.tags)
    assert np.array_equal(table.mirror_of[table.mirror_of], np.arange(len(vocabulary)))
    for index, tag in enumerate(vocabulary.tags):
        mirrored = handler.mirror_tag(tag)
        assert table.forbids[index] == (handler.blocks(tag) or mirrored not in vocabulary)
        assert vocabulary.tag(int(table.mirror_of[index])) == (mirrored if mirrored in vocabulary else tag)


# --- maps that are refused --------------------------------------------------------------------------------------------

REFUSED = {
    "a cycle": ({"explicit_mappings": {"a": "b", "b": "c", "c": "a"}}, "'b': 'c' gives 'b' a second mirror"),
    "a chain": ({"explicit_mappings": {"a": "b", "b": "c"}}, "'b'"),
    "two tags with one mirror": ({"explicit_mappings": {"a": "c", "b": "c"}}, "'c' a second mirror, 'b' besides 'a'"),
    "a tag to itself and to another": ({"explicit_mappings": {"a": "a", "b": "a"}}, "'a'"),
    "two entries for one tag": ('{"explicit_mappings": {"a": "b", "a": "c"}}', "'a' has two entries"),
    "two sections of one name": ('{"skip_flip_tags": [], "skip_flip_tags": []}', "'skip_flip_tags' has two entries"),
    "symmetric and explicit": ({"symmetric_tags": ["a"], "explicit_mappings": {"b": "a"}}, "'a' is in symmetric_tags"),
    "symmetric and conditionally so": ({"symmetric_tags": ["a"], "complex_asymmetric_tags": ["a"]}, "'a' is both"),
    "one pattern, two replacements": (
        {"regex_patterns": [PORT, {**PORT, "replacement": "aft"}]},
        "entry 2 ('(?<![a-z])port(?![a-z])') has two replacements",
    ),
    "patterns that disagree": (
        {"regex_patterns": [{"pattern": "port", "replacement": "bow"}, {"pattern": "po.t", "replacement": "aft"}]},
        "entry 1 ('port') and regex_patterns, entry 2 ('po.t') disagree about the tag 'port'",
    ),
    "a pattern without a way back": (
        {"regex_patterns": [PORT], "skip_flip_tags": ["port"]},
        "'port' becomes 'starboard'",
    ),
    "a literal without a way back": ({"regex_patterns": [{"pattern": "^port$", "replacement": "bow"}]}, "'port'"),
    "a side with two answers": ({"regex_patterns": [{"pattern": "left", "replacement": "middle"}]}, "'left'"),
    "not a regular expression": ({"regex_patterns": [{"pattern": "(", "replacement": "x"}]}, "entry 1: pattern '('"),
    "a group that is not there": ({"regex_patterns": [{"pattern": "a", "replacement": r"\1"}]}, "names group 1"),
    "a name that is not there": ({"regex_patterns": [{"pattern": "a", "replacement": r"\g<b>"}]}, "names group b"),
    "an escape": ({"regex_patterns": [{"pattern": "a", "replacement": "\\d"}]}, "groups are written"),
    "a match without text": ({"regex_patterns": [{"pattern": "x*", "replacement": "y"}]}, "without any text"),
    "half a pattern": ({"regex_patterns": [{"pattern": "a"}]}, "lacks the text 'pattern' or 'replacement'"),
    "an unknown section": ({"symetric_tags": []}, "unknown section 'symetric_tags'; did you mean 'symmetric_tags'?"),
    "an unknown key": ({"regex_patterns": [{"patern": "a", "replacement": "b"}]}, "did you mean 'pattern'?"),
    "a list of pairs": ({"explicit_mappings": [["a", "b"]]}, "explicit_mappings is a list"),
    "a list for a mirror": ({"explicit_mappings": {"a": ["b"]}}, "'a': ['b']"),
    "an empty mirror": ({"explicit_mappings": {"a": ""}}, "'a': ''"),
    "one text for a list": ({"skip_flip_tags": "text"}, "skip_flip_tags is a str"),
    "a tag that no index holds": ({"skip_flip_tags": ["text "]}, "'text ' is not a tag"),
    "a number for a tag": ({"skip_flip_tags": [3]}, "3 is not a tag"),
    "an object of symmetric tags": ({"symmetric_tags": {"a": "b"}}, "symmetric_tags is a dict"),
    "a text for patterns": ({"regex_patterns": "left"}, "regex_patterns is a str"),
    "texts for patterns": ({"regex_patterns": ["left"]}, "entry 1 is 'left'"),
    "a list": ([], "holds a list"),
    "a version of another kind": ({"format_version": "x"}, "format_version is 'x'"),
    "not JSON": ("{", "is not valid JSON"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_faulty_map_is_refused_in_one_line_that_names_the_entry(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(OrientationError) as refused:
        OrientationHandler(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_map_and_an_unknown_mode_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OrientationError, match=r"nowhere\.json does not exist; name another, or null"):
        OrientationHandler(tmp_path / "nowhere.json")
    with pytest.raises(OrientationError, match="cannot be read"):
        OrientationHandler(tmp_path)
    with pytest.raises(OrientationError, match="mode 'careful' is unknown; use conservative, balanced, permissive"):
        OrientationHandler(None, "careful")


def test_a_newer_map_is_refused_by_name(handler_of: Any) -> None:
    with pytest.raises(FormatError, match=r"map\.json has format_version 2"):
        handler_of({"format_version": 2, "sections_of_tomorrow": {}})


def test_compile_refuses_a_tag_that_the_map_would_not_give_back(handler_of: Any) -> None:
    handler = handler_of({"symmetric_tags": ["left-handed"]})
    handler.compile(vocabulary_of("left-handed"))
    with pytest.raises(OrientationError, match=r"'right-handed' becomes 'left-handed' \(pattern\).*\(symmetric\)"):
        handler.compile(vocabulary_of("left-handed", "right-handed"))


def test_what_no_tag_of_the_vocabulary_shows_is_no_fault(handler_of: Any) -> None:
    handler = handler_of(
        {"symmetric_tags": ["left"], "skip_flip_tags": ["left_page"], "explicit_mappings": {"right_page": "a"}}
    )
    assert handler.compile(vocabulary_of("left", "right_page", "a")).swapped == 2


def test_keys_that_begin_with_an_underscore_are_comments_everywhere(handler_of: Any) -> None:
    content = """{"_comment": 1, "_comment": "2", "explicit_mappings": {"_hands": "below", "left_hand": "right_hand"},
        "regex_patterns": [{"_why": "ships", "pattern": "port", "replacement": "starboard"},
                           {"pattern": "starboard", "replacement": "port"}],
        "complex_asymmetric_tags": {"_note": "eyes", "heterochromia": {"condition": "none"}}}"""
    handler = handler_of(content)
    assert dict(handler.map.explicit) == {"left_hand": "right_hand", "right_hand": "left_hand"}
    assert handler.map.complex == {"heterochromia"}
    assert handler.mirror_tag("_hands") == "_hands"


# --- veto -------------------------------------------------------------------------------------------------------------

HARMLESS = [
    *(
        "copyright",
        "bright",
        "upright",
        "straight",
        "light",
        "fight",
        "asymmetrical",
        "single_glove",
        "single_left_shoe",
    ),
    *(
        "leftover",
        "leftovers",
        "brightness_low",
        "copyright_free",
        "animal_rights",
        "cleft_chin",
        "playwright",
        "fright",
    ),
    *("upturned_eyes", "overlooking", "surfacing", "dog", "Bright", "sunlight", "birthright"),
]
DIRECTIONAL = [
    *("left", "right", "left_hand", "left-to-right_manga", "right-over-left_kimono", "category:left-hand", "LEFT"),
    *("Left_Hand", "facing_viewer", "looking_back", "pointing_up", "turned_away", "profile", "view_from_above"),
    *("view-from-above", "leftmost", "righthand", "(left)", "bright_left_eye", "copyright_right", "Looking_Back"),
    *("light_facing", "asymmetrical_left_sleeve", "facing:up", "profile_(person)"),
]


@pytest.mark.parametrize("tag", HARMLESS)
def test_words_that_say_nothing_about_a_side_forbid_nothing(tag: str) -> None:
    handler = OrientationHandler(None)
    assert not handler.is_directional(tag)
    assert handler.may_mirror([tag])


@pytest.mark.parametrize("tag", DIRECTIONAL)
def test_a_directional_tag_without_a_mirror_of_its_own_forbids_by_default(tag: str) -> None:
    handler = OrientationHandler(None)
    assert handler.mode == "conservative"
    assert not handler.may_mirror(["dog", tag])
    assert handler.veto(tag) is Veto.UNMAPPED


@pytest.mark.parametrize("mode", MODES)
def test_a_skip_tag_forbids_in_every_mode_wherever_it_stands(handler_of: Any, mode: str) -> None:
    everywhere = {
        "skip_flip_tags": ["text", "left_page", "emblem"],
        "symmetric_tags": ["text"],
        "explicit_mappings": {"left_page": "right_page"},
    }
    handler = handler_of(everywhere, mode)
    for tag in ("text", "left_page", "emblem"):
        assert handler.veto(tag) is Veto.SKIP
        assert not handler.may_mirror(["dog", tag]) and not handler.may_mirror([tag, "dog"])
    assert handler.may_mirror(["dog", "right_page", "Text"])  # as given: other letters, another tag
    assert handler.may_mirror([])


def test_the_modes_ask_for_an_entry_for_a_change_or_for_nothing(handler_of: Any) -> None:
    content = {"explicit_mappings": {"left_wing": "right_wing"}, "symmetric_tags": ["looking_back"]}
    allowed = {
        "conservative": {"left_wing", "right_wing", "looking_back"},
        "balanced": {"left_wing", "right_wing", "looking_back", "left_paw", "facing_left"},
        "permissive": {"left_wing", "right_wing", "looking_back", "left_paw", "facing_left", "facing_up", "leftmost"},
    }
    for mode, expected in allowed.items():
        handler = handler_of(content, mode)
        assert {tag for tag in allowed["permissive"] if handler.may_mirror([tag, "dog"])} == expected


def test_a_conditionally_symmetric_tag_counts_as_directional(handler_of: Any) -> None:
    content = {
        "complex_asymmetric_tags": ["heterochromia", "odd_left_sock", "odd_sleeve"],
        "explicit_mappings": {"odd_sleeve": "sleeve_odd"},
    }
    allowed = {
        "conservative": {"odd_sleeve"},
        "balanced": {"odd_sleeve", "odd_left_sock"},
        "permissive": {"odd_sleeve", "odd_left_sock", "heterochromia"},
    }
    for mode, expected in allowed.items():
        handler = handler_of(content, mode)
        assert {tag for tag in content["complex_asymmetric_tags"] if handler.may_mirror([tag])} == expected
        assert handler.mirror_tag("heterochromia") == "heterochromia"


def test_the_shipped_map_reads_and_gives_every_tag_back() -> None:
    shipped = read_orientation_map(SHIPPED_MAP)
    vocabulary = vocabulary_of(*sorted(shipped.tags))
    for mode in MODES:
        handler = OrientationHandler(SHIPPED_MAP, mode)
        table = handler.compile(vocabulary)
        assert table.out_of_vocabulary <= len(shipped.skip)
        assert table.swapped >= 100
        assert handler.may_mirror(
            ["arrow_left", "facing_up", "handle_right", "object_on_left", "circle_left_of_square"]
        )
        assert not handler.may_mirror(["text"]) and not handler.may_mirror(["left-to-right_manga"])
        assert handler.may_mirror(
            ["left_hand", "looking_at_viewer", "profile", "starboard_side", "right-over-left_kimono"]
        )
    assert all(tag not in shipped.skip for tag in shipped.explicit.keys() | shipped.symmetric)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_mirror_outside_the_vocabulary_forbids_in_every_mode_and_is_counted(handler_of: Any) -> None:
    vocabulary = vocabulary_of("dog", "left_paw", "right_paw", "left_ear")
    for mode in MODES:
        handler = handler_of({"explicit_mappings": {"left_paw": "right_paw", "left_ear": "right_ear"}}, mode)
        table = handler.compile(vocabulary)
        forbidden = {tag for tag in vocabulary.tags if table.forbids[vocabulary.index(tag)]}
        assert forbidden == {"left_ear"}
        assert table.out_of_vocabulary == 1
        assert table.swapped == 2
        assert "1 whose mirror is not in the vocabulary" in table.summary()
        assert table.mirror_of[vocabulary.index("left_ear")] == vocabulary.index("left_ear")
        assert table.mirror_of[vocabulary.index("left_paw")] == vocabulary.index("right_paw")


def test_the_table_is_compact_and_read_only(handler_of: Any) -> None:
    table = handler_of().compile(vocabulary_of("dog", "left", "right"))
    assert (table.mirror_of.dtype, table.forbids.dtype, table.vetoes.dtype) == (np.int32, np.bool_, np.uint8)
    assert table.count(Veto.UNMAPPED) == 2
    for array in (table.mirror_of, table.forbids, table.vetoes):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_tags_that_the_vocabulary_dropped_still_forbid(handler_of: Any) -> None:
    content = {"skip_flip_tags": ["text"], "explicit_mappings": {"left_ear": "right_ear", "left_paw": "right_paw"}}
    handler = handler_of(content)
    vocabulary = vocabulary_of("dog", "right_ear")
    names = ["text", "facing_up", "left_ear", "left_paw", "cat", "dog"]
    # left_ear: the mirrored image would deserve right_ear, which the vocabulary has and the row does not.
    expected = [Veto.SKIP, Veto.UNMAPPED, Veto.OUT_OF_VOCABULARY, Veto.NONE, Veto.NONE, Veto.NONE]
    assert handler.vetoes(names, vocabulary).tolist() == expected
    assert [handler.blocks(tag) for tag in names] == [True, True, False, False, False, False]


def test_a_handler_travels_to_other_processes() -> None:
    handler = pickle.loads(pickle.dumps(OrientationHandler(SHIPPED_MAP, "balanced")))
    assert handler.mirror_tag("port_side") == "starboard_side"
    assert handler.mode == "balanced"
