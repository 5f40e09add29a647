"""Default names of what an evaluation writes: one for each model, part and mode, so that none overwrites another's."""

from argparse import Namespace
from pathlib import Path

from tagger.evaluation.place import Place
from tagger.options import output_file


def default_file(name: str, place: Place, options: Namespace) -> Path:
    """`name` ("evaluation.json") in the folder of the place's run, with what differs from its model's score: -test.

    Raises OptionError where it cannot be written.
    """
    assert place.run is not None
    checkpoint = "" if place.checkpoint is None else place.checkpoint.resolve().name
    return _file(place.run, name, [checkpoint, options.weights or "", *_part_and_mode(options)])


def default_comparison(run: Path, places: list[Place], options: Namespace) -> Path:
    """The file of a comparison in the run's folder, by what the run's own model is compared with."""
    return _file(run, "comparison.json", [*(_name(run, place) for place in places), *_part_and_mode(options)])


def _file(run: Path, name: str, words: list[str]) -> Path:
    stem, _, suffix = name.partition(".")
    return output_file(str(run / f"{'-'.join([stem, *filter(None, words)])}.{suffix}"))


def _part_and_mode(options: Namespace) -> list[str]:
    return [name for name, default in ((options.part, "val"), (options.mode, "full")) if name != default]


def _name(run: Path, place: Place) -> str:
    """The run of a place, unless it is this one, and its checkpoint; the folder of a model by itself."""
    if place.run is None:
        return place.path.resolve().name
    own = "" if place.run.resolve() == run.resolve() else place.run.resolve().name
    return "-".join(filter(None, [own, "" if place.checkpoint is None else place.checkpoint.resolve().name]))
