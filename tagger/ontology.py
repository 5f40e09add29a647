"""What tags mean to each other: other names, implications, tags that exclude each other, and left/right pairs.

Names go in, index arrays come out: which outputs of a model each tag of a data set stands for, and how the outputs
relate. `tagger/ontology_file.py` reads and refuses files; what is built here holds together.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from tagger.errors import InputError
from tagger.files import write_json

FORMAT_VERSION = 1
ONTOLOGY_FILE = "ontology.json"  # the copy in a run's folder and in a model's
# A chain of 3,000 tags, or 100,000 tags with 50 ancestors each; real ontologies stay below a tenth of it.
MAX_CLOSURE_PAIRS = 5_000_000

Value = TypeVar("Value", np.float32, np.float64, np.int16, np.bool_)


class OntologyError(InputError):
    """An ontology that its author can mend; the message is one line that names the entry."""


@dataclass(frozen=True)
class Ontology:
    """An ontology as read; only canonical tags stand outside `aliases`.

    aliases: every alias and its canonical tag. implications: a tag and the parents named for it. exclusive: groups of
    which an image has one tag at most. flip_pairs: tags that change places when an image is mirrored. source: for
    messages.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exclusive: tuple[tuple[str, ...], ...] = ()
    flip_pairs: tuple[tuple[str, str], ...] = ()
    source: str = field(default="the ontology", compare=False)

    def canonical(self, tag: str) -> str:
        """The tag that a tag is another name of; itself where it is none."""
        return self.aliases.get(tag, tag)

    def closed(self, tag: str) -> tuple[str, ...]:
        """What an image with this tag has: the canonical tag, then all that it implies."""
        name = self.canonical(tag)
        return (name, *self.ancestors.get(name, ()))

    def givers(self, tag: str, tags: Iterable[str]) -> list[str]:
        """Those of an image's tags, but for `tag` itself, that give it this tag: those that imply or rename it."""
        return [each for each in tags if each != tag and self.canonical(tag) in self.closed(each)]

    @cached_property
    def ancestors(self) -> Mapping[str, tuple[str, ...]]:
        """All that each tag implies, directly or through others, sorted. Raises OntologyError for a circle."""
        done: dict[str, tuple[str, ...]] = {}
        num_pairs = 0
        for start in self.implications:
            path: dict[str, None] = {}  # in the order of descent
            waiting = [start]
            while waiting:
                tag = waiting[-1]
                if tag in done:
                    waiting.pop()
                    continue
                path.setdefault(tag)
                parents = self.implications.get(tag, ())
                if open_parents := [parent for parent in parents if parent not in done]:
                    if open_parents[0] in path:
                        circle = [*path][[*path].index(open_parents[0]) :]
                        raise OntologyError(f"implications go in a circle: {_chain([*circle, circle[0]])}; remove one")
                    waiting.append(open_parents[0])
                    continue
                found = {*parents, *(above for parent in parents for above in done[parent])}
                num_pairs += len(found)
                if num_pairs > MAX_CLOSURE_PAIRS:
                    raise OntologyError(
                        f"the implications say more than {MAX_CLOSURE_PAIRS:,} things about pairs of tags; shorten "
                        "their chains"
                    )
                done[tag] = tuple(sorted(found))
                del path[tag]
                waiting.pop()
        return {tag: above for tag, above in done.items() if above}

    @property
    def tags(self) -> frozenset[str]:
        """Every tag that the ontology names, aliases included."""
        parents = {parent for found in self.implications.values() for parent in found}
        groups = {tag for group in (*self.exclusive, *self.flip_pairs) for tag in group}
        return frozenset(self.aliases.keys() | self.aliases.values() | self.implications.keys() | parents | groups)

    @cached_property
    def sha256(self) -> str:
        """Hash over what the ontology says, whatever the order and detours in which its file says it."""
        content = [
            sorted(self.aliases.items()),
            sorted(self.ancestors.items()),
            sorted(sorted(group) for group in self.exclusive),
            sorted(sorted(pair) for pair in self.flip_pairs),
        ]
        return hashlib.sha256(orjson.dumps(content)).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as JSON that `read_ontology` reads back, atomically."""
        content = {
            "format_version": FORMAT_VERSION,
            "sha256": self.sha256,
            "aliases": dict(sorted(self.aliases.items())),
            "implications": {tag: list(parents) for tag, parents in sorted(self.implications.items())},
            "exclusive": [list(group) for group in self.exclusive],
            "flip_pairs": [list(pair) for pair in self.flip_pairs],
        }
        write_json(path, content)

    def describe(self, data_tags: Iterable[str]) -> str:
        """One line for a log: what there is of each kind, and how many of the tags no image has or implies."""
        present = {name for tag in data_tags for name in (tag, *self.closed(tag))}
        absent = sorted(self.tags - present)
        examples = f", e.g. {', '.join(absent[:3])}" if absent else ""
        return (
            f"{self.source} (sha256 {self.sha256[:12]}): {len(self.aliases)} aliases, {len(self.implications)} tags "
            f"with implications, {len(self.exclusive)} exclusive groups, {len(self.flip_pairs)} flip pairs; "
            f"{len(absent)} of its {len(self.tags)} tags are on no image{examples}"
        )

    def require_canonical(self, tags: Iterable[str], where: str) -> None:
        """Raise OntologyError when one of the outputs of a model is an alias: no image would ever have it."""
        for tag in tags:
            if tag in self.aliases:
                raise OntologyError(
                    f"{where} has the tag '{tag}', which {self.source} makes an alias of '{self.aliases[tag]}'; take "
                    "the alias out, or make a vocabulary with this ontology"
                )

    def check_mirror(self, mirror: Callable[[str], str], forbids: Callable[[str], bool]) -> None:
        """Raise OntologyError where mirroring the tags of an image and adding what they imply depends on the order.

        mirror: the tag of the mirrored image, its own inverse. forbids: whether the tag keeps images from being
        mirrored at all, so that nothing is asked of it.
        """
        for tag in sorted({*self.implications, *map(mirror, self.implications)}):
            closed = self.closed(tag)
            if any(forbids(name) for name in closed):
                continue
            mirrored = mirror(tag)
            if mirrored in self.aliases:
                raise OntologyError(
                    f"{self.source}: '{tag}' becomes '{mirrored}' when its image is mirrored, but that is an alias of "
                    f"'{self.aliases[mirrored]}'; name both canonical tags in flip_pairs"
                )
            wanted = {mirror(name) for name in closed}
            if missing := sorted(wanted - {*self.closed(mirrored)}):
                raise OntologyError(
                    f"{self.source}: '{tag}' implies '{mirror(missing[0])}', so its mirror '{mirrored}' must imply "
                    f"'{missing[0]}'; add it to the implications of '{mirrored}'"
                )


@dataclass(frozen=True)
class Expansion:
    """What the tags of one list are in another: tag i is `values[offsets[i]:offsets[i + 1]]`, both int64."""

    offsets: NDArray[np.int64]
    values: NDArray[np.int64]


def expand(ontology: Ontology, names: Sequence[str], number_of: Callable[[str], int | None]) -> Expansion:
    """For each name the numbers of its closed set, without the tags that have none."""
    lists = [[n for name in ontology.closed(tag) if (n := number_of(name)) is not None] for tag in names]
    offsets = np.zeros(len(names) + 1, dtype=np.int64)
    np.cumsum([len(numbers) for numbers in lists], out=offsets[1:])
    values = np.fromiter((n for numbers in lists for n in numbers), dtype=np.int64, count=int(offsets[-1]))
    return Expansion(offsets, values)


@dataclass(frozen=True)
class TagRelations:
    """How the outputs of a model relate; all int64, indices of outputs.

    child, parent: [E], every output and each output that it implies, by parent and then by child; detours through tags
    that are no output count. group_offsets [G + 1], members: the exclusive groups with at least two outputs.
    """

    child: NDArray[np.int64]
    parent: NDArray[np.int64]
    group_offsets: NDArray[np.int64]
    members: NDArray[np.int64]

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets) - 1

    def group(self, number: int) -> tuple[int, ...]:
        """The outputs of one exclusive group."""
        start, stop = self.group_offsets[number : number + 2]
        return tuple(self.members[start:stop].tolist())


def relate(ontology: Ontology, tags: Sequence[str]) -> TagRelations:
    """The relations of a model's outputs. Raises OntologyError when an output is an alias."""
    ontology.require_canonical(tags, "the model")
    index_of = {tag: index for index, tag in enumerate(tags)}
    pairs = sorted(
        (index_of[above], index)
        for tag, index in index_of.items()
        for above in ontology.ancestors.get(tag, ())
        if above in index_of
    )
    parent, child = np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy()
    known = [[index_of[tag] for tag in group if tag in index_of] for group in ontology.exclusive]
    groups = [group for group in known if len(group) > 1]
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)]).astype(np.int64)
    return TagRelations(child, parent, offsets, np.array([i for group in groups for i in group], dtype=np.int64))


def close_up(values: NDArray[Value], relations: TagRelations, *, tags_first: bool = False) -> NDArray[Value]:
    """A copy of scores or decisions in which no output is below one that implies it: max(own, all descendants').

    values: [N, C], or [C, N] with `tags_first`, which saves turning them. Closing twice changes nothing. Takes the
    memory of N x E values on top of the copy. NaN spreads to ancestors.
    """
    # Tags first, so that a tag's values are gathered as one piece of memory.
    closed = values.copy() if tags_first else np.ascontiguousarray(values.T)
    if len(relations.parent):
        starts = np.flatnonzero(np.diff(relations.parent, prepend=-1))
        highest = np.maximum.reduceat(closed[relations.child], starts, axis=0)
        parents = relations.parent[starts]
        closed[parents] = np.maximum(closed[parents], highest)
    return closed if tags_first else np.ascontiguousarray(closed.T)


def _chain(tags: Collection[str]) -> str:
    return " -> ".join(f"'{tag}'" for tag in tags)
