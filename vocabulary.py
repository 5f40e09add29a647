"""Which tags a model learns: tag <-> index, counts, categories and a hash that ties weights to their tags.

The order is part of the format: ratings, then general tags, then characters, then other categories; the more frequent
first, then by name. Consumers slice by it. There is no padding or unknown entry: a tag outside the vocabulary is no
target. Refuses an empty vocabulary, a tag that comes twice, and files that do not match their hash.
"""

import argparse
import csv
import difflib
import hashlib
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from Configuration_System import VocabularySection
from tagger.command import command
from tagger.data.closed_counts import closed_counts
from tagger.data.index import MetadataIndex, open_index
from tagger.data.sidecar import RATINGS, clean_tag
from tagger.errors import InputError
from tagger.files import FormatError, read_json, write_json
from tagger.ontology import ONTOLOGY_FILE, Ontology
from tagger.ontology_file import read_ontology
from tagger.options import Parser, input_file, output_file, whole

FORMAT_VERSION = 1
RATING_PREFIX = "rating:"
RATING_TAGS = tuple(RATING_PREFIX + rating for rating in RATINGS)
DEFAULT_INDEX_DIR = Path(".tagsmith/index")
_FIRST_CATEGORIES = ("rating", "general", "character")
# The numbers that published tag tables use for categories.
_CATEGORY_NUMBERS = {"9": "rating", "0": "general", "4": "character", "3": "copyright", "1": "artist"}
_PLACEHOLDERS = frozenset({"<PAD>", "<UNK>"})

_log = logging.getLogger(__name__)


class VocabularyError(InputError):
    """Tags, counts or lists of tags that their owner can mend; the message is one line."""


class TagVocabulary:
    """Tags in the order of a model's outputs. Immutable.

    `tags[i]`, `counts[i]` (int64: rows of the data set that carry it) and `categories[i]` describe output `i`.
    """

    def __init__(self, tags: Sequence[str], counts: Sequence[int], categories: Sequence[str]) -> None:
        """Take the order as given; `from_counts` makes the standard one. Raises VocabularyError."""
        if not len(tags) == len(counts) == len(categories):
            raise VocabularyError(
                f"{len(tags)} tags, {len(counts)} counts and {len(categories)} categories; give one of each per tag"
            )
        if not tags:
            raise VocabularyError("a vocabulary needs at least one tag")
        self.tags = tuple(tags)
        self.categories = tuple(categories)
        self.counts: NDArray[np.int64] = np.array(counts, dtype=np.int64)
        self.counts.flags.writeable = False
        self._index = {tag: index for index, tag in enumerate(self.tags)}
        if len(self._index) != len(self.tags):
            twice = next(tag for index, tag in enumerate(self.tags) if self._index[tag] != index)
            raise VocabularyError(f"tag '{twice}' is there twice; a tag has one index")
        for tag in self.tags:
            # A line break would let two lists of names share one hash, and break tables of one tag a line.
            if not tag or clean_tag(tag) != tag:
                raise VocabularyError(
                    f"{tag!r} is not a tag: it is empty or has stray white space or control characters"
                )
        if (self.counts < 0).any():
            raise VocabularyError(f"tag '{self.tags[int(self.counts.argmin())]}' has a negative count")

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], categories: Mapping[str, str] | None = None) -> "TagVocabulary":
        """The standard order of these tags. `categories` names what is not general; RATING_TAGS are ratings."""
        table = categories or {}

        def category(tag: str) -> str:
            return "rating" if tag in RATING_TAGS else table.get(tag, "general")

        def position(tag: str) -> tuple[int, str, int, str]:
            name = category(tag)
            first = _FIRST_CATEGORIES.index(name) if name in _FIRST_CATEGORIES else len(_FIRST_CATEGORIES)
            return first, name, -counts[tag], tag

        tags = sorted(counts, key=position)
        return cls(tags, [counts[tag] for tag in tags], [category(tag) for tag in tags])

    def __len__(self) -> int:
        return len(self.tags)

    def __contains__(self, tag: object) -> bool:
        return tag in self._index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TagVocabulary):
            return NotImplemented
        return (
            self.tags == other.tags
            and self.categories == other.categories
            and bool(np.array_equal(self.counts, other.counts))
        )

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"TagVocabulary({len(self)} tags, sha256 {self.sha256[:12]})"

    def index(self, tag: str) -> int:
        """Index of a tag; raises VocabularyError, naming the nearest tags, when it is not there."""
        found = self._index.get(tag)
        if found is None:
            near = difflib.get_close_matches(tag, self.tags, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
            raise VocabularyError(f"tag {tag!r} is not in the vocabulary of {len(self):,} tags{hint}")
        return found

    def get(self, tag: str) -> int | None:
        """Index of a tag, or None when it is not there."""
        return self._index.get(tag)

    def tag(self, index: int) -> str:
        """Tag of an index, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"tag index {index} is not in 0..{len(self) - 1}")
        return self.tags[index]

    @cached_property
    def sha256(self) -> str:
        """Hash over the names in order, joined by line feeds, in UTF-8."""
        return hashlib.sha256("\n".join(self.tags).encode()).hexdigest()

    @cached_property
    def rating_indices(self) -> tuple[int, ...]:
        """Indices of the rating tags, in order; empty when ratings are not learned."""
        return tuple(index for index, category in enumerate(self.categories) if category == "rating")

    def save(self, path: Path | str) -> None:
        """Write `vocabulary.json`, atomically."""
        rows = zip(self.tags, self.categories, self.counts, strict=True)
        content = {
            "format_version": FORMAT_VERSION,
            "sha256": self.sha256,
            "tags": [{"name": tag, "category": category, "count": int(count)} for tag, category, count in rows],
        }
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: Path | str) -> "TagVocabulary":
        """Read `vocabulary.json`, or a vocabulary of other trainers (`tag_to_index`, `index_to_tag`).

        Raises FormatError when it is missing, damaged, newer, or does not match its hash.
        """
        path = Path(path)
        foreign = _read_foreign(path)
        try:
            if foreign is not None:
                return _from_foreign(foreign)
            content = read_json(path, "vocabulary", FORMAT_VERSION)
            vocabulary = _from_rows(content["tags"])
        except VocabularyError as error:
            raise FormatError(f"vocabulary {path}: {error}") from error
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise FormatError(
                f"vocabulary {path} has not the form of a vocabulary ({type(error).__name__}: {error}); make it anew"
            ) from error
        if content.get("sha256") != vocabulary.sha256:
            raise FormatError(
                f"vocabulary {path} does not match its sha256: its tags were changed after it was written; "
                "restore it, or make a new one (a model fits only the vocabulary it was trained with)"
            )
        return vocabulary


def create_vocabulary_from_datasets(
    roots: Sequence[str | Path],
    min_frequency: int,
    ignore: Iterable[str] = (),
    extra_fields: Sequence[str] = (),
    ratings: Literal["tags", "ignore"] = "tags",
    *,
    index_dir: Path | str = DEFAULT_INDEX_DIR,
    categories: Mapping[str, str] | None = None,
    annotations: Path | str | None = None,
) -> TagVocabulary:
    """Index `roots` (or reuse the index in `index_dir`) and count its tags; see `open_index`, `build_vocabulary`."""
    index = open_index(
        roots,
        Path(index_dir),
        extra_fields=extra_fields,
        annotations=None if annotations is None else Path(annotations),
    )
    return build_vocabulary(index, min_frequency, ignore, ratings, categories)


def build_vocabulary(
    index: MetadataIndex,
    min_frequency: int,
    ignore: Iterable[str] = (),
    ratings: Literal["tags", "ignore"] = "tags",
    categories: Mapping[str, str] | None = None,
    ontology: Ontology | None = None,
) -> TagVocabulary:
    """The tags that at least `min_frequency` rows of the index carry, without those in `ignore`.

    With an ontology a row carries canonical tags and what they imply, and an ignored alias is its tag ignored.

    With `ratings="tags"` each rating is a tag `rating:<word>`, unless all rated rows have the same one, which teaches
    nothing. Raises VocabularyError when no tag is left.
    """
    if min_frequency < 1:
        raise VocabularyError(f"vocabulary.min_frequency={min_frequency} is below 1; use 1 to keep every tag")
    if ratings not in ("tags", "ignore"):
        raise VocabularyError(f"vocabulary.ratings={ratings!r} is not known; use tags or ignore")
    if isinstance(ignore, str):
        raise VocabularyError(f"ignore={ignore!r} is one text; give a list of tags, or read_ignore_file(path)")
    counts = _count_tags(index, ontology)
    if ratings == "tags":
        counts.update(_count_ratings(index))
    for tag in {clean_tag(tag) for tag in ignore}:
        counts.pop(tag if ontology is None else ontology.canonical(tag), None)
    kept = {tag: count for tag, count in counts.items() if count >= min_frequency}
    if not kept:
        if not counts:
            raise VocabularyError("no tag is left: the ignore list covers every tag of the data set")
        top = max(counts, key=lambda tag: (counts[tag], tag))
        raise VocabularyError(
            f"no tag occurs at least {min_frequency:,} times: found {len(counts):,} distinct tags, the most frequent "
            f"'{top}' has count {counts[top]:,}; lower vocabulary.min_frequency to {counts[top]} or less"
        )
    return TagVocabulary.from_counts(kept, categories)


def open_ontology(section: VocabularySection, index: MetadataIndex, known_vocabulary: Path) -> Ontology | None:
    """The ontology of a run: its own copy where it has a vocabulary, else the configured one; None without one.

    `known_vocabulary` is where the run keeps its vocabulary. Raises OntologyError, FormatError.
    """
    own = known_vocabulary.with_name(ONTOLOGY_FILE)
    configured = None if section.ontology_file is None else Path(section.ontology_file)
    if known_vocabulary.exists() and not own.exists() and configured is not None:
        raise FormatError(
            f"vocabulary.ontology_file={configured}, but the run has no {own}: it began without one or lost its "
            "copy; set it to null, put the copy back, or start a new run with --init-from"
        )
    path = configured if not known_vocabulary.exists() else own if own.exists() else None
    ontology = None if path is None else read_ontology(path)
    if ontology is not None:
        _log.info("%s", ontology.describe(index.tag_names))
    return ontology


def configured_vocabulary(
    section: VocabularySection, index: MetadataIndex, ontology: Ontology | None = None
) -> TagVocabulary:
    """The vocabulary that a recipe asks for: `vocabulary.file` where it is set, else made from the index."""
    if section.file is not None:
        vocabulary = TagVocabulary.load(section.file)
        if ontology is not None:
            ontology.require_canonical(vocabulary.tags, f"vocabulary.file: {section.file}")
        return vocabulary
    return build_vocabulary(
        index,
        section.min_frequency,
        ignore=() if section.ignore_file is None else read_ignore_file(section.ignore_file),
        ratings=section.ratings,
        categories={} if section.categories_file is None else read_categories_file(section.categories_file),
        ontology=ontology,
    )


def tag_shares(
    index: MetadataIndex, vocabulary: TagVocabulary, ontology: Ontology | None = None
) -> NDArray[np.float64]:
    """Share of the index's images that carry each tag, [C] 0..1, whatever data the vocabulary was made from."""
    counts = _count_tags(index, ontology)
    counts |= {RATING_PREFIX + rating: count for rating, count in index.rating_counts().items()}
    return np.array([counts.get(tag, 0) for tag in vocabulary.tags], dtype=np.float64) / len(index)


def read_ignore_file(path: Path | str) -> tuple[str, ...]:
    """Tags to leave out: one a line, UTF-8; lines that begin with `#` are comments."""
    lines = (line.strip() for line in _read_text(Path(path), "vocabulary.ignore_file").splitlines())
    return tuple(dict.fromkeys(clean_tag(line) for line in lines if line and not line.startswith("#")))


def read_categories_file(path: Path | str) -> dict[str, str]:
    """Category of each tag in a CSV table with the columns `name` and `category` (others are passed over).

    A category is a word or one of the numbers 0 general, 1 artist, 3 copyright, 4 character, 9 rating.
    """
    setting = "vocabulary.categories_file"
    reader = csv.DictReader(_read_text(Path(path), setting).splitlines())
    missing = {"name", "category"} - set(reader.fieldnames or ())
    if missing:
        raise VocabularyError(
            f"{setting}: {path} has no column {' and '.join(sorted(missing))}; begin with name,category"
        )
    table: dict[str, str] = {}
    for row in reader:
        name, category = clean_tag(row["name"] or ""), clean_tag(row["category"] or "").lower()
        category = _CATEGORY_NUMBERS.get(category, category)
        where = f"{setting}: {path} line {reader.line_num}"
        if not name or not category or category.isdecimal():
            raise VocabularyError(f"{where}: '{name},{category}' is not a tag and its category, e.g. red_ball,general")
        if (category == "rating") != (name in RATING_TAGS):
            raise VocabularyError(f"{where}: the category rating is that of {', '.join(RATING_TAGS)}; correct '{name}'")
        if table.setdefault(name, category) != category:
            raise VocabularyError(f"{where}: '{name}' is {category} here and {table[name]} before; keep one")
    return table


def _count_tags(index: MetadataIndex, ontology: Ontology | None) -> dict[str, int]:
    if ontology is not None:
        return closed_counts(index, ontology)
    return dict(zip(index.tag_names, index.tag_counts().tolist(), strict=True))


def _count_ratings(index: MetadataIndex) -> dict[str, int]:
    counts = index.rating_counts()
    if len(counts) == 1:
        rating, count = next(iter(counts.items()))
        _log.warning(
            "every rated image (%d) is %s: a rating with a single value teaches nothing and is dropped", count, rating
        )
        return {}
    return {RATING_PREFIX + rating: count for rating, count in counts.items()}


def _read_text(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise VocabularyError(f"{setting}: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{setting}: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> TagVocabulary:
    for row in rows:
        for key, kind in (("name", str), ("category", str), ("count", int)):
            if type(row[key]) is not kind:
                raise TypeError(f"{key} is {row[key]!r}")
    return TagVocabulary(
        [row["name"] for row in rows], [row["count"] for row in rows], [row["category"] for row in rows]
    )


def _read_foreign(path: Path) -> dict[str, Any] | None:
    """The content of a vocabulary file of another trainer; None leaves any other file to our own reader."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    foreign = isinstance(content, dict) and "format_version" not in content
    return content if foreign and ("tag_to_index" in content or "index_to_tag" in content) else None


def _from_foreign(content: Mapping[str, Any]) -> TagVocabulary:
    """Its tags in index order, without padding and unknown entries. Such files name no categories but ratings'."""
    if "tag_to_index" in content:
        pairs = [(int(index), tag) for tag, index in content["tag_to_index"].items()]
    else:
        pairs = [(int(index), tag) for index, tag in content["index_to_tag"].items()]
    if len({index for index, _ in pairs}) != len(pairs):
        raise VocabularyError("two tags share an index; tag_to_index must number them")
    tags = [tag for _, tag in sorted(pairs) if tag not in _PLACEHOLDERS]
    frequencies = content.get("tag_frequencies") or {}
    counts = [int(frequencies.get(tag, 0)) for tag in tags]
    return TagVocabulary(tags, counts, ["rating" if tag in RATING_TAGS else "general" for tag in tags])


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="vocabulary.py",
        description="Count the tags of a data set and write the vocabulary that a model learns.",
        epilog="example: python vocabulary.py data/demo --min-frequency 20 --output vocabulary.json",
    )
    parser.add_argument("roots", nargs="+", metavar="ROOT", help="folder of images with sidecars")
    parser.add_argument(
        "--min-frequency", type=whole(), required=True, metavar="N", help="keep tags of at least N images"
    )
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE", help="where to write the vocabulary"
    )
    parser.add_argument("--ignore-file", type=input_file, metavar="FILE", help="tags to leave out, one a line")
    parser.add_argument(
        "--extra-fields", default="", metavar="a,b", help="other sidecar fields that become prefixed tags"
    )
    parser.add_argument("--ratings", choices=("tags", "ignore"), default="tags", help="default: tags")
    parser.add_argument("--categories-file", type=input_file, metavar="FILE", help="CSV table name,category")
    parser.add_argument("--ontology-file", type=input_file, metavar="FILE", help="YAML with aliases and implications")
    parser.add_argument(
        "--annotations", type=input_file, metavar="FILE", help="JSON or JSON Lines file instead of sidecars"
    )
    parser.add_argument(
        "--corrections", type=input_file, metavar="FILE", help="journal of corrected tags to lay over them"
    )
    parser.add_argument("--index-dir", type=Path, default=DEFAULT_INDEX_DIR, metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit code: 0 done, 2 bad input."""
    options = _parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    ignored = read_ignore_file(options.ignore_file) if options.ignore_file else ()
    categories = read_categories_file(options.categories_file) if options.categories_file else None
    ontology = read_ontology(options.ontology_file) if options.ontology_file else None
    index = open_index(
        options.roots,
        options.index_dir,
        extra_fields=[name for name in options.extra_fields.split(",") if name.strip()],
        annotations=options.annotations,
        corrections=options.corrections,
    )
    vocabulary = build_vocabulary(index, options.min_frequency, ignored, options.ratings, categories, ontology)
    vocabulary.save(options.output)
    for line in (*index.report(), *([ontology.describe(index.tag_names)] if ontology else [])):
        print(line)
    groups = {name: vocabulary.categories.count(name) for name in dict.fromkeys(vocabulary.categories)}
    print(f"{len(vocabulary):,} tags ({', '.join(f'{count:,} {name}' for name, count in groups.items())})")
    top = np.argsort(-vocabulary.counts, kind="stable")[:5]
    print("most frequent: " + ", ".join(f"{vocabulary.tags[i]} {vocabulary.counts[i]:,}" for i in top))
    print(f"written to {options.output} (sha256 {vocabulary.sha256[:12]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
