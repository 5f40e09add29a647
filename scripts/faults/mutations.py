"""Checkpoints damaged on disk: each must be refused, the one before it used, and that said."""

import logging
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts.faults.toy_run import METRIC, Outcome, fault_of, set_step, toy_state
from tagger.checkpoint.format import CheckpointError
from tagger.checkpoint.store import load_checkpoint
from training_utils import CheckpointManager

PAGE_BYTES = 4096
_LOGGER = "tagger.checkpoint.store"


def truncate(data: bytes, draw: random.Random) -> bytes:
    """Cut at any byte."""
    return data[: draw.randrange(len(data))]


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    """One bit, anywhere."""
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zero_page(data: bytes, draw: random.Random) -> bytes:
    """A page, or what there is of the last one, becomes zeros."""
    start = draw.randrange(0, len(data), PAGE_BYTES)
    end = min(start + PAGE_BYTES, len(data))
    return data[:start] + bytes(end - start) + data[end:]


KINDS: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    "truncate": truncate,
    "flip a bit": flip_bit,
    "zero a page": zero_page,
}


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(record.getMessage())


def mutations(folder: Path, number: int, seed: int = 0) -> Outcome:
    """Damage every file of the newest checkpoint in every way in turn and load; every tenth time both checkpoints."""
    outcome = Outcome("damaged checkpoints")
    state = toy_state()
    with CheckpointManager(folder, 2, METRIC) as manager:
        for step in (1, 2):
            set_step(state, step)
            manager.save(state, {METRIC: step / 10}, wait=True)
    older, newer = sorted(folder.glob("step-*"))
    files = sorted(path.name for path in newer.iterdir())
    cases = [(name, kind) for name in files for kind in KINDS]
    draw = random.Random(seed)
    both = 0
    for trial in range(number):
        name, kind = cases[trial % len(cases)]
        victims = [newer, older] if trial % 10 == 9 else [newer]
        both += len(victims) - 1
        originals = {path / name: (path / name).read_bytes() for path in victims}
        for path, data in originals.items():
            path.write_bytes(_really_changed(data, KINDS[kind], draw))
        fault = _fault(folder, "best" if trial % 2 else "latest", older, victims)
        for path, data in originals.items():
            path.write_bytes(data)
        outcome.trials += 1
        if fault is not None:
            outcome.violations.append(f"{kind} in {name}, trial {trial}: {fault}")
    outcome.facts = {"files": len(files), "of both": both}
    return outcome


def _really_changed(data: bytes, mutate: Callable[[bytes, random.Random], bytes], draw: random.Random) -> bytes:
    for _ in range(100):
        changed = mutate(data, draw)
        if changed != data:
            return changed
    raise AssertionError("every page is zeros")


def _fault(folder: Path, which: str, older: Path, victims: list[Path]) -> str | None:
    warnings = _Warnings()
    logger = logging.getLogger(_LOGGER)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(warnings)
    try:
        loaded = load_checkpoint(folder, which)
    except CheckpointError as error:
        return None if len(victims) == 2 else f"nothing was loaded: {error}"
    finally:
        logger.removeHandler(warnings)
        logger.propagate = propagates
    if loaded is None:
        return "taken for an empty folder: a fresh start"
    if len(victims) == 2 or loaded.path != older:
        return f"{loaded.path.name} was loaded"
    said = " ".join(warnings.text)
    if victims[0].name not in said or f"using {older}" not in said:
        return f"not said: {said!r}"
    return fault_of(loaded)
