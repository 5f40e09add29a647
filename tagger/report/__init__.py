"""Pages and plots of an evaluation. What draws them is in the extra `report`, and only those who draw import it."""

import importlib.util

from tagger.errors import InputError

INSTALL_HINT = "the page needs matplotlib and Jinja2: pip install matplotlib jinja2 (the extra 'report')"
# Images of other ratings are named on pages and not shown.
SHOWN_RATINGS = (None, "general")


def libraries_missing() -> bool:
    """Whether something that draws pages is not installed; imports nothing."""
    return any(importlib.util.find_spec(name) is None for name in ("matplotlib", "jinja2"))


def require_libraries(option: str) -> None:
    """Raise InputError, naming the option that asks for a page or plots, where what draws them is not installed."""
    if libraries_missing():
        raise InputError(f"{option}: {INSTALL_HINT}")
