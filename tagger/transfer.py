"""Starting from another model's weights: its body as it is, its head row by row for the tags that both know.

The source is a run, one of its checkpoints or a model folder. Refuses a body of other dimensions; position embeddings
of another image size are resized by the model itself. Tags that the source does not know keep their fresh rows.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tagger.artifact import load_artifact
from tagger.artifact.store import CONFIG_FILE, VOCABULARY_FILE
from tagger.artifact.tags import read_tags
from tagger.checkpoint.format import MANIFEST_FILE, CheckpointError, Tensors, read_manifest, read_part
from tagger.checkpoint.store import newest_first, read_best
from tagger.errors import InputError
from tagger.module_state import check_weights, clean_name, named_tensors

logger = logging.getLogger(__name__)

HEAD = (["head", "weight"], ["head", "bias"])


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from, under the names of a model's state dict, and the tags of their outputs in order."""

    source: Path
    tensors: Tensors
    tags: tuple[str, ...]


def find_initial_weights(place: Path) -> InitialWeights:
    """The weights of a run (its model, else its best or newest checkpoint), a checkpoint or a model folder.

    The averaged ones where they are kept. Raises InputError where there is none.
    """
    if (place / CONFIG_FILE).is_file():
        artifact = load_artifact(place)
        return InitialWeights(place, artifact.weights, tuple(tag.name for tag in artifact.tags))
    if (place / MANIFEST_FILE).is_file():
        part = "ema" if "ema.safetensors" in read_manifest(place).files else "model"
        vocabulary = place.parent.parent / VOCABULARY_FILE
        return InitialWeights(place, read_part(place, part)[1], tuple(tag.name for tag in read_tags(vocabulary)))
    if (place / "model" / CONFIG_FILE).is_file():
        return find_initial_weights(place / "model")
    checkpoints = place / "checkpoints"
    best = read_best(checkpoints)
    candidates = [path for path, _ in newest_first(checkpoints)[0]]
    if best is not None and (checkpoints / best.checkpoint).is_dir():
        candidates.insert(0, checkpoints / best.checkpoint)
    for path in candidates:
        try:
            return find_initial_weights(path)
        except CheckpointError as error:
            logger.warning("%s; the next newest is tried", error)
    raise InputError(f"{place} holds no usable weights; name a run, one of its checkpoints or a model folder")


@torch.no_grad()
def start_from(model: nn.Module, initial: InitialWeights, tags: Sequence[str]) -> int:
    """Load `initial` into a new model whose outputs mean `tags`; returns how many of them the source knew.

    Raises InputError naming what does not fit.
    """
    current = named_tensors(model)
    own, theirs = (_num_members(tensors) for tensors in (current, initial.tensors))
    if own != theirs:
        raise InputError(f"{initial.source} has {theirs} members, this model {own}; use model.num_members={theirs}")
    number_of = {tag: number for number, tag in enumerate(initial.tags)}
    pairs = [(own, number_of[tag]) for own, tag in enumerate(tags) if tag in number_of]
    wanted = {clean_name(name): tensor for name, tensor in initial.tensors.items()}
    own_rows = torch.tensor([own for own, _ in pairs], dtype=torch.int64)
    source_rows = torch.tensor([there for _, there in pairs], dtype=torch.int64)
    for name in (name for name in current if name.split(".")[-2:] in HEAD):
        source = wanted.get(name)
        if source is None or source.shape[0] != len(initial.tags) or source.shape[1:] != current[name].shape[1:]:
            shape = "missing" if source is None else list(source.shape)
            raise InputError(
                f"{initial.source}: {name} is {shape}, which fits no head of {list(current[name].shape)}; use the same "
                "model.embed_dim, model.pooling and model.pooling_grid"
            )
        mixed: Tensor = current[name].detach().cpu().clone()
        mixed[own_rows] = source[source_rows].to(mixed.dtype)
        wanted[name] = mixed
    check_weights(current, wanted, f"{initial.source}: weights")
    model.load_state_dict(wanted)
    logger.info("started from %s: %d of %d tags known there", initial.source, len(pairs), len(tags))
    return len(pairs)


def _num_members(tensors: Mapping[str, Tensor]) -> int:
    """How many networks the tensors of a model belong to (`members.I.` before their names where there are several)."""
    return len({name.split(".")[1] for name in map(clean_name, tensors) if name.startswith("members.")}) or 1
