"""Folders that are written whole or not at all, the latest few of which stay: what holds an index on the disk."""

import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tagger.data.scan import DatasetError
from tagger.files import refusal_to_write, write_json

_KEPT = 2
_STALE_TEMPORARY_S = 86_400.0


class Generation:
    """A folder in the making below `home`: on leaving the block without `commit` it is gone.

    A failure to write leaves the block as a DatasetError that names the folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._committed = False

    def __enter__(self) -> "Generation":
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self._home))
        except OSError as error:
            raise DatasetError(self._cannot_write(error)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise DatasetError(self._cannot_write(error)) from error

    def write_json(self, name: str, content: Mapping[str, Any]) -> int:
        """Write a JSON file into the folder; gives its size in bytes."""
        write_json(self.folder / name, content)
        return (self.folder / name).stat().st_size

    def commit(self, prefix: str) -> Path:
        """Give the folder its final name, which begins with `prefix`: a reader sees all of it or nothing."""
        # mkdtemp makes a folder for its owner alone; an index is shared like any other file.
        self.folder.chmod(0o755)
        final = self._home / f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.folder.rename(final)
        self._committed = True
        return final

    def _cannot_write(self, error: OSError) -> str:
        return _cannot_write(self._home, str(error.strerror or error))


def check_writable(home: Path) -> None:
    """Raises DatasetError where no folder can be made in `home`: better known before the work than after it."""
    reason = refusal_to_write(home)
    if reason is not None:
        raise DatasetError(_cannot_write(home, reason))


def _cannot_write(home: Path, reason: str) -> str:
    return f"data.index_dir: cannot write {home}: {reason}; name another folder or make room"


def newest_first(home: Path) -> list[Path]:
    """The folders that stand, the one used last first."""
    ages: list[tuple[float, str, Path]] = []
    if home.is_dir():
        for path in home.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process cleans up
                if path.is_dir() and not path.name.startswith("."):
                    ages.append((-path.stat().st_mtime, path.name, path))
    return [path for *_, path in sorted(ages)]


def clean_up(home: Path, current: Path) -> None:
    """Drop old folders, but not the last ones: another run may be about to open its own by path."""
    old = [path for path in newest_first(home) if path != current][_KEPT - 1 :]
    for path in home.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _STALE_TEMPORARY_S:
                old.append(path)
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
