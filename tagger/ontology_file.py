"""Ontology files: YAML (JSON is YAML too) with aliases, implications, exclusive groups and flip pairs.

    format_version: 1
    aliases: {kitty: cat}                        # old name: the tag to use
    implications: {cat: animal, tabby: [cat]}    # tag: what an image with it also has
    exclusive: [[day, night]]                    # an image has one of them at most
    flip_pairs: [[waving_left, waving_right]]    # change places when the image is mirrored

Every word is text, so that `no` and `2000` are tags. Refuses, naming the line: unknown sections, entries given twice,
circles, aliases that stand where a tag belongs, groups that a tag's implications break, tags with two mirrors, ratings
outside of groups, a newer format_version, and a copy of ours that was changed.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tagger.data.sidecar import clean_tag, is_rating_tag
from tagger.files import FormatError, NewerFormatError
from tagger.ontology import FORMAT_VERSION, Ontology, OntologyError

_SECTIONS = ("aliases", "implications", "exclusive", "flip_pairs")
_KEYS = ("format_version", "sha256", *_SECTIONS)
_EXAMPLES = {
    "aliases": "kitty: cat",
    "implications": "tabby: [cat, striped]",
    "exclusive": "- [day, night]",
    "flip_pairs": "- [waving_left, waving_right]",
}
_Loader = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader


@dataclass(frozen=True)
class _Entry:
    """One entry of a section: the tag in front of the colon, where there is one, and the tags after it."""

    line: int
    key: str
    tags: tuple[str, ...]


def read_ontology(path: Path) -> Ontology:
    """Read and check an ontology. Raises OntologyError, FormatError or NewerFormatError, each of one line."""
    name = f"ontology {path}"
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except FileNotFoundError as error:
        raise OntologyError(f"{name} does not exist (looked in {Path.cwd()}); correct the path") from error
    except OSError as error:
        raise OntologyError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OntologyError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OntologyError(f"{name} is not valid YAML: {reason}; quote tags with special characters") from error
    try:
        return _read(root, name)
    except OntologyError as error:
        raise OntologyError(f"{name}: {error}") from error


def require_unchanged(given: Path, saved: Path) -> None:
    """Raise OntologyError when `given` no longer says what `saved`, the copy that a run started with, says."""
    if read_ontology(given).sha256 != read_ontology(saved).sha256:
        raise OntologyError(
            f"vocabulary.ontology_file: {given} has changed since this run started with {saved}: a run keeps the "
            "meaning of its tags; put it back, or start a new run with --init-from"
        )


def _read(root: yaml.Node | None, name: str) -> Ontology:
    if not isinstance(root, yaml.MappingNode):
        raise OntologyError(f"it has no sections; expected {', '.join(_SECTIONS)}, each optional")
    # First, since a newer file may have sections that are not known here.
    _check_version(next((v for k, v in root.value if _text(k, "a section") == "format_version"), None), name)
    sections: dict[str, yaml.Node] = {}
    for key_node, value in root.value:
        key = _text(key_node, "a section")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            remedy = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(_KEYS)}"
            raise _error(_line(key_node), f"unknown section '{key}'; {remedy}")
        if key in sections:
            raise _error(_line(key_node), f"section '{key}' is there twice; join the two")
        sections[key] = value
    aliases, implications = (_mapping(sections.get(key), key) for key in _SECTIONS[:2])
    exclusive, flip_pairs = (_groups(sections.get(key), key) for key in _SECTIONS[2:])
    canonical = _follow(aliases)
    for section, entries in zip(_SECTIONS[1:], (implications, exclusive, flip_pairs), strict=True):
        for entry in entries:
            _refuse_aliases(entry, section, canonical)
    ratable = (("aliases", aliases), ("implications", implications), ("flip_pairs", flip_pairs))
    for section, entries in ratable:
        for entry in entries:
            _refuse_ratings(entry, section)
    parents = {entry.key: tuple(dict.fromkeys(entry.tags)) for entry in implications}
    groups, pairs = tuple(entry.tags for entry in exclusive), tuple((e.tags[0], e.tags[1]) for e in flip_pairs)
    ontology = Ontology(canonical, parents, groups, pairs, name)
    _check_circles(ontology, implications)
    _check_groups(ontology, exclusive)
    _check_pairs(flip_pairs)
    saved = sections.get("sha256")
    if saved is not None and _text(saved, "sha256") != ontology.sha256:
        raise FormatError(
            f"{name} does not match its sha256: it was changed after a run wrote it; restore it, or take out the line "
            "sha256 to use it as one of your own"
        )
    return ontology


def _check_version(node: yaml.Node | None, name: str) -> None:
    if node is None:
        raise OntologyError(f"it has no format_version; begin it with format_version: {FORMAT_VERSION}")
    text = _text(node, "format_version")
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0):
        raise _error(_line(node), f"format_version is '{text}'; expected {FORMAT_VERSION}")
    if int(text[:9]) > FORMAT_VERSION:
        raise NewerFormatError(
            f"{name} has format_version {text[:9]}, this program reads up to {FORMAT_VERSION}; update the program"
        )


def _mapping(node: yaml.Node | None, section: str) -> list[_Entry]:
    if _is_empty(node):
        return []
    if not isinstance(node, yaml.MappingNode):
        raise _error(_line(node), f"{section} is no table; write one entry a line, e.g. {_EXAMPLES[section]}")
    entries: dict[str, _Entry] = {}
    for key_node, value in node.value:
        tag, line = _tag(key_node, section), _line(key_node)
        if tag in entries:
            raise _error(line, f"{section}: '{tag}' has an entry in line {entries[tag].line} already; keep one of them")
        if isinstance(value, yaml.SequenceNode) and section == "implications":
            tags = tuple(_tag(item, section) for item in value.value)
        else:
            tags = (_tag(value, section),)
        entries[tag] = _Entry(line, tag, tags)
    return list(entries.values())


def _groups(node: yaml.Node | None, section: str) -> list[_Entry]:
    if _is_empty(node):
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise _error(_line(node), f"{section} is no list; write one group a line, e.g. {_EXAMPLES[section]}")
    entries = []
    for group in node.value:
        tags = tuple(_tag(i, section) for i in group.value) if isinstance(group, yaml.SequenceNode) else ()
        right = len(tags) == 2 if section == "flip_pairs" else len(tags) > 1
        if not right or len(set(tags)) < len(tags):
            what = "two different tags" if section == "flip_pairs" else "two or more different tags"
            raise _error(_line(group), f"{section}: a group has {what}, e.g. {_EXAMPLES[section]}")
        entries.append(_Entry(_line(group), tags[0], tags))
    return entries


def _follow(aliases: list[_Entry]) -> dict[str, str]:
    """The canonical tag of each alias, at the end of its chain."""
    target = {entry.key: entry.tags[0] for entry in aliases}
    done: dict[str, str] = {}
    for entry in aliases:
        path = {entry.key: None}
        tag = target[entry.key]
        while tag in target and tag not in done:
            if tag in path:
                circle = " -> ".join(f"'{name}'" for name in [*path][[*path].index(tag) :])
                raise _error(entry.line, f"aliases go in a circle: {circle} -> '{tag}'; remove one of them")
            path[tag] = None
            tag = target[tag]
        done |= dict.fromkeys(path, done.get(tag, tag))
    return done


def _refuse_aliases(entry: _Entry, section: str, canonical: Mapping[str, str]) -> None:
    for tag in (entry.key, *entry.tags):
        if tag in canonical:
            raise _error(entry.line, f"{section}: '{tag}' is an alias; write its tag, '{canonical[tag]}'")


def _refuse_ratings(entry: _Entry, section: str) -> None:
    for tag in (entry.key, *entry.tags):
        if is_rating_tag(tag):
            raise _error(entry.line, f"{section}: '{tag}' is a rating, and an image has one of its own; take it out")


def _check_circles(ontology: Ontology, implications: list[_Entry]) -> None:
    for entry in implications:
        if entry.key in entry.tags:
            raise _error(entry.line, f"implications: '{entry.key}' implies itself; take it out")
    ontology.ancestors  # noqa: B018 - computed once, and refused where it goes in a circle


def _check_groups(ontology: Ontology, exclusive: list[_Entry]) -> None:
    groups_of: dict[str, list[int]] = {}
    for number, entry in enumerate(exclusive):
        for tag in entry.tags:
            groups_of.setdefault(tag, []).append(number)
    for tag in ontology.ancestors:
        seen: dict[int, str] = {}
        for name in ontology.closed(tag):
            for number in groups_of.get(name, ()):
                if (other := seen.setdefault(number, name)) != name:
                    what = f"'{tag}' implies '{name}'" if other == tag else f"'{tag}' implies '{other}' and '{name}'"
                    raise _error(exclusive[number].line, f"exclusive: {what}, so they cannot exclude each other")


def _check_pairs(flip_pairs: list[_Entry]) -> None:
    line_of: dict[str, int] = {}
    for entry in flip_pairs:
        for tag in entry.tags:
            if tag in line_of:
                raise _error(entry.line, f"flip_pairs: '{tag}' has a mirror in line {line_of[tag]} already; keep one")
            line_of[tag] = entry.line


def _tag(node: yaml.Node, section: str) -> str:
    tag = _text(node, f"{section}: an entry")
    if not tag or clean_tag(tag) != tag:
        raise _error(_line(node), f"{section}: {tag!r} is not a tag; expected text without stray white space")
    return tag


def _text(node: yaml.Node, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error(_line(node), f"{what} is a list or a table; expected one text")
    text = str(node.value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _error(_line(node), f"{what} has half a character (\\u escapes in pairs); write the character itself")
    return text


def _is_empty(node: yaml.Node | None) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and node.value == "")


def _line(node: yaml.Node | None) -> int:
    return 0 if node is None or node.start_mark is None else node.start_mark.line + 1


def _error(line: int, message: str) -> OntologyError:
    return OntologyError(f"line {line}: {message}")
