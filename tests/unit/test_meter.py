"""The meter averages over images and refuses a loss that is no number."""

import math

import pytest
import torch

from tagger.errors import DivergedError
from tagger.meter import TrainingMeter


def test_loss_is_averaged_over_images_and_starts_afresh() -> None:
    meter = TrainingMeter(torch.device("cpu"))
    meter.add(torch.tensor(6.0), torch.tensor(1.0), 2, waited_s=0.5, seconds=1.0)
    meter.add(torch.tensor(3.0), torch.tensor(2.0), 1, waited_s=0.0, seconds=1.0)
    scalars = meter.read(2, 0.1, torch.tensor(1))
    assert scalars == {
        "train/loss": 3.0,
        "train/learning_rate": 0.1,
        "train/grad_norm": 2.0,
        "train/images_per_second": 1.5,
        "train/data_wait_fraction": 0.25,
        "train/skipped_updates": 1.0,
    }
    meter.add(torch.tensor(1.0), torch.tensor(1.0), 1, waited_s=0.0, seconds=1.0)
    assert meter.read(3, 0.1, torch.tensor(1))["train/loss"] == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(loss: float) -> None:
    meter = TrainingMeter(torch.device("cpu"))
    meter.add(torch.tensor(loss), torch.tensor(1.0), 1, waited_s=0.0, seconds=1.0)
    with pytest.raises(DivergedError, match="at step 7"):
        meter.read(7, 0.1, torch.tensor(0))
