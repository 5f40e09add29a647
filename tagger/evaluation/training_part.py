"""Whether the split of now is that which a model was trained with, told by the loader position in its checkpoint.

Settings that were edited in a run's own config.yaml, another list of validation images and a changed data set show here
and nowhere else. Refuses nothing: what cannot be told is None.
"""

import contextlib
import logging

from tagger.checkpoint.format import FORMAT_VERSION as STATE_VERSION
from tagger.checkpoint.format import STATE_FILE
from tagger.checkpoint.store import newest_first, read_best
from tagger.data.sampler import hash_rows
from tagger.data.split import Split
from tagger.evaluation.place import Place
from tagger.files import FormatError, read_json
from tagger.run_folder import checkpoints_dir

logger = logging.getLogger(__name__)


def training_part_unchanged(place: Place, split: Split) -> bool | None:
    """Whether `split` trains on the images that the place's checkpoint, else its run's best or newest, was trained on.

    A warning says where it does not. None where no checkpoint is left that tells.
    """
    candidates = []
    if place.checkpoint is not None:
        candidates = [place.checkpoint]
    elif place.run is not None:
        folder = checkpoints_dir(place.run)
        with contextlib.suppress(FormatError):
            best = read_best(folder)
            candidates = [] if best is None else [folder / best.checkpoint]
        candidates += [path for path, _ in newest_first(folder)[0]]
    rows = split.training_rows
    for path in candidates:
        with contextlib.suppress(FormatError, OSError, KeyError, TypeError, ValueError):
            position = read_json(path / STATE_FILE, "checkpoint state", STATE_VERSION)["position"]
            count, found = int(position["rows"]), int(position["rows_hash"])
            unchanged = (count, found) == (len(rows), hash_rows(split.keys, rows))
            if not unchanged:
                logger.warning(
                    "the training images are not those of %s (%s there, %s here): unless images were only added, some "
                    "that it was trained on may count as held out now; bring back the run's config.yaml, its list of "
                    "validation images and its data set",
                    path,
                    f"{count:,}",
                    f"{len(rows):,}",
                )
            return unchanged
    return None
