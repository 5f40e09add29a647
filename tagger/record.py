"""One image of a data set as every reader gives it: where it lies and which tags it carries."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """`rating` is one of `tagger.data.sidecar.RATINGS`, or None where the source names none."""

    image_path: str
    stem: str
    tags: tuple[str, ...]
    rating: str | None = None
