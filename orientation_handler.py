"""Mirroring an image means renaming its tags: which tags swap, which images may be mirrored, and the coin that decides.

Swap, per tag: a symmetric tag stays; else its explicit mirror; else the map's patterns and the built-in left/right ones
on every directional part. Mirroring twice gives every tag back, or the map is refused with the entry named.

Veto, before the coin: a tag of `skip_flip_tags` forbids the mirror in every mode; so does a mirrored tag that the
vocabulary lacks, because a label would be lost. `permissive` asks no more. A directional tag otherwise needs an
explicit mirror (`conservative`) or must change under the swap (`balanced`). A tag of `complex_asymmetric_tags` is
symmetric only under conditions that no tag states, so it counts as directional whatever its words.

Tags are compared as given: `Text` is not `text`, `category:left` is not `left`.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tagger.data.sidecar import clean_tag
from tagger.errors import InputError
from tagger.files import FormatError
from tagger.mirror_rules import Rule, make_rule, rewrite
from tagger.ontology import Ontology
from tagger.rng import mix, stable_id, uniform
from vocabulary import TagVocabulary

FORMAT_VERSION = 1
MODES = ("conservative", "balanced", "permissive")
_TAG_LISTS = ("symmetric_tags", "skip_flip_tags", "complex_asymmetric_tags")
_SECTIONS = ("format_version", "explicit_mappings", "regex_patterns", *_TAG_LISTS)
_PATTERN_KEYS = ("pattern", "replacement", "description")

# `left` and `right` count inside longer words too (`leftmost`, `righthand`): a false veto costs one mirrored view, a
# missed one a wrong label. Hence the words that hold them and say nothing about a side.
_HARMLESS = re.compile(
    "copyright|upright|bright|straight|light|fight|asymmetrical|outright|downright|forthright|birthright|playwright"
    "|fright|righteous|rights(?![a-z])|leftover|(?<![a-z])cleft",
    re.IGNORECASE | re.ASCII,
)
_DIRECTIONAL = re.compile(
    "left|right|(?<![a-z])(?:facing|looking|pointing|turned|profile|view[_: -]from)(?![a-z])", re.IGNORECASE | re.ASCII
)
_ROW_STREAM = stable_id("mirror/row")
_SINGLE = re.compile("single[_ -]", re.IGNORECASE | re.ASCII)


class OrientationError(InputError):
    """An orientation map or list that its author can mend; the message is one line that names the entry."""


class Veto(IntEnum):
    """Why a tag forbids mirroring the images that carry it."""

    NONE = 0
    SKIP = 1
    UNMAPPED = 2
    OUT_OF_VOCABULARY = 3


@dataclass(frozen=True)
class Swap:
    """What a tag becomes, and what said so."""

    mirrored: str
    source: Literal["symmetric", "explicit", "pattern", "unchanged"]


@dataclass(frozen=True)
class OrientationMap:
    """A map as read: `explicit` holds both directions of every pair and no tag that maps to itself."""

    name: str = "the built-in orientation rules"
    explicit: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    symmetric: frozenset[str] = frozenset()
    skip: frozenset[str] = frozenset()
    complex: frozenset[str] = frozenset()

    @property
    def tags(self) -> frozenset[str]:
        """Every tag the map names."""
        return self.symmetric | self.skip | self.complex | self.explicit.keys()


@dataclass(frozen=True)
class MirrorTable:
    """The rules as arrays over a vocabulary, read-only.

    mirror_of: [C] int32, the tag that takes each tag's place; its own index where the vocabulary lacks that tag.
    forbids: [C] bool, the tags that forbid mirroring the images that carry them.
    vetoes: [C] uint8, the reasons, values of `Veto`.
    """

    mirror_of: NDArray[np.int32]
    forbids: NDArray[np.bool_]
    vetoes: NDArray[np.uint8]

    @property
    def swapped(self) -> int:
        """Number of tags that change places."""
        return int(np.count_nonzero(self.mirror_of != np.arange(len(self.mirror_of))))

    @property
    def out_of_vocabulary(self) -> int:
        """Number of tags that forbid the mirror because the vocabulary lacks the mirrored tag."""
        return self.count(Veto.OUT_OF_VOCABULARY)

    def count(self, veto: Veto) -> int:
        """Number of tags with this verdict."""
        return int(np.count_nonzero(self.vetoes == veto))

    def summary(self) -> str:
        """One line for the log of a run."""
        return (
            f"mirroring: {self.swapped} of {len(self.mirror_of)} tags swap; {int(self.forbids.sum())} forbid it "
            f"({self.count(Veto.SKIP)} listed to skip, {self.count(Veto.UNMAPPED)} directional without a known mirror, "
            f"{self.out_of_vocabulary} whose mirror is not in the vocabulary)"
        )


class OrientationHandler:
    """The rules of one orientation map in one mode. Immutable after construction, safe to share and to pickle."""

    def __init__(
        self, map_path: str | Path | None = None, mode: str = "conservative", ontology: Ontology | None = None
    ) -> None:
        """`map_path` None means the built-in left/right patterns alone; flip pairs of `ontology` join the map.

        Raises OrientationError, FormatError, and OntologyError where mirroring breaks an implication.
        """
        if mode not in MODES:
            raise OrientationError(f"orientation mode '{mode}' is unknown; use {', '.join(MODES)}")
        self.mode = mode
        self.map = OrientationMap() if map_path is None else read_orientation_map(Path(map_path))
        self.ontology = Ontology() if ontology is None else ontology
        self.map = _with_flip_pairs(self.map, self.ontology)
        for tag in sorted(self._probes()):
            self.mirror_tag(tag)
        self.ontology.check_mirror(self.mirror_tag, self.blocks)

    def mirror_tag(self, tag: str) -> str:
        """The tag of the mirrored image. Raises OrientationError where mirroring twice would not give the tag back."""
        return self.swap(tag).mirrored

    def swap(self, tag: str) -> Swap:
        """`mirror_tag` with the part of the rules that decided."""
        swap = self._swap_once(tag)
        back = self._swap_once(swap.mirrored)
        if back.mirrored != tag:
            raise OrientationError(
                f"{self.map.name}: '{tag}' becomes '{swap.mirrored}' ({swap.source}) but that becomes "
                f"'{back.mirrored}' ({back.source}); name '{tag}' and its mirror in explicit_mappings, or "
                "both tags in symmetric_tags"
            )
        return swap

    def may_mirror(self, tags: Iterable[str]) -> bool:
        """Whether no tag of an image forbids mirroring it; which tags a vocabulary has is `decide`'s question."""
        return not any(self.blocks(tag) for tag in tags)

    def blocks(self, tag: str) -> bool:
        """Whether the tag forbids the mirror in this mode, in or out of a vocabulary."""
        return self.veto(tag) is not Veto.NONE

    def veto(self, tag: str, vocabulary: TagVocabulary | None = None) -> Veto:
        """Why the tag forbids the mirror, `Veto.NONE` if it does not.

        With a vocabulary, a tag and its mirror must both be in it or both be missing: a label would be lost one way,
        and be missing from the mirrored image the other way.
        """
        if tag in self.map.skip:
            return Veto.SKIP
        if self.mode != "permissive" and self.is_directional(tag) and not self._has_known_mirror(tag):
            return Veto.UNMAPPED
        if vocabulary is not None and (tag in vocabulary) != (self.mirror_tag(tag) in vocabulary):
            return Veto.OUT_OF_VOCABULARY
        return Veto.NONE

    def is_directional(self, tag: str) -> bool:
        """Whether the tag may say something about a side: by its words, or listed as `complex_asymmetric_tags`."""
        if tag in self.map.complex:
            return True
        if tag in self.map.symmetric or _SINGLE.match(tag):
            return False
        return _DIRECTIONAL.search(_HARMLESS.sub(".", tag)) is not None

    def vetoes(self, tags: Sequence[str], vocabulary: TagVocabulary) -> NDArray[np.uint8]:
        """`veto` of each tag, [len(tags)] uint8: for the names of an index, of which a vocabulary has only a part.

        A rare `text` that the vocabulary dropped still forbids the mirror. Raises OrientationError as `mirror_tag`.
        """
        return np.array([self.veto(tag, vocabulary) for tag in tags], dtype=np.uint8)

    def forbids(self, tags: Sequence[str], vocabulary: TagVocabulary) -> NDArray[np.bool_]:
        """Whether each tag of an index forbids the mirror, [len(tags)] bool, by itself or by a tag that it implies.

        Of an alias only `skip_flip_tags` counts; else it is as good as its tag. Raises OrientationError.
        """
        forbids = cache(lambda name: self.veto(name, vocabulary) is not Veto.NONE)
        verdicts = (tag in self.map.skip or any(map(forbids, self.ontology.closed(tag))) for tag in tags)
        return np.fromiter(verdicts, dtype=np.bool_, count=len(tags))

    def compile(self, vocabulary: TagVocabulary) -> MirrorTable:
        """Tables over the vocabulary. Raises OrientationError for a tag that mirroring twice would not give back."""
        indices = [vocabulary.get(self.mirror_tag(tag)) for tag in vocabulary.tags]
        mirror_of = np.array([own if index is None else index for own, index in enumerate(indices)], dtype=np.int32)
        vetoes = self.vetoes(vocabulary.tags, vocabulary)
        table = MirrorTable(mirror_of, vetoes != Veto.NONE, vetoes)
        for array in (table.mirror_of, table.forbids, table.vetoes):
            array.setflags(write=False)
        return table

    def decide(
        self,
        stem: str,
        tags: Iterable[str],
        epoch: int,
        coin: "MirrorCoin",
        vocabulary: TagVocabulary | None = None,
        row: int | None = None,
    ) -> bool:
        """Whether one image is mirrored in an epoch: the rule that every vectorised path must agree with."""
        if any(self.veto(tag, vocabulary) is not Veto.NONE for tag in tags):
            return False
        return coin.toss_one(stem, epoch, row)

    def _swap_once(self, tag: str) -> Swap:
        if tag in self.map.symmetric:
            return Swap(tag, "symmetric")
        if tag in self.map.explicit:
            return Swap(self.map.explicit[tag], "explicit")
        try:
            mirrored = rewrite(tag, self.map.rules)
        except ValueError as error:
            raise OrientationError(f"{self.map.name}: {error}") from error
        return Swap(mirrored, "unchanged" if mirrored == tag else "pattern")

    def _has_known_mirror(self, tag: str) -> bool:
        if self.mode == "conservative":
            return tag in self.map.explicit
        return self.mirror_tag(tag) != tag

    def _probes(self) -> set[str]:
        """Tags that show a fault of the patterns when the map is read rather than when a data set first has the tag."""
        literals = {re.sub(r"\\b|[\^$]", "", rule.pattern.pattern) for rule in self.map.rules}
        tags = {"left", "right"} | self.map.tags | {text for text in literals if re.fullmatch(r"[\w: -]+", text)}
        return {tag for tag in tags if any(rule.pattern.search(tag) for rule in self.map.rules)}


@dataclass(frozen=True)
class MirrorCoin:
    """Which images are mirrored in an epoch, vetoes aside: a hash of (row, epoch, seed), as augmentation is.

    By the row and not the stem, or all images of one name would turn together; an image of no data set goes by its
    stem. The same in every process and after every resume. Stems of `never` and `force` override the coin, also at
    probability 0; nothing overrides a veto, and a forced image's tags swap like any other's.
    """

    probability: float
    seed: int
    never: frozenset[str] = frozenset()
    force: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise OrientationError(f"mirror probability {self.probability} is not between 0 and 1; use 0.5")
        if both := sorted(self.never & self.force):
            raise OrientationError(f"image '{both[0]}' is in the never-flip and the force-flip list; keep one of them")

    @classmethod
    def from_files(
        cls, probability: float, seed: int, never_file: str | Path | None, force_file: str | Path | None
    ) -> "MirrorCoin":
        """A coin with lists from files (one stem a line; empty lines and lines that begin with `# ` are skipped)."""
        return cls(probability, seed, _read_stems(never_file), _read_stems(force_file))

    def toss(
        self, image_ids: NDArray[np.uint64], epoch: int, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """The coin of each image, [N] bool; `image_ids` are `stable_id` of the stems, uint64; `rows` are an index's."""
        keys = image_ids if rows is None else mix(_ROW_STREAM, rows)
        hashed = np.asarray(mix(keys, epoch, self.seed), dtype=np.uint64)
        heads: NDArray[np.bool_] = uniform(hashed) < self.probability
        if self.never:
            heads &= ~np.isin(image_ids, self._never_ids)
        if self.force:
            heads |= np.isin(image_ids, self._force_ids)
        return heads

    def toss_one(self, stem: str, epoch: int, row: int | None = None) -> bool:
        """The coin of one image."""
        if stem in self.never:
            return False
        key = stable_id(stem) if row is None else mix(_ROW_STREAM, row)
        return stem in self.force or uniform(mix(key, epoch, self.seed)) < self.probability

    def unknown_stems(self, image_ids: NDArray[np.uint64]) -> tuple[str, ...]:
        """Listed stems that no image has, for a warning: a list with file names in place of stems does nothing."""
        listed = sorted(self.never | self.force)
        found = np.isin(_ids(listed), image_ids)
        return tuple(stem for stem, known in zip(listed, found, strict=True) if not known)

    @cached_property
    def _never_ids(self) -> NDArray[np.uint64]:
        return _ids(self.never)

    @cached_property
    def _force_ids(self) -> NDArray[np.uint64]:
        return _ids(self.force)


def read_orientation_map(path: Path) -> OrientationMap:
    """Read and check an orientation map (JSON); keys that begin with `_` are comments.

    One-way entries of `explicit_mappings` are completed; a tag that maps to itself is symmetric. Raises
    OrientationError naming the entry, and FormatError for a file that is newer than this program.
    """
    name = f"orientation map {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object_without_comments)
    except FileNotFoundError as error:
        remedy = "name another, or null for the built-in left/right patterns alone"
        raise OrientationError(f"{name} does not exist; {remedy}") from error
    except OSError as error:
        raise OrientationError(f"{name} cannot be read: {error.strerror}") from error
    except OrientationError as error:
        raise OrientationError(f"{name}: {error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number too long or lists too deep to read
        raise OrientationError(f"{name} is not valid JSON ({error})") from error
    try:
        return _parse_map(name, content)
    except OrientationError as error:
        raise OrientationError(f"{name}: {error}") from error


def _with_flip_pairs(found: OrientationMap, ontology: Ontology) -> OrientationMap:
    """The map with an ontology's flip pairs among its explicit mappings."""
    explicit = dict(found.explicit)
    for pair in ontology.flip_pairs:
        for tag, mirrored in (pair, pair[::-1]):
            other = tag if tag in found.symmetric else explicit.setdefault(tag, mirrored)
            if other != mirrored:
                raise OrientationError(
                    f"{ontology.source}: flip_pairs: '{tag}' becomes '{mirrored}', but in {found.name} it becomes "
                    f"'{other}'; keep one of them"
                )
    return replace(found, explicit=explicit)


def _object_without_comments(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key.startswith("_"):
            continue
        if key in content:  # JSON readers keep the last of two without a word
            raise OrientationError(f"'{key}' has two entries; keep one of them")
        content[key] = value
    return content


def _parse_map(name: str, content: Any) -> OrientationMap:
    if not isinstance(content, dict):
        raise OrientationError(f"holds a {type(content).__name__}; expected an object with {', '.join(_SECTIONS[1:])}")
    version = content.get("format_version", FORMAT_VERSION)  # maps in the wild have none
    if not isinstance(version, int) or version < 1:
        raise OrientationError(f"format_version is {version!r}; expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{name} has format_version {version}, this program reads up to {FORMAT_VERSION}; update the program"
        )
    _refuse_unknown(content, _SECTIONS, "section")
    pairs = _complete(_parse_explicit(content.get("explicit_mappings", {})))
    symmetric, skip, complex_tags = (_parse_tags(section, content.get(section, [])) for section in _TAG_LISTS)
    explicit = {tag: mirrored for tag, mirrored in pairs.items() if tag != mirrored}
    if both := sorted(symmetric & explicit.keys()):
        raise OrientationError(f"'{both[0]}' is in symmetric_tags and in explicit_mappings; keep one of them")
    symmetric |= pairs.keys() - explicit.keys()
    if both := sorted(symmetric & complex_tags):
        raise OrientationError(f"'{both[0]}' is both symmetric and in complex_asymmetric_tags; keep one of them")
    return OrientationMap(
        name, explicit, _parse_rules(content.get("regex_patterns", [])), symmetric, skip, complex_tags
    )


def _parse_explicit(section: Any) -> dict[str, str]:
    if not isinstance(section, dict):
        raise OrientationError(
            f"explicit_mappings is a {type(section).__name__}; expected an object, tag: mirrored tag"
        )
    for tag, mirrored in section.items():
        if not _is_tag(tag) or not _is_tag(mirrored):
            raise OrientationError(f"explicit_mappings: {tag!r}: {mirrored!r} is not a tag and its mirrored tag")
    return section


def _is_tag(entry: Any) -> bool:
    # An entry with white space that the index would have cut off matches no tag: a skip tag that skips nothing.
    return isinstance(entry, str) and entry != "" and clean_tag(entry) == entry


def _complete(mapping: Mapping[str, str]) -> dict[str, str]:
    """Both directions of every entry; a chain, a cycle or two entries for one tag leave some tag with two mirrors."""
    pairs: dict[str, str] = {}
    for tag, mirrored in mapping.items():
        for one, other in ((tag, mirrored), (mirrored, tag)):
            if pairs.setdefault(one, other) != other:
                raise OrientationError(
                    f"explicit_mappings: '{tag}': '{mirrored}' gives '{one}' a second mirror, '{other}' besides "
                    f"'{pairs[one]}'; tags mirror in pairs, so keep one of them"
                )
    return pairs


def _parse_tags(name: str, section: Any) -> frozenset[str]:
    # Maps in the wild hold complex_asymmetric_tags as an object of notes; the notes are for people.
    if not isinstance(section, list | dict) or (isinstance(section, dict) and name != "complex_asymmetric_tags"):
        raise OrientationError(f"{name} is a {type(section).__name__}; expected a list of tags")
    for tag in section:
        if not _is_tag(tag):
            raise OrientationError(f"{name}: {tag!r} is not a tag; expected a text without stray white space")
    return frozenset(section)


def _parse_rules(section: Any) -> tuple[Rule, ...]:
    if not isinstance(section, list):
        raise OrientationError(f"regex_patterns is a {type(section).__name__}; expected a list of objects")
    rules: dict[str, tuple[str, Rule]] = {}
    for number, entry in enumerate(section, start=1):
        if not isinstance(entry, dict):
            raise OrientationError(f"regex_patterns, entry {number} is {entry!r}; expected an object")
        _refuse_unknown(entry, _PATTERN_KEYS, f"key of regex_patterns, entry {number}")
        pattern, replacement = entry.get("pattern"), entry.get("replacement")
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise OrientationError(f"regex_patterns, entry {number} lacks the text 'pattern' or 'replacement'")
        name = f"regex_patterns, entry {number} ('{pattern}')"
        if pattern in rules and rules[pattern][0] != replacement:
            raise OrientationError(f"{name} has two replacements, '{rules[pattern][0]}' and '{replacement}'; keep one")
        try:
            rules.setdefault(pattern, (replacement, make_rule(name, pattern, replacement)))
        except ValueError as error:
            raise OrientationError(f"regex_patterns, entry {number}: {error}") from error
    return tuple(rule for _, rule in rules.values())


def _refuse_unknown(content: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
            raise OrientationError(f"unknown {kind} '{key}'; {remedy}")


def _read_stems(path: str | Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OrientationError(f"list of images {path} cannot be read: {reason}; expected one stem a line") from error
    return frozenset(line for line in lines if line and line != "#" and not line.startswith("# "))


def _ids(stems: Iterable[str]) -> NDArray[np.uint64]:
    return np.array([stable_id(stem) for stem in stems], dtype=np.uint64)
