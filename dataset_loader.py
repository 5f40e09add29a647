"""From folders of images and sidecars to batches: which row, which pixels, which tags, and where to go on.

The order of an epoch, the mirroring and the stand-ins for broken images are functions of (seed, epoch), so the same
(seed, epoch) gives the same bytes with any number of threads, before and after a resume. Refuses to serve a held-out
row to training, and positions that belong to another seed or another set of rows. A broken image is left out, named
and counted; it never becomes zeros or the image beside it.
"""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from Configuration_System import DataSection, FullConfig, OrientationSection
from orientation_handler import MirrorCoin, OrientationHandler
from tagger.batch import Batch
from tagger.data.batch_job import BatchJob, BatchSource, ImageSource, Mirroring, PreparedBatch, TagTable
from tagger.data.index import MetadataIndex, open_index
from tagger.data.prefetch import BufferPool, OrderedPrefetcher, default_num_threads
from tagger.data.quarantine import FailureBudget, Refusal
from tagger.data.sampler import RowSampler, hash_rows
from tagger.data.split import split_rows
from tagger.errors import InputError
from tagger.preprocess import Preprocess
from vocabulary import DEFAULT_INDEX_DIR, RATING_TAGS, TagVocabulary

logger = logging.getLogger(__name__)

Position = dict[str, int]


class PositionError(InputError):
    """A position that this loader cannot resume from; the message names what differs."""


class _IndexedImages:
    """The rows of a metadata index with their tags as indices of one vocabulary. Safe to read from any thread."""

    def __init__(self, index: MetadataIndex, vocabulary: TagVocabulary) -> None:
        self.index = index
        self.vocabulary = vocabulary
        numbers = [vocabulary.get(tag) for tag in index.tag_names]
        ratings = [None, *(vocabulary.get(tag) for tag in RATING_TAGS)]
        self.table = TagTable(index, _absent_as_minus_1(numbers), _absent_as_minus_1(ratings), len(vocabulary))

    def __len__(self) -> int:
        return len(self.index)


def _absent_as_minus_1(numbers: list[int | None]) -> NDArray[np.int64]:
    return np.array([-1 if number is None else number for number in numbers], dtype=np.int64)


class SidecarJsonDataset(_IndexedImages):
    """Images in folders, searched recursively, each with a sidecar of the same stem beside it."""

    def __init__(
        self,
        roots: Sequence[str | Path],
        vocabulary: TagVocabulary,
        *,
        extra_fields: Sequence[str] = (),
        index_dir: str | Path = DEFAULT_INDEX_DIR,
        index: MetadataIndex | None = None,
    ) -> None:
        """`index`, an open index of these roots, saves looking at every file again."""
        if index is None:
            index = open_index(roots, Path(index_dir), extra_fields=extra_fields)
        super().__init__(index, vocabulary)


class DatasetLoader(_IndexedImages):
    """Images in one folder whose tags are in one annotation file (JSON or JSON Lines)."""

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        vocabulary: TagVocabulary,
        *,
        extra_fields: Sequence[str] = (),
        index_dir: str | Path = DEFAULT_INDEX_DIR,
        index: MetadataIndex | None = None,
    ) -> None:
        """`index`, an open index of this file and folder, saves reading them again."""
        if index is None:
            path = Path(annotations)
            index = open_index([image_root], Path(index_dir), extra_fields=extra_fields, annotations=path)
        super().__init__(index, vocabulary)


@dataclass(frozen=True)
class LoadOptions:
    """How a loader prepares images.

    max_pixels: cap of width x height, checked before decoding. num_threads: decoding threads (None: by the machine).
    prefetch_batches: batches prepared ahead; each takes 3 * image_size ** 2 bytes an image.
    """

    preprocess: Preprocess
    max_pixels: int = 200_000_000
    num_threads: int | None = None
    prefetch_batches: int = 4

    @classmethod
    def from_config(cls, section: DataSection) -> "LoadOptions":
        """The configured options; training, validation and the saved model share their `preprocess`."""
        red, green, blue = section.background
        return cls(
            Preprocess(image_size=section.image_size, background=(red, green, blue)),
            int(section.max_megapixels * 1_000_000),
            section.num_threads,
            section.prefetch_batches,
        )


class ImagePreFetcher:
    """Iterator over the batches of an epoch that begin at the samples `starts`, decoded and prepared in threads."""

    def __init__(self, source: BatchSource, options: LoadOptions, epoch: int, starts: range) -> None:
        num_rows = len(source.sampler)
        # Those in flight, and two in the hands of the consumer.
        pool = BufferPool(min(starts.step, num_rows) * math.prod(source.images.shape), options.prefetch_batches + 2)
        stopping = threading.Event()
        stops = (min(start + starts.step, num_rows) for start in starts)
        self._inner = OrderedPrefetcher(
            (BatchJob(source, pool, stopping, epoch, *span) for span in zip(starts, stops, strict=True)),
            num_threads=options.num_threads or default_num_threads(),
            max_in_flight=options.prefetch_batches,
            stopping=stopping,
        )

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer was blocked for want of a batch."""
        return self._inner.wait_seconds

    def __iter__(self) -> "ImagePreFetcher":
        return self

    def __next__(self) -> PreparedBatch:
        """The next batch. Raises StorageError after an outage."""
        return next(self._inner)

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._inner.close()


class DataLoader:
    """Batches of some rows of a data set, in an order that is a function of (seed, epoch).

    Training (`seed` given): shuffled, mirrored, refused images replaced from the reserve stream. An epoch leaves out
    its last incomplete batch; where there are fewer rows than `batch_size`, it is one batch of all of them.
    Validation (`seed` None): every row once, in the order of the index, the last batch smaller, refused images left
    out.

    Iterating yields (batch, position) for the current epoch, from where `seek` went or from its start; iterating again
    gives the same epoch again. It raises DataFailureError past the failure budget, StorageError after an outage.
    `position` resumes after its batch. It counts samples, not batches, so a resume may change the batch size.
    `wait_seconds`, `mirrored` and `vetoed` add up over what was handed out.
    """

    def __init__(
        self,
        dataset: _IndexedImages,
        rows: NDArray[np.integer],
        batch_size: int,
        options: LoadOptions,
        *,
        held_out: NDArray[np.bool_] | None = None,
        seed: int | None = None,
        mirroring: Mirroring | None = None,
        budget: FailureBudget | None = None,
    ) -> None:
        """rows: integer [N], the rows to serve. held_out: bool over the whole index, the rows never to be served."""
        if not len(rows) or batch_size < 1:
            raise ValueError(f"{len(rows)} rows in batches of {batch_size}: each must be at least 1")
        never = np.zeros(len(dataset), dtype=np.bool_) if held_out is None else held_out
        if never[rows].any():
            raise ValueError(f"{int(never[rows].sum())} of the {len(rows)} rows to serve are held out")
        self._budget = budget or FailureBudget(len(rows))
        self.dataset = dataset
        self.options = options
        images = ImageSource(dataset.index, options.preprocess, options.max_pixels)
        self._source = BatchSource(dataset.table, images, RowSampler(rows, seed), mirroring, never)
        self._batch_size = batch_size
        self._identity = {
            "seed": -1 if seed is None else seed,
            "rows": len(rows),
            "rows_hash": hash_rows(dataset.index.image_ids, rows),
        }
        self._epoch = 0
        self._start = 0
        self.wait_seconds = 0.0
        self.mirrored = 0
        self.vetoed = 0

    @property
    def preprocess(self) -> Preprocess:
        """How images become batches: what a model trained on them needs to be saved with."""
        return self.options.preprocess

    @property
    def num_rows(self) -> int:
        """Rows that an epoch draws from."""
        return len(self._source.sampler)

    @property
    def refused(self) -> int:
        """Files left out so far, each counted once."""
        return len(self._budget.refusals)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Files left out so far, and why."""
        return self._budget.refusals

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._starts(0))

    @property
    def batches_remaining(self) -> int:
        """Batches that iterating gives now; in validation one of refused images alone is not given."""
        return len(self._starts(self._start))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. In the current one it changes nothing, so a `seek` before it stands."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def seek(self, position: Mapping[str, int]) -> None:
        """Go to where a position was given out; iterate next, or take `batches_remaining` 0 as the epoch's end.

        Raises PositionError when the position belongs to another seed or other rows.
        """
        wanted = self._position(0).keys()
        if position.keys() != wanted or not all(type(value) is int for value in position.values()):
            raise PositionError(f"{dict(position)} is not a position of this loader; expected {', '.join(wanted)}")
        names = {"seed": "training.seed", "rows": "number of images", "rows_hash": "images or split (hash)"}
        found = [
            f"{names[key]} {position[key]} there, {value} here"
            for key, value in self._identity.items()
            if position[key] != value
        ]
        if found:
            raise PositionError(
                f"the position to resume from belongs to another order of images: {'; '.join(found)}; "
                "bring back the data set and the seed, or start a new run"
            )
        if position["epoch"] < 0 or not 0 <= position["samples"] <= self.num_rows:
            raise PositionError(
                f"position epoch={position['epoch']}, samples={position['samples']} is outside 0..{self.num_rows}"
            )
        self._epoch, self._start = position["epoch"], position["samples"]

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        epoch, starts = self._epoch, self._starts(self._start)
        self._start = 0
        return self._batches(epoch, starts)

    def _batches(self, epoch: int, starts: range) -> Iterator[tuple[Batch, Position]]:
        if not starts:
            return
        prefetcher = ImagePreFetcher(self._source, self.options, epoch, starts)
        try:
            for start in starts:
                waited = prefetcher.wait_seconds
                prepared = next(prefetcher)
                self.wait_seconds += prefetcher.wait_seconds - waited
                self._judge(prepared)
                self.vetoed += prepared.num_vetoed
                if prepared.batch is not None:
                    self.mirrored += int(prepared.batch.mirrored.sum())
                    yield prepared.batch, self._position(min(start + starts.step, self.num_rows), epoch)
        finally:
            prefetcher.close()

    def _judge(self, prepared: PreparedBatch) -> None:
        """Count what was used and what was refused; raises DataFailureError past the failure budget."""
        for outcome in prepared.outcomes:
            if outcome.refused is None:
                self._budget.accept()
            else:
                self._budget.refuse(outcome.path, outcome.refused)

    def _position(self, samples: int, epoch: int = 0) -> Position:
        return {"epoch": epoch, "samples": samples, **self._identity}

    def _starts(self, start: int) -> range:
        """The samples at which the batches from a sample on begin."""
        size, rows = self._batch_size, self.num_rows
        if self._source.sampler.seed is None or (start == 0 and rows < size):
            return range(start, rows, size)
        return range(start, start + (rows - start) // size * size, size)


def open_dataset(section: DataSection) -> MetadataIndex:
    """The index of the configured data set, for the vocabulary and for `create_dataloaders`; logs what is in it."""
    index = open_index(
        section.roots,
        Path(section.index_dir),
        extra_fields=section.extra_fields,
        annotations=Path(section.annotations) if section.annotations is not None else None,
    )
    for line in index.report():
        logger.info("%s", line)
    return index


def create_mirroring(section: OrientationSection, dataset: _IndexedImages, seed: int) -> Mirroring | None:
    """The configured mirroring over a data set; None where no image can ever be mirrored."""
    coin = MirrorCoin.from_files(section.mirror_probability, seed, section.never_flip_file, section.force_flip_file)
    if not coin.probability and not coin.force:
        return None
    if unknown := coin.unknown_stems(dataset.index.image_ids):
        message = "%d names in the never-flip and force-flip lists name no image, e.g. %s; a name has no suffix"
        logger.warning(message, len(unknown), ", ".join(unknown[:3]))
    handler = OrientationHandler(section.map_path, section.mode)
    table = handler.compile(dataset.vocabulary)
    logger.info("%s", table.summary())
    return Mirroring(coin, table.mirror_of, handler.vetoes(dataset.index.tag_names, dataset.vocabulary) != 0)


def create_dataloaders(
    config: FullConfig, vocabulary: TagVocabulary, index: MetadataIndex | None = None
) -> tuple[DataLoader, DataLoader]:
    """(training, validation) loaders of the configured data set; `index`, from `open_dataset`, saves a second scan.

    Raises InputError for a data set or a split that cannot be used.
    """
    data = config.data
    index = index if index is not None else open_dataset(data)
    dataset = (
        SidecarJsonDataset(data.roots, vocabulary, index=index)
        if data.annotations is None
        else DatasetLoader(data.annotations, data.roots[0], vocabulary, index=index)
    )
    val_list = Path(data.val_list) if data.val_list is not None else None
    split = split_rows(index.image_ids, index.image_path, val_list=val_list, val_fraction=data.val_fraction)
    options = LoadOptions.from_config(data)
    train = DataLoader(
        dataset,
        split.training_rows,
        config.training.batch_size,
        options,
        held_out=split.validation,
        seed=config.training.seed,
        mirroring=create_mirroring(config.orientation, dataset, config.training.seed),
    )
    validation = DataLoader(
        dataset,
        split.validation_rows,
        config.validation.batch_size or config.training.batch_size,
        options,
        held_out=~split.validation,
    )
    logger.info("%d images for training, %d for validation", train.num_rows, validation.num_rows)
    return train, validation
