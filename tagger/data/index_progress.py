"""Telling how far the making of an index is."""

from collections.abc import Callable

# Told what is going on, and how many of how many files are done (None: nobody knows yet).
Progress = Callable[[str, int, int | None], None]


class Ahead:
    """Tells of files that are found, on top of those of other roots."""

    def __init__(self, progress: Progress, what: str, before: int) -> None:
        self._progress, self._what, self._before = progress, what, before

    def __call__(self, num_files: int) -> None:
        self._progress(self._what, self._before + num_files, None)


class Of:
    """Tells how many of how many are done."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress, self._what = progress, what

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._what, done, total)
