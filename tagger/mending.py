"""From suspected labels that somebody accepted to lines of the journal, and back; with sidecars only where asked.

A sidecar is written after its correction is in the journal and its first bytes are kept beside it, and restored before
the journal says that it is undone: whenever the process is killed, what the journal says can be carried out. Refuses,
one line each and before anything is written: what is not there, a tag that no image has, a sidecar that has changed.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tagger.data.correction_log import (
    RATING_TAGS,
    Action,
    Change,
    CorrectionLog,
    ImageKey,
    LastTagError,
    SidecarEdit,
    WrittenSidecar,
    change_tags,
    state_of,
    utc_now,
)
from tagger.data.corrections import RowFinder
from tagger.data.index import MetadataIndex
from tagger.data.pairs import SUFFIXES
from tagger.data.scan import printable
from tagger.data.sidecar import SidecarError, clean_tag
from tagger.data.sidecar_edit import edit_sidecar
from tagger.errors import InputError
from tagger.files import FormatError, NewerFormatError, write_atomic
from tagger.ontology import Ontology
from tagger.suspects import FORMAT_VERSION

_ACTIONS: dict[str, Action] = {"missing": "add", "wrong": "remove"}


@dataclass(frozen=True)
class Wanted:
    """An accepted line: `tag` is to be added to an image or removed. root, state: None where the line does not say."""

    line: int
    image: str
    tag: str
    action: Action
    root: str | None
    state: str | None


@dataclass
class MendingPlan:
    """What is to be written, and what is not: lines that are needless, lines to look at, lines that are refused."""

    changes: list[Change] = field(default_factory=list)
    sidecars: dict[Path, bytes] = field(default_factory=dict)
    originals: dict[str, bytes] = field(default_factory=dict)
    needless: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def read_accepted(path: Path, *, everything: bool = False, above: float | None = None) -> list[Wanted]:
    """The accepted lines of a file of suspects, with or without its header.

    Accepted are lines with `"accept": true`; with `everything` all lines, with `above` those of at least that strength,
    but never one with `"accept": false`. Raises FormatError.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FormatError(f"suspects {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"suspects {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    accepted: list[Wanted] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if number == 1 and "format_version" in entry:
                _check_version(path, entry["format_version"])
                continue
            wanted = _wanted(number, entry)
            accept = entry.get("accept")
            if accept is not None and type(accept) is not bool:
                raise ValueError(f'"accept" is {json.dumps(accept)}; write true or false')
            if accept is None:
                accept = everything or (above is not None and float(entry["strength"]) >= above)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FormatError(f"suspects {path} line {number} is not a suspect: {what}") from error
        if accept:
            accepted.append(wanted)
    return accepted


def require_roots(path: Path, roots: Sequence[Path]) -> None:
    """Raise InputError where the header of a file of suspects says that they are of other folders than these."""
    with path.open("rb") as stream:
        first = stream.readline()
    try:
        there = json.loads(first.decode("utf-8-sig")).get("roots")
    except (ValueError, AttributeError):
        return  # what is no header is read as a line
    here = [str(root) for root in roots]
    if there is not None and there != here:
        raise InputError(
            f"the suspects in {path} are of {', '.join(map(str, there))}, the run's data.roots are {', '.join(here)}; "
            "where these are the same images, say where they are now with --roots"
        )


def plan_mending(
    index: MetadataIndex,
    log: CorrectionLog,
    accepted: Sequence[Wanted],
    *,
    vocabulary: Collection[str] = (),
    ontology: Ontology | None = None,
    new_tags: bool = False,
    even_if_changed: bool = False,
    write_sidecars: bool = False,
) -> MendingPlan:
    """Look at every accepted line against the data set, corrected by `log` so far. Writes nothing.

    vocabulary: tags that the model learns (empty: not known). ontology: of the model; a tag that another one gives is
    not removed, as that would change nothing. new_tags: allow tags that no image has.
    """
    planner = _Planner(index, log, vocabulary, ontology, new_tags=new_tags, even_if_changed=even_if_changed)
    if ontology is not None:  # what implies a tag goes first, so that both can go
        accepted = sorted(accepted, key=lambda each: (each.action == "remove", -len(ontology.closed(each.tag))))
    for wanted in accepted:
        planner.take(wanted)
    if write_sidecars:
        _plan_sidecars(planner.plan, log)
    return planner.plan


class _Planner:
    """Judges accepted lines one after the other, each against what the ones before it make of its image."""

    def __init__(
        self,
        index: MetadataIndex,
        log: CorrectionLog,
        vocabulary: Collection[str],
        ontology: Ontology | None,
        *,
        new_tags: bool,
        even_if_changed: bool,
    ) -> None:
        self.plan = MendingPlan()
        self._index = index
        self._finder = RowFinder(index)
        self._last_id = log.last_id
        self._vocabulary = frozenset(vocabulary)
        self._ontology = ontology
        self._new_tags = new_tags
        self._even_if_changed = even_if_changed
        counts = zip(index.tag_names, index.tag_counts().tolist(), strict=True)
        self._known = {name for name, count in counts if count} | RATING_TAGS.keys()
        self._tags: dict[int, tuple[tuple[str, ...], str | None]] = {}
        # A sidecar that has changed because we wrote it is as good as unchanged.
        self._states: dict[ImageKey, set[str]] = {}
        for change in log.changes.values():
            self._states.setdefault(change.key, set()).add(change.state)

    def take(self, wanted: Wanted) -> None:
        """Add a line to the plan, as a change or as one that is needless or refused."""
        where = f"line {wanted.line}: {printable(wanted.image)}"
        path = Path(wanted.image)
        row = self._finder.row_of_file(path) if path.is_absolute() else self._finder.row_of(wanted.root, wanted.image)
        if row is None:
            self.plan.refused.append(f"{where}: no such image in the data set, or one in several of its folders")
            return
        root, image = self._index.locate(row)
        key = str(self._index.roots[root]), image
        state = state_of(self._index.sidecar_record(row))
        if not self._even_if_changed and wanted.state not in {None, state, *self._states.get(key, ())}:
            reason = "its sidecar has changed since; evaluate again, or pass --even-if-changed"
            self.plan.refused.append(f"{where}: {reason}")
            return
        if row not in self._tags:
            record = self._index.record(row)
            self._tags[row] = record.tags, record.rating
        before = self._tags[row]
        ontology = self._ontology if wanted.action == "remove" else None
        if ontology is not None and (givers := ontology.givers(wanted.tag, before[0])):
            listed = ", ".join(f"'{giver}'" for giver in givers)
            self.plan.refused.append(f"{where}: '{wanted.tag}' is implied by {listed}: correct that")
            return
        try:
            after = change_tags(*before, wanted.action, wanted.tag)
        except LastTagError as error:
            self.plan.refused.append(f"{where}: {error}; take the image out of the data set instead")
            return
        if after is None:
            says = "has" if wanted.action == "add" else "does not have"
            self.plan.needless.append(f"{where}: it {says} '{wanted.tag}' already")
            return
        if not self._may_add(wanted.tag, where):
            return
        self._tags[row] = after
        self.plan.changes.append(
            Change(
                id=self._last_id + 1 + len(self.plan.changes),
                time=utc_now(),
                action=wanted.action,
                tag=wanted.tag,
                root=key[0],
                image=image,
                image_id=f"{int(self._index.image_ids[row]):016x}",
                before=before,
                state=state,
            )
        )

    def _may_add(self, tag: str, where: str) -> bool:
        """Whether the tag is one of the data set, or a new one is welcome."""
        if tag not in self._known and not self._new_tags:
            near = difflib.get_close_matches(tag, sorted(self._known), n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            reason = f"no image has the tag '{tag}'{hint}; --new-tags adds it as a new one"
            self.plan.refused.append(f"{where}: {reason}")
            return False
        if self._vocabulary and tag not in self._vocabulary:
            note = f"'{tag}' is not in the vocabulary; it corrects the data, not that model"
            self.plan.notes.append(f"{where}: {note}")
        return True


def carry_out(plan: MendingPlan, log: CorrectionLog) -> None:
    """Keep the sidecars' first bytes, write the journal, then the sidecars."""
    for name, content in plan.originals.items():
        write_atomic(log.originals / name, content)
    log.append(plan.changes)
    for path, content in plan.sidecars.items():
        write_atomic(path, content)


def undo(log: CorrectionLog, ids: Sequence[int], *, dry_run: bool = False) -> list[str]:
    """Take corrections back, sidecars included; gives a line for each. Raises InputError, having written nothing.

    A sidecar gets its first bytes again when its last correction is undone.
    """
    for number in ids:
        if number not in log.changes:
            raise InputError(f"there is no correction {number} in {log.path}; --list shows them")
        if number in log.undone:
            raise InputError(f"correction {number} is undone already, since {log.undone[number]}")
    by_image: dict[ImageKey, list[int]] = {}
    for number in dict.fromkeys(ids):
        by_image.setdefault(log.changes[number].key, []).append(number)
    restored = {key: _restored(log, key, numbers) for key, numbers in by_image.items()}
    lines = [f"undone: {describe(log.changes[number])}" for number in dict.fromkeys(ids)]
    if dry_run:
        return lines
    for key, numbers in by_image.items():
        found = restored[key]
        if found is None:
            log.append_undo(numbers)
            continue
        path, content = found
        write_atomic(path, content)
        log.append_undo(numbers, _sha256(content))
    return lines


def describe(change: Change) -> str:
    """A correction in one line."""
    where = "; in its sidecar too" if change.sidecar is not None else ""
    image = printable(f"{change.root}/{change.image}")
    return f"{change.id}  {change.time}  {change.action} '{change.tag}'  {image}{where}"


def _plan_sidecars(plan: MendingPlan, log: CorrectionLog) -> None:
    """The bytes of each sidecar with its corrections; what cannot be written is refused."""
    by_image: dict[ImageKey, list[int]] = {}
    first_id = plan.changes[0].id if plan.changes else 0
    refused: set[int] = set()
    for place, change in enumerate(plan.changes):
        by_image.setdefault(change.key, []).append(place)
    for key, places in by_image.items():
        name = printable(key[1])
        try:
            path = _sidecar_path(key)
            found = path.read_bytes()
            original, changes = _sha256(found), [plan.changes[place] for place in places]
            held = log.sidecars.get(key)
            first = found
            if held is not None and original in (held.written, held.original):  # ours, or we were killed before writing
                original, first = held.original, _original(log, held)
                changes = [*(log.changes[number] for number in held.ids), *changes]
            content = edit_sidecar(first, [(change.action, change.tag) for change in changes])
        except (SidecarError, LastTagError, InputError) as error:
            plan.refused.append(f"{name}: its sidecar cannot be written: {error}")
            refused.update(places)
            continue
        if content == found:
            reason = "the tag comes from another field, or from an earlier correction"
            plan.refused.append(f"{name}: its sidecar cannot be written: {reason}")
            refused.update(places)
            continue
        plan.originals[original] = first
        plan.sidecars[path] = content
        for place in places:
            plan.changes[place] = replace(plan.changes[place], sidecar=SidecarEdit(original, _sha256(content)))
    kept = [change for place, change in enumerate(plan.changes) if place not in refused]
    plan.changes = [replace(change, id=number) for number, change in enumerate(kept, first_id)]


def _restored(log: CorrectionLog, key: ImageKey, numbers: Sequence[int]) -> tuple[Path, bytes] | None:
    """The sidecar of an image without some corrections; None where they were never written to it."""
    written = [number for number in numbers if log.changes[number].sidecar is not None]
    if not written:
        return None
    held = log.sidecars.get(key)
    path = _sidecar_path(key)
    if held is None or not set(written) <= set(held.ids):
        raise InputError(_changed(path, written))
    if _sha256(path.read_bytes()) not in (held.written, held.original):
        raise InputError(_changed(path, written))
    content = _original(log, held)
    left = [log.changes[number] for number in held.ids if number not in written]
    try:
        return path, edit_sidecar(content, [(change.action, change.tag) for change in left])
    except (SidecarError, LastTagError) as error:
        raise InputError(f"{printable(path)} cannot be written without these corrections: {error}") from error


def _original(log: CorrectionLog, held: WrittenSidecar) -> bytes:
    path = log.originals / held.original
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}, a sidecar as it was, cannot be read: {error.strerror or error}") from error
    if _sha256(content) != held.original:
        raise InputError(f"{path} is damaged: its content is not that of its name; bring it back from a copy")
    return content


def _changed(path: Path, numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"{printable(path)} has changed since corrections {listed} were written to it; mend it by hand"


def _sidecar_path(key: ImageKey) -> Path:
    image = Path(key[0]) / key[1]
    for suffix in SUFFIXES:
        path = image.with_name(image.name[: image.name.rfind(".")] + suffix)
        if path.is_file():
            return path
    raise InputError(f"{printable(image)} has no sidecar beside it")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_version(path: Path, version: object) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version {version!r} is not a number")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"suspects {path} have format_version {version}, this program reads up to {FORMAT_VERSION}; "
            "update the program"
        )


def _wanted(number: int, entry: dict[str, Any]) -> Wanted:
    image, tag, kind = entry["image"], entry["tag"], entry["kind"]
    for name in ("image", "tag"):
        if not isinstance(entry[name], str) or not entry[name]:
            raise TypeError(f"{name} {entry[name]!r} is not a text")
    for name in ("root", "state"):
        if not isinstance(entry.get(name, ""), str):
            raise TypeError(f"{name} {entry[name]!r} is not a text")
    if clean_tag(tag) != tag:
        raise ValueError(f"tag {tag!r} has stray white space or control characters")
    if kind not in _ACTIONS:
        raise ValueError(f"kind {kind!r} is not known; write missing or wrong")
    return Wanted(number, image, tag, _ACTIONS[kind], entry.get("root"), entry.get("state"))
