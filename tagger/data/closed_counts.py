"""How many rows of an index carry each tag once an ontology has had its say: each row counts once for a tag.

A tag that only one of the index's tags leads to has that one's count; for the others the rows are looked at, some at a
time, in memory that does not depend on their number.
"""

import numpy as np

from tagger.data.index import MetadataIndex
from tagger.data.ragged import distinct, gather
from tagger.ontology import Expansion, Ontology, expand

_ROWS_AT_A_TIME = 1 << 15


def closed_counts(index: MetadataIndex, ontology: Ontology) -> dict[str, int]:
    """Rows by canonical tag, implied tags included."""
    number_of: dict[str, int] = {}
    for tag in index.tag_names:
        for name in ontology.closed(tag):
            number_of.setdefault(name, len(number_of))
    expansion = expand(ontology, index.tag_names, number_of.get)
    num_sources = np.bincount(expansion.values, minlength=len(number_of))
    owners = np.repeat(np.arange(len(index.tag_names)), np.diff(expansion.offsets))
    counts = np.zeros(len(number_of), dtype=np.int64)
    np.add.at(counts, expansion.values, index.tag_counts()[owners])
    shared = num_sources > 1
    if shared.any():
        # Numbers of the shared names alone, so that most tags of a row are passed over at once.
        wanted = shared[expansion.values]
        offsets = np.concatenate([[0], np.cumsum(wanted)])[expansion.offsets]
        rank = np.cumsum(shared) - 1
        narrow = Expansion(offsets, rank[expansion.values[wanted]])
        counts[shared] = _count_rows(index, narrow, int(shared.sum()))
    return dict(zip(number_of, counts.tolist(), strict=True))


def _count_rows(index: MetadataIndex, expansion: Expansion, num_names: int) -> np.ndarray:
    """Rows with each of the names that the expansion gives, int64 [num_names]."""
    counts = np.zeros(num_names, dtype=np.int64)
    leads_somewhere = np.diff(expansion.offsets) > 0
    for start in range(0, len(index), _ROWS_AT_A_TIME):
        rows = np.arange(start, min(start + _ROWS_AT_A_TIME, len(index)))
        tags, places = index.gather_tags(rows)
        useful = leads_somewhere[tags]
        names, sources = gather(expansion.offsets, expansion.values, tags[useful])
        pairs = distinct(places[useful][sources] * num_names + names)
        counts += np.bincount(pairs % num_names, minlength=num_names)
    return counts
