"""The 16-bit scores of an evaluation, in whichever of two forms is smaller, behind one interface.

`StoredKeys` keeps each image's key of each tag (2 bytes); `KeyHistograms` keeps how often each key came (4 bytes for
each of 65,536 keys of a tag), for any number of images. Both answer the same questions with the same integers, so what
is computed from them is the same to the last bit. `ScoreStore` starts with stored keys and changes to histograms where
those become the smaller, which is beyond 131,072 images. Refuses nothing: keys are checked where they are made.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tagger.metrics.curves import Counts
from tagger.metrics.host import HostMemory, LateCopies
from tagger.metrics.keys import KEY_OFFSET, NUM_KEYS, Keys
from tagger.metrics.sample import ImageSample, image_order

Arrays = Mapping[str, npt.NDArray[np.generic]]
Form = Literal["auto", "keys", "histograms"]

# A block of stored keys: large enough that a tag's run in it is worth a look-up, small enough to be filled soon.
_BLOCK_BYTES = 64 << 20
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 256, 8192
# Below this many images sorting a tag's keys is quicker than going over a table of 65,536 counts.
_SORTED_BELOW = 16_384
# Images counted together on the host: a tag's table is in the cache for all of its keys. 164 MB at 20,000 tags.
COUNTED_TOGETHER = 4096
TABLES_AT_A_TIME = 32
_KEYS_AT_A_TIME = 1 << 20
_INDEX_BYTES_ON_DEVICE = 256 << 20
# Images whose keys are kept beside histograms: 164 MB at 20,000 tags.
SAMPLE_SIZE = 4096


def codes(tags: npt.NDArray[np.integer], keys: npt.NDArray[np.integer]) -> Counts:
    """int64 numbers that order by tag, then by key."""
    return tags.astype(np.int64) * NUM_KEYS + (keys.astype(np.int64) + KEY_OFFSET)


@dataclass(frozen=True)
class KeySample:
    """Some images: their places among all, ascending int64 [n], and the keys of given tags, int16 [tags, n]."""

    places: npt.NDArray[np.int64]
    columns: Callable[[npt.NDArray[np.integer]], Keys]


class StoredKeys:
    """Every image's key of every tag, int16, in host blocks of [C, rows]: a tag's keys lie side by side."""

    def __init__(self, num_tags: int, memory: HostMemory) -> None:
        self.num_tags = num_tags
        self._memory = memory
        self._blocks: list[Keys] = []
        self._open: Keys | None = None
        self._filled = 0
        self._copies = LateCopies()

    def add(self, keys: Tensor) -> None:
        """Add images: int16 [B, C] on any device."""
        if keys.device.type == "cpu":
            self._write(keys.numpy().T)
        else:
            self._copies.send((keys.t().contiguous(),), lambda tensors: self._write(tensors[0].numpy()))

    def add_columns(self, columns: Keys) -> None:
        """Add images as int16 [C, N], which is kept as it is."""
        self._close_block()
        if columns.shape[1]:
            self._blocks.append(columns)

    def blocks(self) -> list[Keys]:
        """All keys as int16 [C, rows] each, in the order in which the images came."""
        self._copies.drain()
        return [*self._blocks, *([] if self._open is None else [self._open[:, : self._filled]])]

    @property
    def num_images(self) -> int:
        return sum(block.shape[1] for block in self.blocks())

    def columns(self, tags: npt.NDArray[np.integer]) -> Keys:
        """The keys of some tags, int16 [len(tags), N]."""
        parts = [block[_as_slice(tags)] for block in self.blocks()]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(tags), 0), np.int16)

    def counts_from(self, wanted: Counts) -> Counts:
        """How many images of the code's tag have its key or a higher one; int64, for ascending int64 codes."""
        found = np.empty(len(wanted), np.int64)
        for tags, part in _runs(wanted, self._tags_at_a_time()):
            columns, local = self.columns(tags), wanted[part] - int(tags[0]) * NUM_KEYS
            if columns.shape[1] < _SORTED_BELOW:
                columns.sort(axis=1, kind="stable")
                ranked = codes(np.arange(len(tags))[:, None], columns).ravel()
                found[part] = (local // NUM_KEYS + 1) * columns.shape[1] - np.searchsorted(ranked, local)
            else:
                found[part] = _table_counts_from(_tables(columns), local)
        return found

    def distinct(self, tags: npt.NDArray[np.integer]) -> Iterator[tuple[Keys, Counts]]:
        """For each of the tags its distinct keys, ascending, and how many images have each (int64)."""
        step = self._tags_at_a_time()
        for start in range(0, len(tags), step):
            columns = self.columns(tags[start : start + step])
            if columns.shape[1] < _SORTED_BELOW:
                columns.sort(axis=1, kind="stable")
                yield from (_run_lengths(column) for column in columns)
            else:
                yield from (_nonzero(table) for table in _tables(columns).numpy())

    def totals(self) -> Counts:
        """How often each key came, whatever its tag: int64 [65536], a key's cell being `key + KEY_OFFSET`."""
        table = np.zeros(NUM_KEYS, np.int64)
        for block in self.blocks():
            step = max(1, _KEYS_AT_A_TIME // max(1, block.shape[1]))
            for start in range(0, self.num_tags, step):
                part = np.ascontiguousarray(block[start : start + step]).view(np.uint16).ravel()
                # As unsigned numbers the keys below 0 come after the others.
                table += np.roll(np.bincount(part, minlength=NUM_KEYS), KEY_OFFSET)
        return table

    def _tags_at_a_time(self) -> int:
        return max(1, min(TABLES_AT_A_TIME, _KEYS_AT_A_TIME // max(1, self.num_images)))

    def _write(self, columns: Keys) -> None:
        while columns.shape[1]:
            if self._open is None:
                rows = min(max(_BLOCK_BYTES // (2 * self.num_tags), _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS)
                self._open, self._filled = self._memory.zeros((self.num_tags, rows), np.int16), 0
            fits = min(columns.shape[1], self._open.shape[1] - self._filled)
            self._open[:, self._filled : self._filled + fits] = columns[:, :fits]
            self._filled += fits
            columns = columns[:, fits:]
            if self._filled == self._open.shape[1]:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks = self.blocks()
        self._open = None


class KeyHistograms:
    """How many images have each key of each tag: int32 [C, 65536], 262 KB a tag.

    On the device of the first keys where half of its free memory holds them, else on the host.
    """

    def __init__(self, num_tags: int, memory: HostMemory, device: torch.device) -> None:
        self.num_tags = num_tags
        self._buffer = StoredKeys(num_tags, HostMemory())
        self._buffered = 0
        if device.type == "cuda" and histogram_bytes(num_tags) <= torch.cuda.mem_get_info(device)[0] // 2:
            self._tables = torch.zeros((num_tags, NUM_KEYS), dtype=torch.int32, device=device)
        else:
            self._tables = torch.from_numpy(memory.zeros((num_tags, NUM_KEYS), np.int32))

    def add(self, keys: Tensor) -> None:
        """Add images: int16 [B, C] on any device."""
        if self._tables.device.type != "cpu":
            self._add_on_device(keys.to(self._tables.device))
            return
        self._buffer.add(keys)
        self._buffered += len(keys)
        if self._buffered >= COUNTED_TOGETHER:
            self._flush()

    def add_columns(self, columns: Keys) -> None:
        """Add images as int16 [C, N]."""
        _count(self._tables, columns)

    def add_tables(self, tables: Tensor) -> None:
        """Add counts, int32 [C, 65536]."""
        self._tables += tables.to(self._tables.device)

    def tables(self) -> Tensor:
        """The counts so far, int32 [C, 65536]; not a copy."""
        self._flush()
        return self._tables

    @property
    def num_images(self) -> int:
        return int(self.tables()[0].sum())

    def counts_from(self, wanted: Counts) -> Counts:
        """See `StoredKeys.counts_from`."""
        found = np.empty(len(wanted), np.int64)
        tables = self.tables()
        for tags, part in _runs(wanted, TABLES_AT_A_TIME):
            found[part] = _table_counts_from(tables[_as_slice(tags)], wanted[part] - int(tags[0]) * NUM_KEYS)
        return found

    def distinct(self, tags: npt.NDArray[np.integer]) -> Iterator[tuple[Keys, Counts]]:
        """See `StoredKeys.distinct`."""
        tables = self.tables()
        for start in range(0, len(tags), TABLES_AT_A_TIME):
            chunk = tags[start : start + TABLES_AT_A_TIME]
            index = torch.from_numpy(chunk.astype(np.int64)).to(tables.device)
            yield from (_nonzero(table) for table in tables[index].cpu().numpy())

    def totals(self) -> Counts:
        """See `StoredKeys.totals`."""
        return np.asarray(self.tables().sum(dim=0, dtype=torch.int64).cpu().numpy())

    def _flush(self) -> None:
        for block in self._buffer.blocks():
            self.add_columns(block)
        self._buffer = StoredKeys(self.num_tags, HostMemory())
        self._buffered = 0

    def _add_on_device(self, keys: Tensor) -> None:
        flat = self._tables.view(-1)
        starts = torch.arange(self.num_tags, device=keys.device) * NUM_KEYS + KEY_OFFSET
        rows = max(1, _INDEX_BYTES_ON_DEVICE // (8 * self.num_tags))
        for part in torch.split(keys, rows):
            index = (part + starts).view(-1)
            flat.scatter_add_(0, index, torch.ones((), dtype=torch.int32, device=keys.device).expand(len(index)))


class ScoreStore:
    """The scores in one of the two forms; `form` "auto" takes the smaller and changes when stored keys outgrow it.

    With histograms, the keys of `sample_size` images are kept beside them.
    """

    def __init__(
        self,
        num_tags: int,
        memory: HostMemory,
        form: Form = "auto",
        expected_images: int | None = None,
        sample_size: int = SAMPLE_SIZE,
    ) -> None:
        self.num_tags = num_tags
        self._memory = memory
        self._auto = form == "auto"
        few = expected_images is None or stored_bytes(expected_images, num_tags) <= histogram_bytes(num_tags)
        self._form_wanted = ("keys" if few else "histograms") if form == "auto" else form
        self._image_ids: list[npt.NDArray[np.int64]] = []
        self._sample = ImageSample(num_tags, sample_size)
        self._copies = LateCopies()
        self._images = 0
        self._keys: StoredKeys | None = StoredKeys(num_tags, memory) if self._form_wanted == "keys" else None
        self._histograms: KeyHistograms | None = None

    @property
    def form(self) -> Literal["keys", "histograms"]:
        """What is kept now."""
        return "keys" if self._keys is not None else "histograms"

    @property
    def keys(self) -> StoredKeys | None:
        """Each image's keys, where they are kept."""
        return self._keys

    def add(self, keys: Tensor, image_ids: npt.NDArray[np.int64]) -> None:
        """Add images: int16 [B, C] on any device, without a wait for it, and what names them, int64 [B]."""
        first = self._images
        self._images += len(keys)
        self._change_if_smaller(keys.device)
        self._image_ids.append(image_ids)
        if self._keys is not None:
            self._keys.add(keys)
            return
        self._as_histograms(keys.device).add(keys)
        orders = image_order(image_ids)
        rows = self._sample.chosen(orders)
        if len(rows):
            chosen = keys[torch.from_numpy(rows).to(keys.device, non_blocking=True)]
            self._copies.send(
                (chosen,), lambda tensors: self._sample.add(orders[rows], first + rows, tensors[0].numpy())
            )

    @property
    def num_images(self) -> int:
        """Images added."""
        return self._images

    @property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """What names the images, int64 [N], in the order in which they came."""
        return np.concatenate([*self._image_ids, np.empty(0, np.int64)])

    def sample(self, size: int | None = None) -> "KeySample":
        """At most `size` images chosen by hash (None: all whose keys are kept; with histograms, those beside them)."""
        if self._keys is None:
            self._copies.drain()
            orders, places, rows = self._sample.images()
        else:
            orders, places, rows = image_order(self.image_ids), np.arange(self._images), None
        kept = np.sort(np.argsort(orders, kind="stable")[:size])
        kept = kept[np.argsort(places[kept], kind="stable")]
        if rows is not None:
            return KeySample(places[kept], lambda tags: np.ascontiguousarray(rows[kept][:, _as_slice(tags)].T))
        stored, images = self._any(), slice(None) if len(kept) == self._images else kept
        assert isinstance(stored, StoredKeys)
        return KeySample(places[kept], lambda tags: stored.columns(tags)[:, images])

    def counts_from(self, wanted: Counts) -> Counts:
        """How many images of the code's tag have its key or a higher one; int64, for ascending int64 codes."""
        return self._any().counts_from(wanted)

    def distinct(self, tags: npt.NDArray[np.integer]) -> Iterator[tuple[Keys, Counts]]:
        """For each of the tags its distinct keys, ascending, and how many images have each (int64)."""
        return self._any().distinct(tags)

    def totals(self) -> Counts:
        """How often each key came, whatever its tag: int64 [65536], a key's cell being `key + KEY_OFFSET`."""
        return self._any().totals()

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The content: "image_ids" and "keys" int16 [C, N], or "histograms" int32 [C, 65536] and the sample."""
        ids: dict[str, npt.NDArray[np.generic]] = {"image_ids": self.image_ids}
        if self._keys is not None:
            return ids | {"keys": self._keys.columns(np.arange(self.num_tags))}
        sample = self.sample()
        return ids | {
            "histograms": self._as_histograms().tables().cpu().numpy(),
            "sample_places": sample.places,
            "sample_keys": sample.columns(np.arange(self.num_tags)),
        }

    def add_arrays(self, arrays: Arrays) -> None:
        """Add another store's `arrays`; histograms on either side make histograms."""
        ids = np.asarray(arrays["image_ids"], dtype=np.int64)
        if "keys" in arrays:
            self._merge_blocks([np.asarray(arrays["keys"], dtype=np.int16)], ids)
            return
        columns = np.asarray(arrays["sample_keys"], dtype=np.int16)
        sample = KeySample(np.asarray(arrays["sample_places"], dtype=np.int64), lambda tags: columns[tags])
        tables = torch.from_numpy(np.ascontiguousarray(arrays["histograms"], dtype=np.int32))
        self._merge_tables(tables, ids, sample)

    def merge(self, other: "ScoreStore") -> None:
        """Add another store's images, which keeps them."""
        if other._keys is not None:
            self._merge_blocks(other._keys.blocks(), other.image_ids)
        else:
            self._merge_tables(other._as_histograms().tables(), other.image_ids, other.sample())

    def _merge_blocks(self, blocks: list[Keys], image_ids: npt.NDArray[np.int64]) -> None:
        first = self._images
        self._images += len(image_ids)
        self._change_if_smaller()
        for block in blocks:
            (self._keys or self._as_histograms()).add_columns(block)
        self._image_ids.append(image_ids)
        if self._keys is None:
            self._sample_blocks(blocks, image_ids, first)

    def _merge_tables(self, tables: Tensor, image_ids: npt.NDArray[np.int64], sample: "KeySample") -> None:
        self._as_histograms().add_tables(tables)
        self._copies.drain()
        rows = sample.columns(np.arange(self.num_tags)).T
        self._sample.add(image_order(image_ids[sample.places]), self._images + sample.places, rows)
        self._image_ids.append(image_ids)
        self._images += len(image_ids)

    def _sample_blocks(self, blocks: list[Keys], image_ids: npt.NDArray[np.int64], first: int) -> None:
        self._copies.drain()
        start = 0
        for block in blocks:
            orders = image_order(image_ids[start : start + block.shape[1]])
            rows = self._sample.chosen(orders)
            self._sample.add(orders[rows], first + start + rows, block[:, rows].T)
            start += block.shape[1]

    def _any(self) -> StoredKeys | KeyHistograms:
        return self._keys or self._as_histograms()

    def _change_if_smaller(self, device: torch.device | None = None) -> None:
        if self._auto and stored_bytes(self._images, self.num_tags) > histogram_bytes(self.num_tags):
            self._as_histograms(device)

    def _as_histograms(self, device: torch.device | None = None) -> KeyHistograms:
        if self._histograms is None:
            self._histograms = KeyHistograms(self.num_tags, self._memory, device or torch.device("cpu"))
            if self._keys is not None:
                blocks = self._keys.blocks()
                self._keys = None
                self._sample_blocks(blocks, self.image_ids, 0)
                while blocks:
                    block = blocks.pop()
                    self._histograms.add_columns(block)
                    self._memory.free(block)
        return self._histograms


def stored_bytes(num_images: int, num_tags: int) -> int:
    """Bytes of stored keys."""
    return num_images * num_tags * 2


def histogram_bytes(num_tags: int) -> int:
    """Bytes of histograms."""
    return num_tags * NUM_KEYS * 4


def _as_slice(tags: npt.NDArray[np.integer]) -> slice | npt.NDArray[np.integer]:
    """Neighbouring tags as a slice, which is a view and not a copy."""
    if len(tags) and int(tags[-1]) - int(tags[0]) + 1 == len(tags):
        return slice(int(tags[0]), int(tags[-1]) + 1)
    return tags


def _runs(wanted: Counts, step: int) -> Iterator[tuple[npt.NDArray[np.int64], slice]]:
    """Neighbouring tags, at most `step` at a time, with the part of the ascending codes that is theirs."""
    if not len(wanted):
        return
    first, last = int(wanted[0]) // NUM_KEYS, int(wanted[-1]) // NUM_KEYS
    starts = np.arange(first, last + 1, step)
    bounds = np.searchsorted(wanted, np.append(starts, last + 1) * NUM_KEYS)
    for start, low, high in zip(starts.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if low < high:
            yield np.arange(start, min(start + step, last + 1)), slice(low, high)


def _tables(columns: Keys) -> Tensor:
    tables = torch.zeros((len(columns), NUM_KEYS), dtype=torch.int32)
    _count(tables, columns)
    return tables


def _count(tables: Tensor, columns: Keys) -> None:
    """Add the counts of keys [C, N] to tables [C, 65536]; tag by tag, so that a tag's table stays in the cache."""
    flat = tables.view(-1)
    starts = np.arange(len(columns))[:, None] * NUM_KEYS + KEY_OFFSET
    tags = max(1, (_KEYS_AT_A_TIME // 16) // max(1, columns.shape[1]))
    ones = torch.ones((), dtype=torch.int32, device=flat.device)
    for start in range(0, len(columns), tags):
        cells = np.add(columns[start : start + tags], starts[start : start + tags], dtype=np.int64, order="C")
        index = torch.from_numpy(cells.ravel()).to(flat.device)
        flat.scatter_add_(0, index, ones.expand(len(index)))


def _table_counts_from(tables: Tensor, local: Counts) -> Counts:
    """Of tables [T, 65536], the counts at or above codes whose tags count from the first table."""
    below = tables.cumsum(1, dtype=torch.int32)
    # No key lies in the first cell, so the cell before one is always of the same tag.
    cells = torch.from_numpy(local - 1).to(tables.device)
    totals = below[:, -1].cpu().numpy().astype(np.int64)
    return np.asarray(totals[local // NUM_KEYS] - below.view(-1)[cells].cpu().numpy())


def _nonzero(table: npt.NDArray[np.int32]) -> tuple[Keys, Counts]:
    cells = np.flatnonzero(table != 0)
    return (cells - KEY_OFFSET).astype(np.int16), table[cells].astype(np.int64)


def _run_lengths(ranked: Keys) -> tuple[Keys, Counts]:
    firsts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    return ranked[firsts], np.diff(firsts, append=len(ranked)).astype(np.int64)
