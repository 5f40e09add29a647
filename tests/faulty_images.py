"""Image sources that misbehave inside a loader process, which imports them from here."""

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagger.data.batch_job import ImageSource, LoadedImage
from tagger.errors import StorageError


class OddError(Exception):
    """One that does not survive pickling."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class FaultyImages(ImageSource):
    """Does `fault` at a row: once where there is a `marker` to remember it by, else always."""

    row: int = -1
    fault: str = ""
    marker: Path | None = None

    def load_into(self, row: int, memory: NDArray[np.uint8], *, mirror: bool) -> LoadedImage:
        if row == self.row and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            memory[:] = 99  # a half-written image
            self._act()
        return super().load_into(row, memory, mirror=mirror)

    def _act(self) -> None:
        if self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "hang":
            time.sleep(10_000)
        elif self.fault == "storage":
            raise StorageError("the disk is gone")
        elif self.fault == "odd":
            raise OddError("salt", "pepper")
        elif self.fault == "talk":
            print("printed by a library")
            print("modules:", *sorted(sys.modules), file=sys.stderr)
            logging.getLogger("tagger.data.quarantine").warning("%s tries again", "a disk")
            logging.getLogger("tagger.data.quarantine").debug("not for the log")
