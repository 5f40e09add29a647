"""What is in a data set: formats, sizes, tags, ratings, what is left out and why, and near-duplicates.

Facts only, small enough for a page or a JSON file whatever the size of the set. Reads the header of every image, and
each image once in full for the near-duplicates. Refuses nothing that can be counted: broken images are facts too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagger.data.decode import FORMATS, DecodeError, sniff_format
from tagger.data.hash_cache import Progress, image_hashes
from tagger.data.headers import read_header
from tagger.data.index import MetadataIndex, Rejected
from tagger.data.near_duplicates import find_near_duplicates
from tagger.data.parallel import map_blocks
from tagger.data.prefetch import default_num_threads
from tagger.data.scan import printable

_MAGIC_BYTES = 32
_BLOCK_ROWS = 64
_EXAMPLES = 5
_EXAMPLE_GROUPS = 12
_IMAGES_A_GROUP = 7
_CO_OCCURRING_AMONG = 200
_CO_OCCURRING = 25
_COUNT_CHUNK = 1 << 14
_SUFFIXES = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "tiff": "TIFF", "webp": "WebP"}


@dataclass(frozen=True)
class Distribution:
    """Values of images: least, 5th percentile, median, 95th and most; counts between edges (one more than counts)."""

    least: float
    low: float
    median: float
    high: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with `count` files, and some of them."""

    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class CoOccurrence:
    """Two tags on the same `count` images; share: of the images with the rarer one, 0..1."""

    first: str
    second: str
    count: int
    share: float


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that look alike: how many, and the first of them as (path, rating or None)."""

    size: int
    images: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class DuplicateSurvey:
    """Near-duplicates within `bits`. surplus: images beyond the first of their groups."""

    bits: int
    num_pairs: int
    num_identical: int
    num_groups: int
    num_images: int
    surplus: int
    largest: tuple[DuplicateGroup, ...]


@dataclass(frozen=True)
class Survey:
    """A data set in figures. Sizes are of the images whose header could be read, tags of all that have a sidecar.

    tag_counts: every tag and its images, the most frequent first. rare_tags: for some counts n, tags on fewer than n.
    duplicates: None where they were not looked for.
    """

    roots: tuple[str, ...]
    num_images: int
    formats: dict[str, int]
    total_bytes: int
    file_bytes: Distribution | None
    widths: Distribution | None
    heights: Distribution | None
    megapixels: Distribution | None
    aspect_ratios: Distribution | None
    tags_per_image: Distribution | None
    tag_counts: tuple[tuple[str, int], ...]
    rare_tags: dict[int, int]
    co_occurring: tuple[CoOccurrence, ...]
    ratings: dict[str, int]
    problems: tuple[Problem, ...]
    duplicates: DuplicateSurvey | None


def survey(
    index: MetadataIndex,
    *,
    bits: int | None,
    max_pixels: int,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Look at every image of an index.

    bits: threshold of near-duplicates; None: do not look for them. progress: called with (done, all) of the images
    that are read in full.
    """
    threads = num_threads or default_num_threads()
    formats, sizes, file_bytes, faults = _read_headers(index, threads)
    known = np.flatnonzero(formats >= 0).tolist()
    misnamed = [index.image_path(row) for row in known if _misnamed(index, row, FORMATS[formats[row]])]
    problems = _index_problems(index)
    problems += _counted("suffix of another format (read by content)", [printable(path) for path in misnamed])
    duplicates = None
    if bits is not None:
        hashes = image_hashes(index, max_pixels=max_pixels, num_threads=threads, progress=progress)
        faults = {reason: [printable(index.image_path(row)) for row in rows] for reason, rows in hashes.refused.items()}
        found = find_near_duplicates(hashes.hashes, hashes.usable, bits)
        groups = found.groups()
        num_images = sum(map(len, groups))
        largest = tuple(_group(index, group) for group in groups[:_EXAMPLE_GROUPS])
        duplicates = DuplicateSurvey(
            bits, found.num_pairs, found.num_identical, len(groups), num_images, num_images - len(groups), largest
        )
    for reason, paths in sorted(faults.items(), key=lambda item: -len(item[1])):
        problems += _counted(f"image refused: {reason}", paths)
    read = sizes[:, 0] > 0
    width, height = sizes[read, 0].astype(np.float64), sizes[read, 1].astype(np.float64)
    counts = index.tag_counts()
    order = np.lexsort((np.arange(len(counts)), -counts))[: np.count_nonzero(counts)]
    names = Counter({FORMATS[number]: int(count) for number, count in enumerate(np.bincount(formats[formats >= 0]))})
    return Survey(
        roots=tuple(printable(root) for root in index.roots),
        num_images=len(index),
        formats={name: count for name, count in names.most_common() if count},
        total_bytes=int(file_bytes.sum()),
        file_bytes=_distribution(file_bytes[file_bytes > 0], log=True),
        widths=_distribution(width, log=True),
        heights=_distribution(height, log=True),
        megapixels=_distribution(width * height / 1e6, log=True),
        aspect_ratios=_distribution(width / height, log=True),
        tags_per_image=_distribution(index.tag_lengths(), log=False),
        tag_counts=tuple((index.tag_names[tag], int(counts[tag])) for tag in order),
        rare_tags={limit: int(((counts > 0) & (counts < limit)).sum()) for limit in (2, 5, 10, 50, 100)},
        co_occurring=_co_occurring(index, counts, order[:_CO_OCCURRING_AMONG]),
        ratings=index.rating_counts() | _unrated(index),
        problems=tuple(problems),
        duplicates=duplicates,
    )


def _read_headers(
    index: MetadataIndex, num_threads: int
) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.int64], dict[str, list[str]]]:
    """(format as a place in FORMATS or -1 [N], width and height or 0 [N, 2], bytes [N], reason -> paths)."""
    formats = np.full(len(index), -1, dtype=np.int8)
    sizes = np.zeros((len(index), 2), dtype=np.int32)
    file_bytes = np.zeros(len(index), dtype=np.int64)
    faults: dict[str, list[str]] = {}

    def read(rows: range) -> list[tuple[int, str]]:
        failed: list[tuple[int, str]] = []
        for row in rows:
            try:
                kind, size, sizes[row] = _read_header(index.image_path(row))
            except OSError as error:
                failed.append((row, error.strerror or type(error).__name__))
            except DecodeError as error:
                failed.append((row, error.reason))
            else:
                formats[row], file_bytes[row] = FORMATS.index(kind), size
        return failed

    for _, failed in map_blocks(read, len(index), block=_BLOCK_ROWS, num_threads=num_threads):
        for row, reason in failed:
            faults.setdefault(reason, []).append(printable(index.image_path(row)))
    return formats, sizes, file_bytes, faults


def _read_header(path: Path) -> tuple[str, int, tuple[int, int]]:
    with path.open("rb") as stream:
        kind = sniff_format(stream.read(_MAGIC_BYTES))
    header = read_header(path)
    if header.reason is not None:
        reason, _, detail = header.reason.partition(": ")
        raise DecodeError(reason, detail)
    return kind, header.file_size, (header.width, header.height)


def _misnamed(index: MetadataIndex, row: int, kind: str) -> bool:
    suffix = index.relative_path(row).rpartition(".")[2].lower()
    return _SUFFIXES.get(suffix, suffix.upper()) != kind


def _index_problems(index: MetadataIndex) -> list[Problem]:
    by_kind: dict[str, list[Rejected]] = {}
    for item in index.rejected:
        by_kind.setdefault(item.kind, []).append(item)
    problems: list[Problem] = []
    for kind, items in sorted(by_kind.items(), key=lambda pair: -len(pair[1])):
        problems += _counted(f"sidecar rejected: {kind}", [f"{item.path}: {item.reason}" for item in items])
    ratings = [f"{item.path}: {item.reason}" for item in index.unknown_ratings]
    return [
        *problems,
        *_counted(f"image without {index.label_source}", index.images_without_sidecar),
        *_counted("sidecar without image", index.sidecars_without_image),
        *_counted("rating not understood", ratings),
    ]


def _counted(kind: str, paths: Sequence[str]) -> list[Problem]:
    return [Problem(kind, len(paths), tuple(paths[:_EXAMPLES]))] if paths else []


def _unrated(index: MetadataIndex) -> dict[str, int]:
    unrated = len(index) - sum(index.rating_counts().values())
    return {"none": unrated} if unrated else {}


def _group(index: MetadataIndex, rows: NDArray[np.int64]) -> DuplicateGroup:
    shown = [int(row) for row in rows[:_IMAGES_A_GROUP]]
    return DuplicateGroup(len(rows), tuple((printable(index.image_path(row)), index.rating(row)) for row in shown))


def _distribution(values: NDArray[np.integer] | NDArray[np.floating], *, log: bool) -> Distribution | None:
    if not len(values):
        return None
    exact = values.astype(np.float64)
    least, low, median, high, most = (float(value) for value in np.percentile(exact, [0, 5, 50, 95, 100]))
    if most <= least:
        edges = np.array([least * 0.9, least * 1.1]) if log else np.array([least - 0.5, least + 0.5])
    elif log:
        edges = np.geomspace(least, most, 31)
        edges[[0, -1]] = least, most
    else:
        step = max(1, int(np.ceil((most - least + 1) / 40)))
        edges = np.arange(least - 0.5, most + step + 0.5, step)
    counts, _ = np.histogram(exact, edges)
    return Distribution(least, low, median, high, most, tuple(edges.tolist()), tuple(counts.tolist()))


def _co_occurring(
    index: MetadataIndex, counts: NDArray[np.int64], among: NDArray[np.int64]
) -> tuple[CoOccurrence, ...]:
    """The pairs of the tags `among` that are most often on one image. Exact as long as no rarer tag makes a pair."""
    place = np.full(len(counts), -1)
    place[among] = np.arange(len(among))
    together = np.zeros((len(among), len(among)), dtype=np.float64)
    for start in range(0, len(index), _COUNT_CHUNK):
        rows = np.arange(start, min(start + _COUNT_CHUNK, len(index)))
        numbers, owners = index.gather_tags(rows)
        tags = place[numbers]
        has = np.zeros((len(rows), len(among)), dtype=np.float32)
        has[owners[tags >= 0], tags[tags >= 0]] = 1.0
        together += has.T @ has
    first, second = np.triu_indices(len(among), 1)
    pairs = together[first, second].astype(np.int64)
    best = np.lexsort((second, first, -pairs))[:_CO_OCCURRING]
    found: list[CoOccurrence] = []
    for pair in best[pairs[best] > 0]:
        left, right = among[first[pair]], among[second[pair]]
        share = int(pairs[pair]) / int(min(counts[left], counts[right]))
        found.append(CoOccurrence(index.tag_names[left], index.tag_names[right], int(pairs[pair]), share))
    return tuple(found)
