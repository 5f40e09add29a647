"""From folders of images and sidecars to batches: which row, which pixels, which tags, and where to go on.

The order of an epoch, the mirroring and the stand-ins for broken images are functions of (seed, epoch), so the same
(seed, epoch) gives the same bytes with any number of threads, before and after a resume. Refuses to serve a held-out
row to training, and positions that belong to another seed or another set of rows. A broken image is left out, named
and counted; it never becomes zeros or the image beside it.
"""

import copy
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from Configuration_System import DataSection, FullConfig, OrientationSection
from orientation_handler import MirrorCoin, OrientationHandler
from tagger.batch import Batch
from tagger.data.batch_job import BatchSource, ImageSource, Mirroring, PreparedBatch, TagTable
from tagger.data.batch_plan import BatchPlan, Spans, create_plan
from tagger.data.decode import DecodeOptions, describe_decoder
from tagger.data.epoch_order import EpochOrder
from tagger.data.image_reader import ImageReader
from tagger.data.index import MetadataIndex, open_index
from tagger.data.ledger import ImageLedger
from tagger.data.position import Position, order_identity
from tagger.data.prefetch import OrderedPrefetcher, default_num_threads
from tagger.data.quarantine import FailureBudget, Refusal
from tagger.data.quarantine_log import KnownBad, Quarantine
from tagger.data.ring import LoaderRing, RingPass, plan_workers
from tagger.data.sampler import RowSampler
from tagger.data.shrink_cache import ShrinkCache
from tagger.data.split import Part, Split, SplitError, SplitRule, split_index
from tagger.data.thread_pass import prepare_in_threads
from tagger.data.weighting import create_sampler
from tagger.ontology import Ontology
from tagger.preprocess import Preprocess
from vocabulary import DEFAULT_INDEX_DIR, RATING_TAGS, TagVocabulary

logger = logging.getLogger(__name__)


class _IndexedImages:
    """The rows of a metadata index with their tags as indices of one vocabulary. Safe to read from any thread."""

    def __init__(self, index: MetadataIndex, vocabulary: TagVocabulary, ontology: Ontology | None = None) -> None:
        self.index = index
        self.vocabulary = vocabulary
        self.ontology = ontology
        self.table = TagTable.create(index, vocabulary.get, RATING_TAGS, len(vocabulary), ontology)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def sizes(self) -> NDArray[np.uint32]:
        """uint32 [N, 2]: (width, height) of each row's image as it is seen, 0 where unknown."""
        return self.index.read_headers().sizes()


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
        ontology: Ontology | None = None,
    ) -> None:
        """`index`, an open index of these roots, saves looking at every file again."""
        if index is None:
            index = open_index(roots, Path(index_dir), extra_fields=extra_fields)
        super().__init__(index, vocabulary, ontology)


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
        ontology: Ontology | None = None,
    ) -> None:
        """`index`, an open index of this file and folder, saves reading them again."""
        if index is None:
            index = open_index([image_root], Path(index_dir), extra_fields=extra_fields, annotations=Path(annotations))
        super().__init__(index, vocabulary, ontology)


@dataclass(frozen=True)
class LoadOptions:
    """How a loader prepares images.

    max_pixels: cap of width x height, checked before decoding. partial_images: truncated files give what there is of
    them. num_threads: decoding threads in all (None: by the machine). prefetch_batches: batches prepared ahead; each
    takes 3 * image_size ** 2 bytes an image. num_processes: loader processes that the threads are spread over (0: this
    one). pin_memory: page-lock their memory for CUDA. cache: small copies to read instead of the files.
    max_refused_fraction: share of the files that a `FailureBudget` puts up with.
    """

    preprocess: Preprocess
    max_pixels: int = 200_000_000
    partial_images: bool = False
    num_threads: int | None = None
    prefetch_batches: int = 4
    num_processes: int = 0
    pin_memory: bool = False
    cache: ShrinkCache | None = None
    max_refused_fraction: float = 0.001

    @property
    def decoding(self) -> DecodeOptions:
        """How a file's bytes become pixels."""
        preprocess = self.preprocess
        return DecodeOptions(preprocess.background, self.max_pixels, preprocess.decode_scaling, self.partial_images)

    @classmethod
    def from_config(cls, section: DataSection, patch_size: int, *, on_cuda: bool = False) -> "LoadOptions":
        """The configured options; training, validation and the saved model share their `preprocess`.

        `on_cuda` says where the batches go: it decides the number of processes that the configuration leaves open.
        Raises CacheError when `data.cache_dir` names a cache that is not there or cannot serve these images.
        """
        red, green, blue = section.background
        preprocess = Preprocess.create(
            section.image_size, section.fit, patch_size, (red, green, blue), decode_scaling=section.decode_scaling
        )
        cache = None if section.cache_dir is None else ShrinkCache.open(section.cache_dir)
        if cache is not None:
            cache.require(preprocess.longest_side, preprocess.background, preprocess.image_size)
        num_processes, num_threads = plan_workers(
            section.num_processes, section.num_threads, section.prefetch_batches, on_cuda=on_cuda
        )
        return cls(
            preprocess,
            int(section.max_megapixels * 1_000_000),
            section.partial_images,
            num_threads,
            section.prefetch_batches,
            num_processes,
            on_cuda,
            cache,
            section.max_refused_fraction,
        )


class ImagePreFetcher:
    """Iterator over the batches of an epoch in `spans`, decoded and prepared in the background.

    In the processes of `ring` where there is one with no pass open, else in threads of this process.
    """

    def __init__(
        self,
        source: BatchSource,
        options: LoadOptions,
        epoch: int,
        spans: Spans,
        known_bad: KnownBad,
        ring: LoaderRing | None = None,
    ) -> None:
        """`known_bad`: files that are refused without reading them."""
        self._inner: OrderedPrefetcher[PreparedBatch] | RingPass
        pairs = ((span.start, span.stop) for span in spans)
        if ring is not None and not ring.busy:
            self._inner = ring.begin(epoch, pairs, known_bad)
            return
        self._inner = prepare_in_threads(
            source,
            epoch,
            pairs,
            known_bad,
            num_threads=options.num_threads or default_num_threads(),
            max_in_flight=options.prefetch_batches,
        )

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer was blocked for want of a batch."""
        return self._inner.wait_seconds

    def __iter__(self) -> "ImagePreFetcher":
        return self

    def __next__(self) -> PreparedBatch:
        """The next batch. Raises StorageError after an outage, LoaderProcessError when processes keep dying."""
        return next(self._inner)

    def close(self) -> None:
        """Stop the threads and wait for them; processes drop what they are at."""
        self._inner.close()


class DataLoader:
    """Batches of some rows of a data set, in an order that is a function of (seed, epoch).

    Training (`seed` given): shuffled, mirrored, refused images replaced from the reserve stream. An epoch leaves out
    its last incomplete batch; where there are fewer rows than `batch_size`, it is one batch of all of them.
    Validation (`seed` None): every row once, in the order of the index, the last batch smaller, refused images left
    out.
    With aspect buckets every batch has one shape; validation is in the order of the buckets, then of the index.

    Iterating yields (batch, position) for the current epoch, from where `seek` went or from its start; iterating again
    gives the same epoch again. It raises DataFailureError past the failure budget, StorageError after an outage.
    `position` resumes after its batch. It counts samples, of all ranks together, not batches, so a resume may change
    the batch size and the number of ranks; `BucketPlan` says what that means with aspect buckets.
    `wait_seconds`, `mirrored` and `vetoed` add up over what was handed out. `rows` are served, as `order` says.

    Loader processes start with the first iteration and stay until `close`, or until the loader is collected. A second
    iteration beside one that is still open loads in threads.
    """

    def __init__(
        self,
        dataset: _IndexedImages,
        rows: NDArray[np.integer],
        batch_size: int,
        options: LoadOptions,
        *,
        split: Split | None = None,
        seed: int | None = None,
        mirroring: Mirroring | None = None,
        budget: FailureBudget | None = None,
        quarantine: Quarantine | None = None,
        sampler: RowSampler | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """rows: integer [N], the rows to serve.

        split: the rows are of one of its parts, those of the others are never served; a position goes by its keys.
        quarantine: the memory of broken files, shared by the loaders of a run; None: one that ends with this loader.
        sampler: another order of `rows` and `seed` than each row once. rank, world_size: serve one of the equal shares
        of each step; `batch_size` is that of one rank.
        """
        if not len(rows) or batch_size < 1:
            raise ValueError(f"{len(rows)} rows in batches of {batch_size}: each must be at least 1")
        self.split = split
        self.part = None if split is None else Part(int(split.parts[rows[0]]))
        serves = self.part if seed is None else Part.TRAIN  # a seed is for training, and that has its own part alone
        never = np.zeros(len(dataset), dtype=np.bool_) if split is None or serves is None else split.others(serves)
        if never[rows].any():
            raise ValueError(f"{int(never[rows].sum())} of the {len(rows)} rows to serve are held out")
        self.dataset = dataset
        self.rows = rows
        self.options = options
        quarantine = quarantine or Quarantine(None, describe_decoder(options.decoding))
        budget = budget or FailureBudget(len(rows), max_fraction=options.max_refused_fraction)
        purpose = ("training" if seed is not None else "validation") if self.part is None else self.part.purpose
        self.ledger = ImageLedger(dataset.index, budget, quarantine, purpose)
        images = ImageSource(ImageReader(dataset.index, options.cache), options.preprocess, options.decoding)
        sampler = sampler or RowSampler(rows, seed)
        assert sampler.seed == seed and len(sampler) == len(rows)
        self._rank, self._world_size = rank, world_size
        plan = self._plan(sampler, options.preprocess, batch_size)
        self._source = BatchSource(dataset.table, images, plan, mirroring, never)
        keys = dataset.index.image_ids if split is None else split.keys
        self.order = EpochOrder(plan, order_identity(keys, rows, sampler, dataset.index.corrections))
        self._ring: LoaderRing | None = None
        self._epoch = 0
        self._start = 0
        self.wait_seconds = 0.0
        self.mirrored = self.vetoed = 0

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
        """Files left out so far and not used since, each counted once."""
        return len(self.ledger.refusals)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Files left out so far and not used since, and why."""
        return self.ledger.refusals

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._source.plan.spans(0))

    @property
    def batches_remaining(self) -> int:
        """Batches that iterating gives now; in validation one of refused images alone is not given."""
        return len(self._source.plan.spans(self._start))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. In the current one it changes nothing, so a `seek` before it stands."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def seek(self, position: Mapping[str, int]) -> None:
        """Go to where a position was given out; iterate next, or take `batches_remaining` 0 as the epoch's end.

        With aspect buckets at another batch size it goes back to a boundary (see `BucketPlan`) and logs how many images
        come again. Raises PositionError when the position belongs to another seed, other rows or other sampling.
        """
        self._epoch, self._start = position["epoch"], self.order.go_to(position)

    def carry_over(self, position: Mapping[str, int]) -> Position:
        """The position, as one to `seek`, of one before images, split, sampling or corrections changed; see there."""
        return self.order.carry_over(position)

    def resized(self, preprocess: Preprocess, batch_size: int) -> "DataLoader":
        """A loader of the same images in the same order at another size, that the shrink cache must do for too.

        Each takes the other's positions. It shares what is known of broken images, and has processes of its own.
        """
        twin = copy.copy(self)
        plan = self._plan(self._source.sampler, preprocess, batch_size)
        twin.options, twin._ring = replace(self.options, preprocess=preprocess), None
        twin._source = replace(self._source, images=replace(self._source.images, preprocess=preprocess), plan=plan)
        twin.order = replace(self.order, plan=plan)
        return twin

    def _plan(self, sampler: RowSampler, preprocess: Preprocess, batch_size: int) -> BatchPlan:
        sizes = self.dataset.sizes if preprocess.shapes else None
        return create_plan(sampler, preprocess, batch_size, sizes, rank=self._rank, world_size=self._world_size)

    def __iter__(self) -> Generator[tuple[Batch, Position], None, None]:
        epoch, spans = self._epoch, self._source.plan.spans(self._start)
        self._start = 0
        return self._batches(epoch, spans)

    def _batches(self, epoch: int, spans: Spans) -> Generator[tuple[Batch, Position], None, None]:
        if not spans:
            return
        known_bad = self.ledger.known_bad()
        prefetcher = ImagePreFetcher(self._source, self.options, epoch, spans, known_bad, self._open_ring())
        try:
            for span in spans:
                waited = prefetcher.wait_seconds
                prepared = next(prefetcher)
                self.wait_seconds += prefetcher.wait_seconds - waited
                self.ledger.judge(prepared.outcomes)
                self.vetoed += prepared.num_vetoed
                if prepared.batch is not None:
                    self.mirrored += int(prepared.batch.mirrored.sum())
                    yield prepared.batch, self.order.position(span.done, epoch)
        finally:
            prefetcher.close()
            # Here, because a consumer may take the last batch and never ask for another.
            self.ledger.report()

    def close(self) -> None:
        """End the loader processes; another iteration starts them again."""
        if self._ring is not None:
            self._ring.close()
        self._ring = None

    def _open_ring(self) -> LoaderRing | None:
        options = self.options
        if self._ring is None and options.num_processes:
            self._ring = LoaderRing(
                self._source,
                num_processes=options.num_processes,
                num_threads=options.num_threads or default_num_threads(options.num_processes),
                max_in_flight=options.prefetch_batches,
                batch_bytes=self._source.largest_batch_bytes,
                pin=options.pin_memory,
            )
        return self._ring


def open_dataset(section: DataSection) -> MetadataIndex:
    """The index of the configured data set, for the vocabulary and for `create_dataloaders`; logs what is in it."""
    index = open_index(
        section.roots,
        Path(section.index_dir),
        extra_fields=section.extra_fields,
        annotations=Path(section.annotations) if section.annotations is not None else None,
        corrections=Path(section.corrections_file) if section.corrections_file is not None else None,
    )
    for line in index.report():
        logger.info("%s", line)
    return index


def split_dataset(section: DataSection, index: MetadataIndex) -> Split:
    """Which images of the configured data set are for training and which are held out, and for what."""
    rule = SplitRule(
        section.val_fraction,
        section.calib_fraction,
        section.test_fraction,
        val_list=Path(section.val_list) if section.val_list is not None else None,
        key=section.split_key,
        near_duplicate_bits=section.near_duplicate_bits if section.group_near_duplicates else None,
        stratified=section.stratified_split,
    )
    max_pixels = int(section.max_megapixels * 1_000_000)
    return split_index(index, rule, max_pixels=max_pixels, num_threads=section.num_threads)


def create_mirroring(section: OrientationSection, dataset: _IndexedImages, seed: int) -> Mirroring | None:
    """The configured mirroring over a data set; None where no image can ever be mirrored."""
    coin = MirrorCoin.from_files(section.mirror_probability, seed, section.never_flip_file, section.force_flip_file)
    if not coin.probability and not coin.force:
        return None
    if unknown := coin.unknown_stems(dataset.index.image_ids):
        message = "%d names in the never-flip and force-flip lists name no image, e.g. %s; a name has no suffix"
        logger.warning(message, len(unknown), ", ".join(unknown[:3]))
    handler = OrientationHandler(section.map_path, section.mode, dataset.ontology)
    table = handler.compile(dataset.vocabulary)
    logger.info("%s", table.summary())
    return Mirroring(coin, table.mirror_of, handler.forbids(dataset.index.tag_names, dataset.vocabulary))


def create_dataloaders(
    config: FullConfig,
    vocabulary: TagVocabulary,
    index: MetadataIndex | None = None,
    *,
    quarantine_file: Path | None = None,
    ontology: Ontology | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[DataLoader, DataLoader]:
    """(training, validation) loaders of the configured data set; `index`, from `open_dataset`, saves a second scan.

    `quarantine_file` keeps what is known of broken images from one start of a run to the next; the caller owns it.
    `ontology`, that of `vocabulary`, says which tags the tags of sidecars stand for. `share`: (rank, number of ranks).
    Raises InputError for a data set or a split that cannot be used.
    """
    data, seed = config.data, config.training.seed
    index = index if index is not None else open_dataset(data)
    dataset = (
        SidecarJsonDataset(data.roots, vocabulary, index=index, ontology=ontology)
        if data.annotations is None
        else DatasetLoader(data.annotations, data.roots[0], vocabulary, index=index, ontology=ontology)
    )
    split = split_dataset(data, index)
    on_cuda = config.training.device in ("auto", "cuda") and torch.cuda.is_available()
    options = LoadOptions.from_config(data, config.model.resolved_patch_size, on_cuda=on_cuda)
    if options.cache is not None:
        logger.info("%s", ImageReader(index, options.cache).describe_cache())
    rank, world_size = share
    quarantine = Quarantine(quarantine_file, describe_decoder(options.decoding), writes=rank == 0)
    train = DataLoader(
        dataset,
        split.training_rows,
        config.training.batch_size,
        options,
        split=split,
        seed=seed,
        mirroring=create_mirroring(config.orientation, dataset, seed),
        quarantine=quarantine,
        sampler=create_sampler(
            data.sampling, dataset.table, split.training_rows, seed, power=data.sampling_power, cap=data.sampling_cap
        ),
        rank=rank,
        world_size=world_size,
    )
    validation = DataLoader(
        dataset,
        split.validation_rows,
        config.validation.batch_size or config.training.batch_size,
        options,
        split=split,
        quarantine=quarantine,
        rank=rank,
        world_size=world_size,
    )
    logger.info("%s", split.describe())
    return train, validation


def create_part_loader(beside: DataLoader, part: Part) -> DataLoader:
    """Another part of the images that `beside`, of `create_dataloaders`, serves a part of: every row once, in order.

    It shares what `beside` knows of broken images. Raises SplitError where the split has no image of that part.
    """
    assert beside.split is not None
    rows = beside.split.rows(part)
    if not len(rows):
        raise SplitError(
            f"no image is held out for {part.purpose}; set data.{part.name.lower()}_fraction, e.g. to 0.05, and train "
            "a new run with it: these images must not have been trained on"
        )
    batch_size, known = beside._source.plan.batch_size, beside.ledger.quarantine
    return DataLoader(beside.dataset, rows, batch_size, beside.options, split=beside.split, quarantine=known)
