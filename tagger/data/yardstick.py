"""What validation scores are measured with, as one hash: the held-out images, their tags, how they are scored.

Scores of two validations can be compared where it is the same; it knows nothing of the order or place of the files.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import orjson
from numpy.typing import NDArray

from tagger.data.batch_job import TagTable

_FORMAT = b"tagsmith yardstick 1\0"
_CHUNK_ROWS = 1 << 16


def yardstick_sha256(table: TagTable, rows: NDArray[np.integer], settings: Mapping[str, object]) -> str:
    """Hash of some rows (integer [N], in any order) as images with tags, and of `settings`, JSON values by name."""
    digest = hashlib.sha256(_FORMAT + orjson.dumps(settings, option=orjson.OPT_SORT_KEYS) + b"\0")
    ids = table.index.image_ids[rows]
    order = np.argsort(ids, kind="stable")
    for start in range(0, len(order), _CHUNK_ROWS):
        chunk = order[start : start + _CHUNK_ROWS]
        tags, offsets = table.tags(rows[chunk].astype(np.int64), np.zeros(len(chunk), dtype=np.bool_), None)
        digest.update(ids[chunk].astype("<u8").tobytes())
        digest.update(np.diff(offsets).astype("<i4").tobytes())
        digest.update(tags.astype("<i4").tobytes())
    return digest.hexdigest()
