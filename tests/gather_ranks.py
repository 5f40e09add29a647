"""One rank of a group that scores its share of some images and brings the counts together: for the tests of that.

`python -m tests.gather_ranks RANK WORLD FOLDER FORM`; the first rank writes what it then knows to FOLDER/FORM.json.
"""

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import orjson
import torch
import torch.distributed as dist

from evaluation_metrics import MetricComputer
from tagger.evaluation.gather import gather_metrics
from tagger.metrics.summary import summarise

NUM_IMAGES, NUM_TAGS = 61, 7


def images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, targets, ids) with ties, a tag without positives and one of all images."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(NUM_IMAGES, NUM_TAGS, generator=generator).mul(4).round().div(4)
    targets = (torch.rand(NUM_IMAGES, NUM_TAGS, generator=generator) < 0.3).float()
    targets[:, 0], targets[:, 1] = 0, 1
    return logits, targets, torch.randperm(1000, generator=generator)[:NUM_IMAGES]


def counted(form: str, rows: slice) -> MetricComputer:
    """The counts of some of the images, in two batches."""
    logits, targets, ids = (values[rows] for values in images())
    computer = MetricComputer(NUM_TAGS, 0.6, form=form)  # type: ignore[arg-type]
    for part in (slice(0, 5), slice(5, None)):
        computer.update(logits[part], targets[part], image_ids=ids[part])
    return computer


def everything(computer: MetricComputer) -> bytes:
    """All that is said of the counts, every digit of it."""
    summary = asdict(summarise(computer, np.arange(NUM_TAGS) * 40, ["general"] * 3 + ["other"] * 4))
    metrics = {name: value for name, value in computer.compute().items() if name != "average_precision"}
    precision = computer.compute()["average_precision"].tolist()
    return orjson.dumps([summary, metrics, precision], option=orjson.OPT_SERIALIZE_NUMPY)


def main() -> None:
    rank, world, folder, form = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    init = f"file:///{(folder / f'group-{form}').as_posix().lstrip('/')}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    bounds = [0, 12, NUM_IMAGES]  # unequal shares
    computer = counted(form, slice(bounds[rank], bounds[rank + 1]))
    assert gather_metrics(computer, destination=1) == (rank == 1)
    if rank == 1:
        (folder / f"{form}.json").write_bytes(everything(computer))
    twice = counted(form, slice(0, 12))
    try:
        gather_metrics(twice)
    except ValueError as error:
        (folder / f"{form}.txt").write_text(str(error), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
