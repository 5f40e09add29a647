"""Optimizers that skip a bad update on the device, the groups that they move, and their state by parameter name."""

from tagger.optim.adafactor import Adafactor
from tagger.optim.adamw import AdamW
from tagger.optim.groups import is_inner_matrix, parameter_groups
from tagger.optim.muon import Muon, MuonAdamW
from tagger.optim.skipping import DeviceSkipping, Group
from tagger.optim.state import (
    load_optimizer,
    optimizer_settings,
    optimizer_stand_ins,
    optimizer_tensors,
    parameter_names,
)

__all__ = [
    "Adafactor",
    "AdamW",
    "DeviceSkipping",
    "Group",
    "Muon",
    "MuonAdamW",
    "is_inner_matrix",
    "load_optimizer",
    "optimizer_settings",
    "optimizer_stand_ins",
    "optimizer_tensors",
    "parameter_groups",
    "parameter_names",
]
