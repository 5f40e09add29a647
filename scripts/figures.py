"""What a benchmark measures: a figure, its rounds and its goal, and the table that shows many."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A measured number: the median of its rounds. `goal` is a lower limit, or an upper one where `lower_is_better`.

    A `value` of NaN was not measured; `note` says why.
    """

    name: str
    value: float
    rounds: list[float] = field(default_factory=list)
    goal: float | None = None
    lower_is_better: bool = False
    unit: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none, or nothing was measured."""
        if self.goal is None or math.isnan(self.value):
            return None
        return self.value <= self.goal if self.lower_is_better else self.value >= self.goal


def figure(
    name: str,
    rounds: Sequence[float],
    goal: float | None = None,
    *,
    lower_is_better: bool = False,
    unit: str = "",
    note: str = "",
) -> Figure:
    """The figure of some rounds."""
    return Figure(name, statistics.median(rounds), list(rounds), goal, lower_is_better, unit, note)


def figures_table(figures: Sequence[Figure], title: str | None = None) -> Table:
    """Every figure with the least and most of its rounds and its goal."""
    table = Table("figure", "median", "least", "most", "goal", "reached", title=title)
    words = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}
    for each in figures:
        name = f"{each.name} [dim]({each.note})[/]" if each.note else each.name
        limit = "" if each.goal is None else f"{'<=' if each.lower_is_better else '>='} {each.goal:g}"
        if math.isnan(each.value):
            table.add_row(name, "-", "", "", limit, "")
            continue
        spread = (min(each.rounds), max(each.rounds)) if len(each.rounds) > 1 else ()
        least, most = [_shown(number) for number in spread] or ["", ""]
        table.add_row(name, f"{_shown(each.value)} {each.unit}".rstrip(), least, most, limit, words[each.reached])
    return table


def _shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
