"""Several networks as one model: started apart, trained each by its own loss, averaged."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import training_utils
from Configuration_System import ModelSection, OptimizerSection
from loss_functions import BinaryCrossEntropy
from model_architecture import SimplifiedTagger, TaggerEnsemble, VisionTransformerConfig, create_model
from scripts.gpu_bench.flops import forward_flops
from tagger.config_io import ConfigError
from tagger.distributed import ALONE, Ranks
from tagger.ensemble import Ensemble, networks_in
from tagger.errors import InputError
from tagger.module_state import check_weights, named_tensors
from tagger.objective import TrainingObjective
from tagger.optim.groups import layers_below_head
from tagger.parallel import require_shardable
from tagger.tokens import resize_position_embedding
from tagger.transfer import InitialWeights, start_from
from training_utils import MixedPrecisionTrainer, compile_model, create_optimizer

TAGS = ("bird", "boat", "tree", "house", "cloud")
CONFIG = VisionTransformerConfig(
    16, 8, 16, 2, 2, 2.0, num_tags=len(TAGS), pooling="grid", pooling_grid=2, num_members=3
)


def _ensemble(**changes: Any) -> TaggerEnsemble:
    torch.manual_seed(0)
    model = create_model(dataclasses.replace(CONFIG, **changes))
    assert isinstance(model, TaggerEnsemble)
    return model


def _members(model: TaggerEnsemble) -> list[SimplifiedTagger]:
    return [member for member in model.members if isinstance(member, SimplifiedTagger)]


def _batch(images: int = 4, side: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    indices, offsets = torch.arange(images, dtype=torch.int32) % len(TAGS), torch.arange(images + 1, dtype=torch.int32)
    return pixels, torch.full((images, 2), side, dtype=torch.int32), indices, offsets


def test_logits_are_the_mean_of_members_that_start_apart() -> None:
    model = _ensemble().eval()
    images = _batch()[0]
    of_each = [member(images) for member in _members(model)]
    torch.testing.assert_close(model(images), sum(of_each) / 3)
    assert not torch.equal(of_each[0], of_each[1]) and not torch.equal(of_each[1], of_each[2])
    assert networks_in(model) == _members(model) and networks_in(_members(model)[0]) == [_members(model)[0]]


def test_one_member_is_a_plain_tagger() -> None:
    section = ModelSection(preset="vit_tiny", depth=1)
    assert isinstance(create_model(section, 3, 32), SimplifiedTagger)
    section = dataclasses.replace(section, num_members=2)
    model = create_model(section, 3, 32)
    assert isinstance(model, TaggerEnsemble)
    assert all(isinstance(create_model(member.config), SimplifiedTagger) for member in _members(model))
    with pytest.raises(ValueError, match="num_members=2 for one network; use create_model"):
        SimplifiedTagger(model.config)
    with pytest.raises(ValueError, match="an ensemble of 1; pass two networks or more"):
        Ensemble([nn.Linear(2, 2)])


@pytest.mark.parametrize("number", [-1, 0, 65])
def test_a_number_of_members_that_cannot_be_meant_is_refused(number: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.num_members={number} is not a whole number from 1 to 64; 4 is usual"
    ):
        ModelSection(num_members=number)


def test_a_saved_config_gives_the_same_ensemble_back() -> None:
    model = _ensemble()
    again = create_model(VisionTransformerConfig.from_dict(model.config.to_dict()))
    again.load_state_dict(model.state_dict())
    images = _batch()[0]
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert {name.split(".")[1] for name in model.state_dict()} == {"0", "1", "2"}
    assert model.num_parameters() == 3 * _members(model)[0].num_parameters()


def test_every_member_starts_at_the_priors_and_leaves_out_patches() -> None:
    model = _ensemble()
    model.set_head_bias(torch.full((len(TAGS),), 0.25))
    model.patch_dropout = 0.5
    assert model.patch_dropout == 0.5
    for member in _members(model):
        assert member.head.bias.sigmoid().tolist() == pytest.approx([0.25] * len(TAGS))
        assert member.patch_dropout == 0.5


@pytest.mark.parametrize("own_share", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tags", [None, 2])
def test_each_member_is_trained_by_its_own_loss(chunk_tags: int | None, own_share: float) -> None:
    model, batch = _ensemble(), _batch()
    loss = TrainingObjective(model, BinaryCrossEntropy(), chunk_tags)(*batch, own_share)
    loss.backward()
    alone = []
    for member in _members(_ensemble()):
        alone.append(TrainingObjective(member, BinaryCrossEntropy(), chunk_tags)(*batch, own_share))
        (alone[-1] / 3).backward()
        found = dict(_members(model)[len(alone) - 1].named_parameters())
        for name, parameter in member.named_parameters():
            torch.testing.assert_close(found[name].grad, parameter.grad, msg=name)
    torch.testing.assert_close(loss, torch.stack(alone).mean())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])  # Muon's has the same length whatever the gradient's
@pytest.mark.parametrize("limit", [None, 0.05])
def test_an_update_is_that_of_each_member_alone(name: Any, limit: float | None) -> None:
    """Also where one member's gradient is far above the limit and the others' are not."""
    section = OptimizerSection(name=name, eps=1e-30)
    together, alone, batch = _ensemble(), _ensemble(), _batch()
    with torch.no_grad():
        for model in (together, alone):
            _members(model)[0].head.weight.mul_(100)
    precision = MixedPrecisionTrainer("off", torch.device("cpu"))
    TrainingObjective(together, BinaryCrossEntropy())(*batch).backward()
    norm, left_out = precision.step(create_optimizer(section, together), list(together.parameters()), limit, None, 3)
    norms = []
    for member in _members(alone):
        TrainingObjective(member, BinaryCrossEntropy())(*batch).backward()
        norms.append(precision.step(create_optimizer(section, member), list(member.parameters()), limit)[0])
    assert not left_out and max(norms) > 20 * min(norms)
    torch.testing.assert_close(norm, torch.stack(norms).mean())
    for (key, found), expected in zip(together.named_parameters(), alone.parameters(), strict=True):
        if not key.endswith("qkv.bias"):  # a key's bias has no gradient but rounding
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=key)


def test_a_bad_gradient_of_one_member_leaves_the_update_out() -> None:
    model = _ensemble()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    TrainingObjective(model, BinaryCrossEntropy())(*_batch()).backward()
    gradient = _members(model)[1].head.bias.grad
    assert gradient is not None
    gradient[0] = float("nan")
    precision = MixedPrecisionTrainer("off", torch.device("cpu"))
    optimizer = create_optimizer(OptimizerSection(), model)
    assert precision.step(optimizer, list(model.parameters()), 1.0, None, 3)[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_logits_have_the_members_dtype() -> None:
    model, images = _ensemble().eval(), _batch()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.float32 and model.train()(images).dtype == torch.bfloat16
    assert model.double().eval()(images).dtype == torch.float64


def test_shapes_are_had_without_values() -> None:
    with torch.device("meta"):
        model = create_model(CONFIG).eval()
        assert model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, len(TAGS))


def test_the_formula_counts_all_members() -> None:
    assert forward_flops(CONFIG) == 3 * forward_flops(dataclasses.replace(CONFIG, num_members=1))


def test_dropout_is_drawn_for_each_member() -> None:
    model = _ensemble(head_dropout=0.5)
    _members(model)[1].load_state_dict(_members(model)[0].state_dict())
    images = _batch()[0]
    assert not torch.equal(_members(model)[0].train()(images), _members(model)[1].train()(images))


def test_muon_and_layer_decay_know_the_layers_of_each_member() -> None:
    one, model = create_model(dataclasses.replace(CONFIG, num_members=1)), _ensemble()
    below, of_one = layers_below_head(model), layers_below_head(one)
    for member in _members(model):
        expected = [of_one[id(parameter)] for parameter in one.parameters()]
        assert [below[id(parameter)] for parameter in member.parameters()] == expected
    section = OptimizerSection(name="muon", layer_decay=0.5)
    counts = []
    for each in (one, model):
        groups = create_optimizer(section, each).param_groups
        counts.append(sum(len(group["params"]) for group in groups if "momentum" in group))
    assert counts[1] == 3 * counts[0] > 0


def test_the_blocks_of_all_members_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []

    def note(_: nn.Module, blocks: Iterable[nn.Module], *__: object) -> bool:
        seen.extend(blocks)
        return True

    monkeypatch.setattr(training_utils, "compile_blocks", note)
    model = _ensemble()
    assert compile_model(model, "on", torch.device("cpu"))
    assert seen == [block for member in _members(model) for block in member.blocks]


def test_weights_of_another_image_size_load() -> None:
    small, large = _ensemble(), _ensemble(image_size=32)
    weights = {name: tensor.detach().clone() for name, tensor in named_tensors(small).items()}
    check_weights(named_tensors(large), weights, "the weights")
    large.load_state_dict(weights)
    for theirs, ours in zip(_members(small), _members(large), strict=True):
        assert theirs.pos_embed is not None and ours.pos_embed is not None
        torch.testing.assert_close(ours.pos_embed, resize_position_embedding(theirs.pos_embed, (2, 2), (4, 4)))


def test_it_is_exported_as_one_graph() -> None:
    model = _ensemble().eval()
    images = _batch()[0]
    exported = torch.export.export(model, (images,), dynamic_shapes={"images": {0: Dim("batch")}})
    more = _batch(7)[0]
    torch.testing.assert_close(exported.module()(more), model(more))


def _initial(model: nn.Module, tags: Iterable[str]) -> InitialWeights:
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    return InitialWeights(Path("source"), tensors, tuple(tags))


def test_a_new_ensemble_starts_from_an_old_one_member_by_member() -> None:
    source = _ensemble()
    torch.manual_seed(7)
    model = create_model(dataclasses.replace(CONFIG, num_tags=3))
    assert start_from(model, _initial(source, TAGS), ("cloud", "sun", "bird")) == 2
    for new, old in zip(networks_in(model), _members(source), strict=True):
        assert isinstance(new, SimplifiedTagger)
        assert torch.equal(new.head.weight[[0, 2]], old.head.weight[[4, 0]])
        assert torch.equal(new.blocks[1].mlp.fc1.weight, old.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_starting_from_another_number_of_members_is_refused(theirs: int, ours: int) -> None:
    source, model = (create_model(dataclasses.replace(CONFIG, num_members=number)) for number in (theirs, ours))
    said = rf"source has {theirs} members, this model {ours}; use model\.num_members={theirs}"
    with pytest.raises(InputError, match=said):
        start_from(model, _initial(source, TAGS), TAGS)


def test_members_and_parts_of_weights_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"model\.num_members=2 .*training\.parallel=ddp"):
        require_shardable("fsdp", Ranks(0, 2), "adamw", 2)
    require_shardable("ddp", Ranks(0, 2), "adamw", 2)
    require_shardable("fsdp", ALONE, "adamw", 2)
