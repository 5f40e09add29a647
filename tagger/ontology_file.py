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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
_MAX_DEPTH = 3  # the file, a section, an entry
_Loader = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader


@dataclass(frozen=True)
class _Node:
    """A text, a list, or a table: of the latter, keys and values by turns."""

    kind: Literal["text", "list", "table"]
    line: int
    text: str = ""
    parts: list["_Node"] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple["_Node", "_Node"]]:
        return list(zip(self.parts[::2], self.parts[1::2], strict=True))


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
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise OntologyError(f"{name} does not exist (looked in {Path.cwd()}); correct the path") from error
    except OSError as error:
        raise OntologyError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise OntologyError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        return _read(_compose(text), name)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise OntologyError(f"{name} is not valid YAML: {reason}; quote tags with special characters") from error
    except OntologyError as error:
        raise OntologyError(f"{name}: {error}") from error


def require_unchanged(given: Path, saved: Path) -> None:
    """Raise OntologyError when `given` no longer says what `saved`, the copy that a run started with, says."""
    if read_ontology(given).sha256 != read_ontology(saved).sha256:
        raise OntologyError(
            f"vocabulary.ontology_file: {given} has changed since this run started with {saved}: a run keeps the "
            "meaning of its tags; put it back, or start a new run with --init-from"
        )


def _compose(text: str) -> _Node | None:
    """The tree of a document. Not `yaml.compose`, which recurses: a file of brackets would end the process."""
    root: _Node | None = None
    open_nodes: list[_Node] = []
    for event in yaml.parse(text, Loader=_Loader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _error(line, f"'*{event.anchor}' points to another place; write it out, or quote the tag")
        if isinstance(event, yaml.CollectionEndEvent):
            open_nodes.pop()
            continue
        if isinstance(event, yaml.ScalarEvent):
            node = _Node("text", line, str(event.value))
        elif isinstance(event, yaml.CollectionStartEvent):
            node = _Node("table" if isinstance(event, yaml.MappingStartEvent) else "list", line)
        else:
            continue
        if open_nodes:
            open_nodes[-1].parts.append(node)
        elif root is None:
            root = node
        else:
            raise _error(line, "another document begins; an ontology is one")
        if node.kind != "text":
            open_nodes.append(node)
        if len(open_nodes) > _MAX_DEPTH:
            raise _error(line, "lists and tables are nested too deeply; a section holds entries, an entry tags")
    return root


def _read(root: _Node | None, name: str) -> Ontology:
    if root is None or root.kind != "table":
        raise OntologyError(f"it has no sections; expected {', '.join(_SECTIONS)}, each optional")
    # First, since a newer file may have sections that are not known here.
    _check_version(next((v for k, v in root.pairs if _text(k, "a section") == "format_version"), None), name)
    sections: dict[str, _Node] = {}
    for key_node, value in root.pairs:
        key = _text(key_node, "a section")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            remedy = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(_KEYS)}"
            raise _error(key_node.line, f"unknown section '{key}'; {remedy}")
        if key in sections:
            raise _error(key_node.line, f"section '{key}' is there twice; join the two")
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


def _check_version(node: _Node | None, name: str) -> None:
    if node is None:
        raise OntologyError(f"it has no format_version; begin it with format_version: {FORMAT_VERSION}")
    text = _text(node, "format_version")
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0):
        raise _error(node.line, f"format_version is '{text}'; expected {FORMAT_VERSION}")
    if int(text[:9]) > FORMAT_VERSION:
        raise NewerFormatError(
            f"{name} has format_version {text[:9]}, this program reads up to {FORMAT_VERSION}; update the program"
        )


def _mapping(node: _Node | None, section: str) -> list[_Entry]:
    if node is None or (node.kind, node.text) == ("text", ""):
        return []
    if node.kind != "table":
        raise _error(node.line, f"{section} is no table; write one entry a line, e.g. {_EXAMPLES[section]}")
    entries: dict[str, _Entry] = {}
    for key_node, value in node.pairs:
        tag, line = _tag(key_node, section), key_node.line
        if tag in entries:
            raise _error(line, f"{section}: '{tag}' has an entry in line {entries[tag].line} already; keep one of them")
        if value.kind == "list" and section == "implications":
            tags = tuple(_tag(item, section) for item in value.parts)
        else:
            tags = (_tag(value, section),)
        entries[tag] = _Entry(line, tag, tags)
    return list(entries.values())


def _groups(node: _Node | None, section: str) -> list[_Entry]:
    if node is None or (node.kind, node.text) == ("text", ""):
        return []
    if node.kind != "list":
        raise _error(node.line, f"{section} is no list; write one group a line, e.g. {_EXAMPLES[section]}")
    entries = []
    for group in node.parts:
        tags = tuple(_tag(item, section) for item in group.parts) if group.kind == "list" else ()
        right = len(tags) == 2 if section == "flip_pairs" else len(tags) > 1
        if not right or len(set(tags)) < len(tags):
            what = "two different tags" if section == "flip_pairs" else "two or more different tags"
            raise _error(group.line, f"{section}: a group has {what}, e.g. {_EXAMPLES[section]}")
        entries.append(_Entry(group.line, tags[0], tags))
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


def _tag(node: _Node, section: str) -> str:
    tag = _text(node, f"{section}: an entry")
    if not tag or clean_tag(tag) != tag:
        raise _error(node.line, f"{section}: {tag!r} is not a tag; expected text without stray white space")
    return tag


def _text(node: _Node, what: str) -> str:
    if node.kind != "text":
        raise _error(node.line, f"{what} is a list or a table; expected one text")
    text = node.text
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _error(node.line, f"{what} has half a character (\\u escapes in pairs); write the character itself")
    return text


def _error(line: int, message: str) -> OntologyError:
    return OntologyError(f"line {line}: {message}")
