"""The tables of an evaluation in 80 columns: nothing is cut, and no tag of one image is called the weakest."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console, RenderableType

from evaluation_metrics import MetricComputer
from tagger.evaluation.document import TagList
from tagger.evaluation.tables import group_table, weakest
from tagger.evaluation.watch import Watch
from tagger.metrics.calibration import BinCounts
from tagger.metrics.summary import FrequencyBucket, Mean


def shown(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", ["10,000 to 29,999", "a category of quite a long name, such as nobody has yet given"])
def test_groups_of_a_large_vocabulary_keep_every_digit(name: str) -> None:
    error = BinCounts.zeros(1).calibration(np.arange(1))
    means = (Mean(0.1234, 19_876), Mean(0.2345, 20_123), Mean(0.3456, 20_345))
    table = shown(
        *group_table(
            "by training images", "trained on", [FrequencyBucket(name, 20_345, 1_234_567, *means, error, 0, 1)]
        )
    )
    assert "…" not in table and all(len(line) <= 80 for line in table.splitlines())
    for number in ("20,345", "1,234,567", "0.1234", "19,876", "0.2345", "20,123", "0.3456"):
        assert number in table


def weakest_of(num_images: int) -> str:
    """Of two tags: the first on one image alone, where it scores lowest; the second on half, told well."""
    truth = torch.zeros(num_images, 2)
    truth[0, 0], truth[::2, 1] = 1, 1
    logits = torch.stack([torch.arange(num_images).float(), 4 * truth[:, 1] - 2], dim=1)
    computer = MetricComputer(2)
    computer.update(logits, truth)
    tags = TagList(["seldom", "often"], ["general"] * 2, np.array([3, 300]))
    watch = Watch.create(2, 0.5, None, [], None, [])
    return shown(*weakest(watch.scores("model", "model", {}, dict(computer.compute()), computer, tags), tags))


def test_the_weakest_tags_have_enough_images() -> None:
    table = weakest_of(20)
    assert "often" in table and "seldom" not in table and "of the 1 tags with 5 or more" in table
    assert "none has 5 or more" in weakest_of(6)
