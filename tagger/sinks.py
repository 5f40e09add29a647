"""Where numbers go: `metrics.jsonl` (the local truth) and TensorBoard event files; tagger/wandb_sink.py has another.

Every sink raises SinkError or OSError for a value it could not take and stays usable; the caller counts and goes on.
Local files hold whole lines and whole records only: a write that fails half-way is taken back. On resume whatever lies
past the resumed step is removed from the files themselves, because TensorBoard (2.21, both of its readers) goes on
showing points that a `purge_step` event alone was meant to hide.
"""

import io
import logging
import os
import re
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import orjson
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import DataClass, HistogramProto, Summary  # type: ignore[import-untyped]
from tensorboard.plugins.pr_curve.metadata import create_summary_metadata  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from tensorboard.util.tensor_util import make_tensor_proto  # type: ignore[import-untyped]

from tagger.files import write_atomic
from tagger.metrics.levels import Levels

logger = logging.getLogger(__name__)

_RECORD_HEADER = struct.Struct("<QI")  # length of the data and a checksum of the length
_RECORD_FOOTER = 4  # a checksum of the data
HISTOGRAM_BINS = 50


class Sink(ABC):
    """One place where numbers go. Used from one thread."""

    name: str

    @abstractmethod
    def write_scalars(self, scalars: Mapping[str, float], step: int, epoch: int, wall_time: float) -> None:
        """Record the scalars of a step; `wall_time` in seconds since 1970."""

    @abstractmethod
    def close(self) -> None:
        """Hand over what is pending and release the file or connection."""


class PictureSink(Sink):
    """A sink that also shows pictures and distributions."""

    @abstractmethod
    def write_picture(self, name: str, picture: Image.Image, step: int, wall_time: float) -> None:
        """Record an RGB picture."""

    @abstractmethod
    def write_histogram(self, name: str, values: np.ndarray, step: int, wall_time: float) -> None:
        """Record the distribution of `values`: float64, at least one, all finite."""

    @abstractmethod
    def write_curves(self, name: str, curves: Mapping[str, Levels], step: int, wall_time: float) -> None:
        """Record precision-recall curves by what they are of."""


class JsonlSink(Sink):
    """One JSON object a line: `step`, `epoch`, `time` and the scalars; what is not finite becomes null.

    `resume_step` is the last step to keep in an existing file; None starts an empty one.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        if path.exists():
            _trim_lines(path, resume_step)
        self._file = _AppendedFile(path)

    def write_scalars(self, scalars: Mapping[str, float], step: int, epoch: int, wall_time: float) -> None:
        line = {"step": step, "epoch": epoch, "time": wall_time, **scalars}
        self._file.append(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        self._file.close()


class TensorBoardSink(PictureSink):
    """Event files as TensorBoard reads them, written without TensorFlow.

    `resume_step` is the last step to keep of the event files already in `folder`; None removes them. Records are
    written by the calling thread, so that a full disk is seen here and not in a thread that dies unnoticed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        for path in earlier:
            if resume_step is None:
                path.unlink()
            else:
                _trim_events(path, resume_step)
        # TensorBoard reads the files of a run in the order of their names: a clock that was set back must not break it.
        stamp = max([int(time.time()), *(_stamp_of(path) + 1 for path in earlier)])
        self._file = _AppendedFile(folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}")
        now = time.time()
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if earlier:
            # For a TensorBoard that is running and has the old points in memory.
            first_step = 0 if resume_step is None else resume_step + 1
            self._write(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, scalars: Mapping[str, float], step: int, epoch: int, wall_time: float) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in {**scalars, "epoch": epoch}.items()]
        self._write(Event(wall_time=wall_time, step=step, summary=Summary(value=values)))

    def write_picture(self, name: str, picture: Image.Image, step: int, wall_time: float) -> None:
        encoded = io.BytesIO()
        picture.save(encoded, "PNG", compress_level=1)  # half the time for a quarter more bytes
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        self._write(
            Event(wall_time=wall_time, step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))
        )

    def write_histogram(self, name: str, values: np.ndarray, step: int, wall_time: float) -> None:
        histogram = Summary.Value(tag=name, histo=_histogram(values))
        self._write(Event(wall_time=wall_time, step=step, summary=Summary(value=[histogram])))

    def write_curves(self, name: str, curves: Mapping[str, Levels], step: int, wall_time: float) -> None:
        values = [_pr_curve(f"{name}/{label}", curve) for label, curve in curves.items()]
        self._write(Event(wall_time=wall_time, step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


class _AppendedFile:
    """A file that grows by whole pieces: a piece that does not fit is taken back, and the next one is tried anew."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._torn = False

    def append(self, piece: bytes) -> None:
        """Raises OSError when the piece could not be written whole."""
        if self._torn:
            self._take_back()
        remaining = memoryview(piece)
        try:
            while remaining:
                remaining = remaining[self._stream.write(remaining) :]
        except OSError:
            self._torn = True
            self._take_back()
            raise
        self._size += len(piece)

    def close(self) -> None:
        self._stream.close()

    def _take_back(self) -> None:
        self._stream.truncate(self._size)
        self._torn = False


def _trim_lines(path: Path, last_step: int | None) -> None:
    """Keep the whole lines of the steps up to `last_step` (None: no line)."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _line_is_kept(line, last_step)]
    if kept == lines and (not lines or lines[-1].endswith(b"\n")):
        return
    write_atomic(path, b"".join(line if line.endswith(b"\n") else line + b"\n" for line in kept))
    past = "every step" if last_step is None else f"step {last_step}"
    logger.info("%s: removed %d lines that were torn or past %s", path.name, len(lines) - len(kept), past)


def _line_is_kept(line: bytes, last_step: int | None) -> bool:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    step = content.get("step") if isinstance(content, dict) else None
    return last_step is not None and isinstance(step, int) and step <= last_step


def _trim_events(path: Path, last_step: int) -> None:
    """Keep the whole records of the steps up to `last_step`."""
    content = path.read_bytes()
    kept = b"".join(record for record, event in _records(content) if event.step <= last_step)
    if kept != content:
        write_atomic(path, kept)


def _records(content: bytes) -> Iterator[tuple[bytes, Event]]:
    """Each whole record of an event file with the event in it; ends at the first one that is torn."""
    start = 0
    while start + _RECORD_HEADER.size <= len(content):
        length, _ = _RECORD_HEADER.unpack_from(content, start)
        data = start + _RECORD_HEADER.size
        end = data + length + _RECORD_FOOTER
        if end > len(content):
            return
        yield content[start:end], Event.FromString(content[data : data + length])
        start = end


def _stamp_of(path: Path) -> int:
    found = re.match(r"events\.out\.tfevents\.(\d+)", path.name)
    return int(found[1]) if found else 0


def _pr_curve(name: str, curve: Levels) -> Summary.Value:
    """As the PR curves plugin reads it: six rows over evenly spaced probabilities, shares of nothing being 0."""
    others = curve.num_images - curve.num_positives
    wrong = curve.predicted - curve.hits
    rows = (curve.hits, wrong, others - wrong, curve.num_positives - curve.hits, curve.precision, curve.recall)
    metadata = create_summary_metadata(display_name="", description="", num_thresholds=len(curve.hits))
    metadata.data_class = DataClass.DATA_CLASS_TENSOR
    tensor = make_tensor_proto(np.nan_to_num(np.stack(rows)).astype(np.float32))
    return Summary.Value(tag=name, metadata=metadata, tensor=tensor)


def _histogram(values: np.ndarray) -> HistogramProto:
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    return HistogramProto(
        min=float(values.min()),
        max=float(values.max()),
        num=float(values.size),
        sum=float(values.sum()),
        sum_squares=float(np.square(values).sum()),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
