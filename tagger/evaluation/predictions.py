"""The scores of every evaluated image in a file for other programs: Parquet or JSON Lines, written as they come.

A score is the probability that belongs to the 16-bit logit that evaluation ranks (softmax over ratings that exclude
each other). All scores of an image, or the highest: those at or above a score, at most so many. Memory is bounded by
a few batches. The file appears when it is complete, in place of an older one.

JSON Lines: first an object about the file, then one an image: `image` below `root`, `image_id`, its own `tags`, and
`scores`: a list in the order of the first line's `vocabulary`, or {tag: score}, the highest first.
Parquet: the same columns, with `scored_tags` beside `scores` where not all are kept; what the file is about is JSON in
the schema's metadata under "tagsmith". Refuses other endings, and Parquet where pyarrow is not installed.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray
from torch import Tensor

from tagger.batch import Batch
from tagger.data.index import MetadataIndex
from tagger.data.scan import printable
from tagger.errors import InputError
from tagger.files import json_line
from tagger.metrics.keys import round_logits

FORMAT_VERSION = 1
SUFFIXES = (".jsonl", ".parquet")
# Scores that are held before they become a row group: 64 MiB.
_GROUP_SCORES = 1 << 24
_GROUP_ROWS = 8192


@dataclass(frozen=True)
class Keep:
    """Which scores of an image are written; all where both are None."""

    min_score: float | None = None
    top: int | None = None

    @property
    def everything(self) -> bool:
        return self.min_score is None and self.top is None

    def places(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """The tags to write of one image's scores [C], the highest first; ties in the order of the vocabulary."""
        chosen = np.arange(len(scores)) if self.min_score is None else np.flatnonzero(scores >= self.min_score)
        return chosen[np.argsort(-scores[chosen], kind="stable")][: self.top]


@dataclass(frozen=True)
class _Image:
    image: str
    root: str
    image_id: str
    tags: list[str]
    scores: NDArray[np.float32]
    scored_tags: list[str] | None


class PredictionFile:
    """Collects an evaluation into a file; use it in a `with` block, at whose end the file is put in place."""

    def __init__(
        self,
        path: Path,
        index: MetadataIndex,
        tags: Sequence[str],
        keep: Keep,
        facts: Mapping[str, object],
        exclusive: Sequence[int] = (),
    ) -> None:
        """tags: names in the order of the outputs. facts: what the file is about. exclusive: tags under one softmax.

        Raises InputError for a file of another kind.
        """
        check_prediction_file(path)
        self.path = path
        self.num_images = 0
        self._index, self._tags, self._keep, self._exclusive = index, tuple(tags), keep, list(exclusive)
        header = {"format_version": FORMAT_VERSION, "kind": "predictions", **facts, "keep": asdict(keep)}
        if keep.everything:
            header["vocabulary"] = list(self._tags)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = _ParquetRows if path.suffix == ".parquet" else _JsonRows
        self._rows: _Rows = kind(self._temporary, header, keep.everything)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Write a batch on the host: logits float32 [B, C] on the CPU."""
        rounded = round_logits(logits)
        scores = rounded.sigmoid()
        if self._exclusive:
            scores[:, self._exclusive] = rounded[:, self._exclusive].softmax(dim=1)
        for row, own, values in zip(batch.row_ids.tolist(), batch.tag_lists(), scores.numpy(), strict=True):
            root, image = self._index.locate(row)
            places = None if self._keep.everything else self._keep.places(values)
            self._rows.add(
                _Image(
                    image=image,
                    root=str(self._index.roots[root]),
                    image_id=f"{int(self._index.image_ids[row]):016x}",
                    tags=[self._tags[tag] for tag in own],
                    scores=values if places is None else values[places],
                    scored_tags=None if places is None else [self._tags[tag] for tag in places.tolist()],
                )
            )
        self.num_images += len(batch)

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._rows.close()
            if error is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def check_prediction_file(path: Path) -> None:
    """Raise InputError where `path` cannot become a file of predictions on this installation."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: predictions are written as {' or '.join(SUFFIXES)}; name such a file")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"{path}: Parquet needs the package pyarrow; install it (pip install 'tagsmith[parquet]'), or name a .jsonl"
        )


class _Rows(Protocol):
    def add(self, image: _Image) -> None: ...

    def close(self) -> None: ...


class _JsonRows:
    def __init__(self, path: Path, header: Mapping[str, object], everything: bool) -> None:
        self._everything = everything
        self._stream = path.open("xb")
        self._stream.write(json_line(header))

    def add(self, image: _Image) -> None:
        content: dict[str, object] = {
            "image": image.image,
            "root": image.root,
            "image_id": image.image_id,
            "tags": image.tags,
            "scores": image.scores
            if image.scored_tags is None
            else dict(zip(image.scored_tags, image.scores, strict=True)),
        }
        try:
            line = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError:  # a file name with undecodable bytes
            values = image.scores.tolist()
            content["scores"] = (
                values if image.scored_tags is None else dict(zip(image.scored_tags, values, strict=True))
            )
            line = json_line(content)
        self._stream.write(line)

    def close(self) -> None:
        self._stream.close()


class _ParquetRows:
    def __init__(self, path: Path, header: Mapping[str, object], everything: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        columns = [("image", text), ("root", text), ("image_id", text), ("tags", pa.list_(text))]
        columns += [] if everything else [("scored_tags", pa.list_(text))]
        columns += [("scores", pa.list_(pa.float32()))]
        self._pa: Any = pa
        self._schema = pa.schema(columns, metadata={"tagsmith": orjson.dumps(header)})
        self._writer: Any = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[_Image] = []
        self._num_scores = 0

    def add(self, image: _Image) -> None:
        self._waiting.append(image)
        self._num_scores += len(image.scores)
        if self._num_scores >= _GROUP_SCORES or len(self._waiting) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        offsets = np.cumsum([0, *(len(image.scores) for image in self._waiting)]).astype(np.int32)
        values = np.concatenate([image.scores for image in self._waiting])
        columns: dict[str, object] = {
            "image": [printable(image.image) for image in self._waiting],
            "root": [printable(image.root) for image in self._waiting],
            "image_id": [image.image_id for image in self._waiting],
            "tags": [image.tags for image in self._waiting],
            "scored_tags": [image.scored_tags for image in self._waiting],
            "scores": self._pa.ListArray.from_arrays(offsets, values),
        }
        arrays = [columns[name] for name in self._schema.names]
        self._writer.write_table(self._pa.table(arrays, schema=self._schema))
        self._waiting, self._num_scores = [], 0
