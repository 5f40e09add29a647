"""What a path on the command line names: a run, one of its checkpoints, or a model folder; and the weights there.

Refuses anything else, and weights of a kind that are not kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tagger.artifact import Artifact, load_artifact
from tagger.artifact.store import CONFIG_FILE, WEIGHTS_FILE
from tagger.checkpoint.format import MANIFEST_FILE, Tensors, read_manifest, read_part
from tagger.checkpoint.store import read_best
from tagger.data.split import Part, Split
from tagger.errors import InputError
from tagger.metrics.thresholds import LeakError, TagThresholds
from tagger.preprocess import Preprocess
from tagger.run_folder import model_dir, require_model

RUN_CONFIG = "config.yaml"
Wanted = Literal["ema", "online", "both"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where weights lie. run: the run they belong to, None for a model folder by itself. checkpoint, model: one of
    the two, or neither where the run is named and the weights are still to be chosen."""

    path: Path
    run: Path | None
    checkpoint: Path | None = None
    model: Path | None = None


def find_place(path: Path) -> Place:
    """Raises InputError, saying what can be named, for anything that holds no weights."""
    if (path / RUN_CONFIG).is_file():
        return Place(path, path)
    if (path / MANIFEST_FILE).is_file():
        run = path.resolve().parent.parent
        if not (run / RUN_CONFIG).is_file():
            raise InputError(f"checkpoint {path} is in no run: {run} has no {RUN_CONFIG}; copy the whole run")
        return Place(path, run, checkpoint=path)
    if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        run = path.resolve().parent
        belongs = (run / RUN_CONFIG).is_file() and model_dir(run).name == path.resolve().name
        return Place(path, run if belongs else None, model=path)
    there = "holds none of these" if path.exists() else "does not exist"
    raise InputError(f"{path} {there}: name a run folder (runs/demo), one of its checkpoints, or a model folder")


@dataclass(frozen=True)
class NamedWeights:
    """Weights to score, under the names of a model's state dict; name: for people, with where they lie.

    kind: "EMA" or "online" of a checkpoint, "model" of a model folder. artifact: that folder's content.
    """

    name: str
    kind: Literal["EMA", "online", "model"]
    tensors: Tensors
    vocabulary_sha256: str | None
    artifact: Artifact | None = None

    def require_vocabulary(self, sha256: str) -> None:
        """Raise InputError unless they are of these tags, their run's."""
        if self.vocabulary_sha256 != sha256:
            raise InputError(f"{self.name} is of another vocabulary than its run has; they do not belong together")


def choose_weights(place: Place, wanted: Wanted | None = None) -> list[NamedWeights]:
    """The weights of a place: as `wanted`, or (None) a run's model and a checkpoint's average, where it has one.

    Of a run, wanted weights are those of its best checkpoint, from which its model was made.
    """
    model, checkpoint = place.model, place.checkpoint
    if wanted is None and place.run is not None and checkpoint is None:
        model = require_model(place.run)
    if model is not None:
        if wanted is not None:
            raise InputError(f"--weights {wanted}: {place.path} is a model folder, which has one kind; name its run")
        artifact = load_artifact(model)
        return [NamedWeights(str(model), "model", artifact.weights, artifact.vocabulary_sha256, artifact)]
    if checkpoint is None:
        assert place.run is not None
        best = read_best(place.run / "checkpoints")
        if best is None:
            raise InputError(f"--weights {wanted}: {place.run} has no best checkpoint yet; name one with --checkpoint")
        checkpoint = place.run / "checkpoints" / best.checkpoint
    has_average = "ema.safetensors" in read_manifest(checkpoint).files
    if wanted in ("ema", "both") and not has_average:
        raise InputError(f"--weights {wanted}: {checkpoint} keeps no EMA weights; use --weights online")
    kinds: Sequence[Literal["EMA", "online"]] = ("EMA", "online") if wanted == "both" else ("EMA",)
    if wanted == "online" or not has_average:
        kinds = ("online",)
    found = []
    for kind in kinds:
        manifest, tensors = read_part(checkpoint, "ema" if kind == "EMA" else "model")
        found.append(NamedWeights(f"{checkpoint} ({kind} weights)", kind, tensors, manifest.vocabulary_sha256))
    return found


def sees_alike(weights: NamedWeights, preprocess: Preprocess) -> bool:
    """Whether images are prepared as a model's own thresholds were fitted for; a warning says where they are not."""
    artifact = weights.artifact
    if artifact is None or artifact.thresholds is None or artifact.preprocess == preprocess:
        return True
    theirs, here = asdict(artifact.preprocess), asdict(preprocess)
    differs = ", ".join(
        f"{name} {theirs[name]} there, {here[name]} here" for name in here if theirs[name] != here[name]
    )
    logger.warning(
        "F1 is at one threshold only: those of %s were fitted on images prepared otherwise (%s)", weights.name, differs
    )
    return False


def fitted_thresholds(weights: NamedWeights, split: Split, part: Part, preprocess: Preprocess) -> TagThresholds | None:
    """A model's own thresholds for images of a part, unless their fit has or may have seen these, or saw others."""
    thresholds = None if weights.artifact is None else weights.artifact.thresholds
    if thresholds is None or part == Part.CALIB or not sees_alike(weights, preprocess):
        return None
    try:
        thresholds.require_split(f"the thresholds of {weights.name}", split)
    except LeakError as error:
        logger.warning("F1 is at one threshold only: %s", error)
        return None
    return thresholds
