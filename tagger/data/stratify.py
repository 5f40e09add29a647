"""A split in which every tag has its share of each part, for sets so small that chance would leave tags out.

Iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-label Data, 2011), made
deterministic (ties are broken by a hash of the image's id) and followed by single moves that mend what its greedy order
left uneven. A tag of n rows gets n times the fraction in each part,
rounded to the nearest where the tags of its rows allow, so a tag rarer than 1 / (2 * fraction) may miss a part. Not
stable under growth: a new image may move any other.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tagger.data.ragged import gather
from tagger.rng import mix, stable_id

_STRATIFY_STREAM = stable_id("split/stratify")
_PASSES = 5
_SIZE_WEIGHT = 10.0
_LEAST_GAIN = 1e-9  # above rounding, so that no move is undone by the next


def stratified_parts(
    tag_offsets: NDArray[np.int64],
    tag_ids: NDArray[np.integer],
    image_ids: NDArray[np.uint64],
    fractions: Sequence[float],
) -> NDArray[np.uint8]:
    """uint8 [N]: the part, 0 .. len(fractions) - 1, of each row; a part of fraction 0 stays empty.

    tag_offsets: int64 [N + 1]; the tags of row i, all different, are `tag_ids[tag_offsets[i]:tag_offsets[i + 1]]`.
    image_ids: uint64 [N]. fractions: of all rows, adding up to 1.
    """
    num_rows = len(image_ids)
    tags, owners = gather(tag_offsets, tag_ids, np.arange(num_rows))
    num_tags = int(tags.max()) + 1 if len(tags) else 0
    # The rows of each tag, in an order that has nothing to do with their names.
    shuffled = mix(_STRATIFY_STREAM, image_ids)
    by_tag = np.lexsort((owners, shuffled[owners], tags))
    rows_of_tag = owners[by_tag]
    left = np.bincount(tags, minlength=num_tags)
    starts = np.concatenate([[0], np.cumsum(left)])

    share = np.asarray(fractions, dtype=np.float64)
    wanted = left[:, None] * share  # [tags, parts]: rows with the tag that the part still wants
    room = num_rows * share
    room[share == 0] = wanted[:, share == 0] = -np.inf
    parts = np.full(num_rows, 255, dtype=np.uint8)

    def place(row: int, part: int) -> None:
        parts[row] = part
        room[part] -= 1
        own = tags[tag_offsets[row] : tag_offsets[row + 1]]
        wanted[own, part] -= 1
        left[own] -= 1
        for tag in own.tolist():
            if left[tag]:
                heapq.heappush(rarest, (int(left[tag]), tag))

    rarest = [(int(count), tag) for tag, count in enumerate(left) if count]
    heapq.heapify(rarest)
    while rarest:
        count, tag = heapq.heappop(rarest)
        if count != left[tag]:
            continue  # rows of this tag were placed for another one since; a newer entry says how many are left
        for row in rows_of_tag[starts[tag] : starts[tag + 1]]:
            if parts[row] == 255:
                place(row, _most_wanting(wanted[tag], room))
    untagged = np.flatnonzero(parts == 255)
    for row in untagged[np.argsort(shuffled[untagged], kind="stable")]:
        place(row, _most_wanting(room, room))
    # What is left of the wants are the deviations that the greedy order could not help.
    counts = np.bincount(tags, minlength=num_tags)
    _improve(parts, [tags[tag_offsets[row] : tag_offsets[row + 1]] for row in range(num_rows)], -wanted, -room, counts)
    return parts


def _improve(
    parts: NDArray[np.uint8],
    tags_of: Sequence[NDArray[np.int64]],
    surplus: NDArray[np.float64],
    surplus_rows: NDArray[np.float64],
    counts: NDArray[np.int64],
) -> None:
    """Move rows, in place, one at a time while that brings the parts nearer to their shares.

    surplus: float64 [tags, parts], rows with the tag above the share (inf in a part of fraction 0); surplus_rows:
    float64 [parts], rows above it. A deviation costs its square over the tag's rows, so frequent tags and the sizes
    of the parts are mended where rare tags allow.
    """
    size_weight = _SIZE_WEIGHT / max(len(parts), 1)
    weights = 1.0 / np.maximum(counts, 1)
    for _ in range(_PASSES):
        moved = False
        for row, own in enumerate(tags_of):
            # Of adding one row to each part: (d + 1)^2 - d^2 = 2 d + 1; of taking one away: 1 - 2 d.
            adding = weights[own] @ (2 * surplus[own] + 1) + size_weight * (2 * surplus_rows + 1)
            source = parts[row]
            taking = 2 * (weights[own].sum() + size_weight) - adding[source]
            adding[source] = -taking
            target = int(np.argmin(adding))
            if adding[target] + taking < -_LEAST_GAIN:
                surplus[own, source] -= 1
                surplus[own, target] += 1
                surplus_rows[source] -= 1
                surplus_rows[target] += 1
                parts[row] = target
                moved = True
        if not moved:
            return


def _most_wanting(wanted: NDArray[np.float64], room: NDArray[np.float64]) -> int:
    """The part that wants most; among equals (but for rounding) the one with most room, then the first."""
    equal = np.flatnonzero(wanted > wanted.max() - 1e-9)
    return int(equal[np.argmax(room[equal])])
