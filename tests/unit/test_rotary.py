"""Rotary positions and register tokens: the formula, what holds when a picture moves or grows, a model's use."""

import json
import math
import typing

import pytest
import torch
from torch import Tensor

from model_architecture import SimplifiedTagger, VisionTransformerConfig
from tagger.config_io import ConfigError
from tagger.errors import InputError
from tagger.module_state import check_weights, named_tensors
from tagger.rotary import RotaryTable, rotate


def _model(**changes: typing.Any) -> SimplifiedTagger:
    torch.manual_seed(0)
    base = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    model = SimplifiedTagger(VisionTransformerConfig(**{**base, "num_tags": 5, "positions": "rotary", **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def _images(batch: int, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + height + width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def _vectors(tokens: int, head_dim: int) -> Tensor:
    return torch.randn(1, 1, tokens, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 5)])
def test_vectors_turn_by_the_written_out_angles(grid: tuple[int, int]) -> None:
    rows, columns = grid
    head_dim, prefix = 8, 2
    vectors = _vectors(prefix + rows * columns, head_dim)
    found = rotate(vectors, RotaryTable(head_dim, prefix)(grid, vectors))[0, 0]
    half_side = math.sqrt(rows * columns) / 2
    for token in range(prefix, prefix + rows * columns):
        row, column = divmod(token - prefix, columns)
        y, x = (row + 0.5 - rows / 2) / half_side, (column + 0.5 - columns / 2) / half_side
        angles = [2 * math.pi * y, 2 * math.pi * y / 10, 2 * math.pi * x, 2 * math.pi * x / 10]  # periods 1 and 10
        pairs = torch.complex(vectors[0, 0, token, :4], vectors[0, 0, token, 4:])
        turned = pairs * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        torch.testing.assert_close(found[token], torch.cat([turned.real, turned.imag]), rtol=1e-12, atol=1e-12)
    assert torch.equal(found[:prefix], vectors[0, 0, :prefix]), "class and register tokens have no place"


def test_scores_depend_on_offsets_alone() -> None:
    query, key = _vectors(1, 16), _vectors(1, 16).flip(-1)
    grid = (5, 7)
    rotation = RotaryTable(16, 0)(grid, query)
    queries, keys = (rotate(v.expand(1, 1, 35, 16), rotation)[0, 0].reshape(5, 7, 16) for v in (query, key))
    here = (queries[1, 2] * keys[3, 1]).sum()
    torch.testing.assert_close((queries[2, 6] * keys[4, 5]).sum(), here, rtol=1e-12, atol=1e-12)
    assert abs((queries[1, 2] * keys[1, 1]).sum() - here) > 1e-3


def test_a_larger_grid_interpolates_the_angles_of_a_smaller_one() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    coarse = torch.atan2(*reversed(RotaryTable(4, 0)((3, 3), like))).reshape(3, 3, 2)
    fine = torch.atan2(*reversed(RotaryTable(4, 0)((9, 9), like))).reshape(9, 9, 2)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)  # patches with the same middle


def test_tables_are_float32_for_smaller_types_and_kept() -> None:
    table = RotaryTable(8, 1)
    with torch.inference_mode():
        first = table((4, 4), torch.zeros(1, dtype=torch.bfloat16))
    assert first[0].dtype == torch.float32 and not first[0].is_inference()
    assert table((4, 4), torch.zeros(1))[0] is first[0]


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_a_rotary_model_sees_where_patches_lie(pooling: str) -> None:
    model, images = _model(pooling=pooling), _images(2)
    swapped = torch.cat([images[..., 8:16], images[..., :8], images[..., 16:]], dim=-1)
    with torch.no_grad():
        assert (model(images) - model(swapped)).abs().max() > 1e-3
        model._rotary._angles = lambda _grid: torch.zeros(16 + (pooling == "class_token"), 4)  # type: ignore[union-attr,method-assign]
        model._rotary._tables._kept.clear()  # type: ignore[union-attr]
        torch.testing.assert_close(model(images), model(swapped), rtol=1e-4, atol=1e-4)


def test_rotary_models_save_no_positions_and_load_at_any_image_size() -> None:
    model = _model(register_tokens=3)
    assert not [name for name in model.state_dict() if "pos" in name]
    larger = _model(image_size=64, register_tokens=3)
    larger.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(larger(_images(2, 64, 64)), model(_images(2, 64, 64)))


def test_weights_with_learned_positions_are_refused_by_a_rotary_model_and_the_other_way_round() -> None:
    rotary, learned = (named_tensors(_model(positions=kind)) for kind in ("rotary", "learned"))
    check_weights(learned, named_tensors(_model(positions="learned", image_size=64)), "the weights")
    with pytest.raises(InputError, match="pos_embed is unknown here"):
        check_weights(rotary, learned, "the weights")
    with pytest.raises(InputError, match="pos_embed is missing"):
        check_weights(learned, rotary, "the weights")


@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_register_tokens_change_logits_and_learn(pooling: str) -> None:
    model = _model(register_tokens=2, pooling=pooling, positions="learned")
    assert model.register_tokens is not None and model.register_tokens.shape == (1, 2, 32)
    before = model(_images(2))
    before.square().sum().backward()
    assert model.register_tokens.grad is not None and model.register_tokens.grad.abs().sum() > 0
    with torch.no_grad():
        model.register_tokens.add_(1.0 + torch.arange(32))
        assert (model(_images(2)) - before).abs().max() > 1e-3


def test_registers_stay_out_of_the_mean() -> None:
    model = _model(register_tokens=2, depth=1)
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        features = model.forward_features(_images(2))
    assert seen[0].shape[1] == 2 + 16
    torch.testing.assert_close(features, seen[0][:, 2:].mean(1))


@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_masked_padding_has_no_influence_beside_registers_and_turns(pooling: str) -> None:
    model = _model(pooling=pooling, register_tokens=2, mask_padding=True)
    sizes = torch.tensor([[32, 13], [9, 32]])
    images = _images(2)
    repainted = images.clone()
    repainted[0, :, :, :8] ^= 255  # wholly outside the 13 columns in the middle
    repainted[1, :, :8] ^= 255
    with torch.no_grad():
        torch.testing.assert_close(model(images, sizes), model(repainted, sizes), rtol=0, atol=1e-5)
        assert (model(images) - model(repainted)).abs().max() > 1e-2


def test_rotary_blocks_compile_without_graph_breaks() -> None:
    model, images = _model(register_tokens=1, qk_norm=True), _images(2)
    with torch.no_grad():
        wanted = model(images)
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(model(images), wanted)
        assert model(_images(2, 16, 48)).shape == (2, 5)


def test_bf16_autocast_stays_close_and_keeps_the_residual_stream_in_float32() -> None:
    model, images = _model(register_tokens=1), _images(4)
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(images)
    assert rounded.dtype == seen[1].dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotery"}, "model.positions='rotery' is not known; use learned or rotary"),
        ({"embed_dim": 24}, "model.embed_dim=24 is not a multiple of 4 x model.num_heads=16; use 16 or 32"),
        ({"register_tokens": -1}, "model.register_tokens=-1 is not a whole number, 0 or more"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _model(**changes)
    assert message in str(error.value)


def test_a_config_saved_before_there_were_rotary_positions_means_learned_ones() -> None:
    values = _model(positions="learned").config.to_dict()
    for name in ("positions", "register_tokens", "patch_dropout"):
        del values[name]
    config = VisionTransformerConfig.from_dict(json.loads(json.dumps(values)))
    assert (config.positions, config.register_tokens, config.patch_dropout) == ("learned", 0, 0.0)
