"""The tags of a model in the order of its outputs: read from `vocabulary.json`, written as `selected_tags.csv`.

Refuses a vocabulary that does not match its own hash.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tagger.files import FormatError, read_json

VOCABULARY_FORMAT_VERSION = 1

# The numbers that readers of selected_tags.csv know; every other category counts as general there.
CATEGORY_NUMBERS: Final = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "rating": 9}


@dataclass(frozen=True)
class TagRow:
    """One output of the model: the tag, its category and how many images of the data set have it."""

    name: str
    category: str
    count: int


def tags_sha256(tags: Sequence[TagRow]) -> str:
    """The hash of a vocabulary: over the names in order, joined by line feeds, in UTF-8."""
    return hashlib.sha256("\n".join(tag.name for tag in tags).encode()).hexdigest()


def read_tags(path: Path) -> tuple[TagRow, ...]:
    """The tags in a `vocabulary.json`; FormatError when it is missing, damaged or newer."""
    content = read_json(path, "vocabulary", VOCABULARY_FORMAT_VERSION)
    try:
        tags = tuple(TagRow(str(row["name"]), str(row["category"]), int(row["count"])) for row in content["tags"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"vocabulary {path} has a tag without name, category or count; take the run's own") from error
    if content.get("sha256") != tags_sha256(tags):
        raise FormatError(f"vocabulary {path} does not match its sha256: its tags were changed; take the run's own")
    return tags


def tags_table(tags: Sequence[TagRow]) -> bytes:
    """`selected_tags.csv`: the row order is the order of the outputs, `tag_id` their index."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("tag_id", "name", "category", "count"))
    for index, tag in enumerate(tags):
        writer.writerow((index, tag.name, CATEGORY_NUMBERS.get(tag.category, 0), tag.count))
    return text.getvalue().encode()
