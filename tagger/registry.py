"""Name -> thing, for what a recipe chooses by name: models, losses, schedules.

Refuses a name that is taken and a name that is not there; the message for the latter gives the nearest one.
"""

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind; ``kind`` is the word that messages use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters what it decorates under ``name`` and returns it unchanged."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry of ``name``; ValueError naming the nearest one when there is none."""
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=1, cutoff=0.6)
        remedy = f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(self.names()) or '(none yet)'}"
        raise ValueError(f"unknown {self.kind} '{name}'; {remedy}")

    def names(self) -> tuple[str, ...]:
        """Every name, sorted."""
        return tuple(sorted(self._entries))
