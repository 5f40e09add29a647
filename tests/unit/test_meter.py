"""The meter averages over images, leaves out what is no number, and goes on after a resume as if nothing had been."""

import json
import math

import torch

from tagger.meter import TrainingMeter

CPU = torch.device("cpu")


def add(meter: TrainingMeter, step: int, loss: float, images: int = 2) -> None:
    meter.add(step, torch.tensor(loss), torch.tensor(float(step)), images, waited_s=0.25, seconds=1.0)


def test_loss_is_averaged_over_images_and_starts_afresh() -> None:
    meter = TrainingMeter()
    add(meter, 1, 6.0, 2)
    add(meter, 2, 3.0, 1)
    assert meter.read(0.1, torch.tensor(1)) == {
        "train/loss": 3.0,
        "train/learning_rate": 0.1,
        "train/grad_norm": 2.0,
        "train/images_per_second": 1.5,
        "train/data_wait_fraction": 0.25,
        "train/skipped_updates": 1.0,
        "train/loss_spikes": 0.0,
    }
    add(meter, 3, 1.0, 1)
    assert meter.read(0.1, torch.tensor(1))["train/loss"] == 1.0


def test_a_loss_that_is_no_number_is_left_out_of_the_average() -> None:
    meter = TrainingMeter()
    add(meter, 1, 6.0)
    add(meter, 2, math.inf)
    add(meter, 3, math.nan)
    assert meter.read(0.1, torch.tensor(2))["train/loss"] == 3.0
    add(meter, 4, math.nan)
    assert math.isnan(meter.read(0.1, torch.tensor(3))["train/loss"])


def test_a_resumed_meter_reads_what_a_straight_one_does() -> None:
    straight, before, after = TrainingMeter(), TrainingMeter(), TrainingMeter()
    for step, loss in enumerate((1.0, math.nan, 0.1, 7.3), start=1):
        add(straight, step, loss)
        add(before, step, loss)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())), CPU)
    for meter in (straight, after):
        add(meter, 5, 1.7)
    assert straight.read(0.1, torch.tensor(0)) == after.read(0.1, torch.tensor(0))


def test_spikes_are_counted() -> None:
    meter = TrainingMeter()
    for step in range(1, 101):
        add(meter, step, 2.0 + 0.1 * (step % 3))
    assert meter.read(0.1, torch.tensor(0))["train/loss_spikes"] == 0
    add(meter, 101, 50.0)
    assert meter.read(0.1, torch.tensor(0))["train/loss_spikes"] == 1
