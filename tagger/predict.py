"""Scored tags for image files: the same decoding and preprocessing as in training, whatever the batch size.

An image that cannot be read gives an outcome of its own and never stops the others.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tagger.artifact import Artifact
from tagger.data.decode import DecodeError, DecodeOptions, decode
from tagger.data.scan import image_suffixes, printable
from tagger.errors import InputError
from tagger.metrics.keys import logit_of, lowest_keys, to_keys
from tagger.metrics.thresholds import TagThresholds
from tagger.module_state import load_tensors, named_tensors
from tagger.ontology import TagRelations, close_up, relate

DEFAULT_MAX_PIXELS = 200_000_000
_DECODING_THREADS = 4
_HELD_BATCHES = 4


@dataclass(frozen=True)
class ScoredTag:
    """A tag with its probability, 0..1."""

    name: str
    category: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """The tags of one image, the most probable first. `image` is what the model saw, uint8 [3, H, W]."""

    path: Path
    tags: tuple[ScoredTag, ...]
    image: Tensor


@dataclass(frozen=True)
class Unreadable:
    """An image that gives no tags, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class _Prepared:
    path: Path
    image: Tensor
    valid_size: tuple[int, int]


class Tagger:
    """Tags image files with the model of an artifact.

    `model` has the artifact's architecture; its weights are put in here. Images are decoded by threads while the model
    is at work. Scores do not depend on the batch: to 1e-5 on one device.
    """

    def __init__(
        self,
        model: nn.Module,
        artifact: Artifact,
        device: torch.device,
        batch_size: int = 16,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        closure: bool = False,
    ) -> None:
        """`closure`: no tag's probability is below that of a tag which implies it, by the model's ontology."""
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} is below 1; use the number of images at a time, e.g. 16")
        load_tensors(named_tensors(model), artifact.weights, f"the weights in {artifact.folder}")
        self._model = model.to(device).eval()
        self._artifact = artifact
        self._device = device
        self._batch_size = batch_size
        preprocess = artifact.preprocess
        self._decoding = DecodeOptions(preprocess.background, max_pixels, preprocess.decode_scaling)
        # Images of one shape go through the model together: with many shapes, more are held to find companions.
        self._num_held = batch_size * (_HELD_BATCHES if artifact.preprocess.shapes else 1)
        ratings = [index for index, tag in enumerate(artifact.tags) if tag.category == "rating"]
        self._relations = self._find_relations() if closure else None
        self._exclusive = ratings if artifact.metadata.get("exclusive_ratings", False) else []

    def predict(
        self, paths: Sequence[Path], threshold: float | TagThresholds | None = None, top: int | None = None
    ) -> Iterator[Prediction | Unreadable]:
        """An outcome for each path, in order.

        A prediction has the tags at or above `threshold`, at most `top` of them: one probability for all, 0..1, or the
        tags' own; None: the artifact's own, or its one for all. Compared in 16 bits, as evaluation counts. With closure
        a tag is given, too, where one that implies it is. Ratings that exclude each other do not compete with
        thresholds: the most probable one is given. Raises FormatError for thresholds of another model.
        """
        lowest = self._lowest_keys(threshold)
        with ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode") as pool:
            ahead = self._submit(pool, paths, 0)
            for start in range(0, len(paths), self._num_held):
                prepared = [future.result() for future in ahead]
                ahead = self._submit(pool, paths, start + self._num_held)
                scores = self._score_by_shape(prepared, lowest)
                for place, item in enumerate(prepared):
                    if isinstance(item, Unreadable):
                        yield item
                    else:
                        yield Prediction(item.path, self._select(*scores[place], top), item.image)

    def _submit(
        self, pool: ThreadPoolExecutor, paths: Sequence[Path], start: int
    ) -> list[Future[_Prepared | Unreadable]]:
        return [pool.submit(self._prepare, path) for path in paths[start : start + self._num_held]]

    def _prepare(self, path: Path) -> _Prepared | Unreadable:
        preprocess = self._artifact.preprocess
        if path.exists() and not path.is_file():
            return Unreadable(path, "not a regular file")  # reading a pipe could wait for ever
        try:
            decoded = decode(path.read_bytes(), self._decoding, preprocess.content_size)
        except DecodeError as error:
            return Unreadable(path, str(error))
        except OSError as error:
            return Unreadable(path, error.strerror or type(error).__name__)
        image, valid_size = preprocess.apply(decoded.pixels, decoded.full_size)
        return _Prepared(path, image, valid_size)

    def _lowest_keys(self, threshold: float | TagThresholds | None) -> NDArray[np.int16]:
        """The lowest key, int16 [C], with which each tag is given."""
        artifact = self._artifact
        if threshold is None:
            threshold = artifact.threshold if artifact.thresholds is None else artifact.thresholds
        if not isinstance(threshold, TagThresholds):
            return lowest_keys(np.full(len(artifact.tags), logit_of(threshold)))
        threshold.require_model("the thresholds", artifact.weights_sha256, artifact.vocabulary_sha256)
        return lowest_keys(threshold.logits)

    def _score_by_shape(
        self, prepared: Sequence[_Prepared | Unreadable], lowest: NDArray[np.int16]
    ) -> dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Of each readable image, by its place: probabilities [C] and which tags are given, bool [C]."""
        places: dict[torch.Size, list[int]] = {}
        for place, item in enumerate(prepared):
            if isinstance(item, _Prepared):
                places.setdefault(item.image.shape, []).append(place)
        scores: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        for alike in places.values():
            for start in range(0, len(alike), self._batch_size):
                chosen = alike[start : start + self._batch_size]
                images = [item for item in map(prepared.__getitem__, chosen) if isinstance(item, _Prepared)]
                scores.update(zip(chosen, zip(*self._score(images, lowest), strict=True), strict=True))
        return scores

    def _score(
        self, prepared: Sequence[_Prepared], lowest: NDArray[np.int16]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Probabilities [B, C] and which tags are given, bool [B, C]."""
        images = torch.stack([item.image for item in prepared]).to(self._device)
        valid_sizes = torch.tensor([item.valid_size for item in prepared], dtype=torch.int32).to(self._device)
        with torch.inference_mode():
            logits = self._model(images, valid_sizes).float()
            scores = logits.sigmoid()
            if self._exclusive:
                scores[:, self._exclusive] = logits[:, self._exclusive].softmax(dim=1)
            keys: NDArray[np.int16] = to_keys(logits).cpu().numpy()
        array: NDArray[np.float32] = scores.cpu().numpy()
        if self._relations is not None:
            array, keys = close_up(array, self._relations), close_up(keys, self._relations)
        given = keys >= lowest
        if self._exclusive:
            ratings = np.array(self._exclusive)
            given[:, ratings] = False
            given[np.arange(len(given)), ratings[array[:, ratings].argmax(axis=1)]] = True
        return array, given if self._relations is None else close_up(given, self._relations)

    def _find_relations(self) -> TagRelations:
        artifact = self._artifact
        if artifact.ontology is None:
            raise InputError(
                f"{artifact.folder} has no ontology, so nothing is known of what its tags imply; leave closure off, "
                "or train with vocabulary.ontology_file"
            )
        return relate(artifact.ontology, [tag.name for tag in artifact.tags])

    def _select(self, scores: NDArray[np.float32], given: NDArray[np.bool_], top: int | None) -> tuple[ScoredTag, ...]:
        indices = np.flatnonzero(given)
        # Equal scores keep the order of the vocabulary.
        ranked = indices[np.argsort(-scores[indices], kind="stable")][:top]
        tags = self._artifact.tags
        return tuple(ScoredTag(tags[i].name, tags[i].category, float(scores[i])) for i in ranked)


def find_images(places: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the images in folders, sub-folders included, sorted; each path once.

    Hidden entries and linked folders are left out. Raises InputError for a place that does not exist.
    """
    found: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            found |= dict.fromkeys(_images_in(place))
        elif place.exists():
            found[place] = None
        else:
            raise InputError(f"{printable(place)} does not exist; name an image or a folder of images")
    return list(found)


def _images_in(folder: Path) -> list[Path]:
    suffixes = {f".{suffix}" for suffix in image_suffixes()}
    images: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        images += [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(images)
