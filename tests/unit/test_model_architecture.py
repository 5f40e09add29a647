"""The network: its arithmetic against float64 formulas, what a padding mask promises, and what survives a save."""

import copy
import json
import math
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from Configuration_System import ModelSection
from model_architecture import (
    MODELS,
    PRESET_DIMENSIONS,
    SimplifiedTagger,
    TransformerBlock,
    VisionTransformerConfig,
    create_model,
    resolve_model_config,
)
from tagger.config_io import ConfigError
from tagger.tokens import ConvStem, PatchStem, content_mask, resize_position_embedding

SMALL: dict[str, typing.Any] = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_tags": 7,
}


def _config(**changes: typing.Any) -> VisionTransformerConfig:
    return VisionTransformerConfig(**{**SMALL, **changes})


def _model(**changes: typing.Any) -> SimplifiedTagger:
    torch.manual_seed(0)
    model = SimplifiedTagger(_config(**changes))
    # Weights of order one, so that a wrong sign or a lost term is not hidden below the tolerance.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        model.stem.train()
        model(_images(16, model.config.image_size, model.config.image_size))  # running statistics off their defaults
    return model.eval()


def _images(batch: int, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + height + width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


# Dimensions


@pytest.mark.parametrize(
    ("preset", "published"),  # timm's counts at 224 px with no head, of the models of the two papers
    [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656), ("vit_large", 303_301_632)],
)
def test_presets_have_the_published_number_of_parameters(preset: typing.Any, published: int) -> None:
    section = ModelSection(preset=preset, pooling="class_token")
    with torch.device("meta"):
        model = create_model(section, num_tags=1000, image_size=224)
    width = model.config.embed_dim
    head = width * 1000 + 1000
    # Published models give the class token a position embedding of its own; here it is part of the token.
    assert model.num_parameters() - head == published - width


def test_configured_names_are_the_registered_ones() -> None:
    hints = typing.get_type_hints(ModelSection)
    assert typing.get_args(hints["name"]) == MODELS.names()
    assert set(typing.get_args(hints["preset"])) == set(PRESET_DIMENSIONS)


def test_a_section_overrides_its_preset() -> None:
    section = ModelSection(preset="vit_tiny", depth=4, embed_dim=160, num_heads=5, patch_size=8, mlp_ratio=3.0)
    config = resolve_model_config(section, num_tags=9, image_size=64)
    assert (config.depth, config.embed_dim, config.num_heads, config.patch_size, config.mlp_ratio) == (4, 160, 5, 8, 3)
    assert resolve_model_config(ModelSection(preset="vit_tiny"), num_tags=9, image_size=64).embed_dim == 192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": 450, "patch_size": 16},
            "data.image_size=450 is not a multiple of model.patch_size=16; use 448 or 464",
        ),
        ({"image_size": 4}, "data.image_size=4 is not a multiple of model.patch_size=8; use 8"),
        ({"embed_dim": 34}, "model.embed_dim=34 is not a multiple of model.num_heads=4; use 32 or 36"),
        ({"stem": "conv", "patch_size": 12, "image_size": 48}, "model.patch_size=12 is not a power of two"),
        ({"stem": "cnov"}, "model.stem='cnov' is not known; use patch or conv"),
        ({"depth": 0}, "model.depth=0 is not a whole number, 1 or more"),
        ({"num_tags": True}, "num_tags=True is not a whole number, 1 or more"),
        ({"drop_path": 1.0}, "model.drop_path=1.0 is not in 0 <= x < 1"),
        ({"head_dropout": 1.0}, "model.head_dropout=1.0 is not in 0 <= x < 1"),
        ({"num_members": 1.5}, "model.num_members=1.5 is not a whole number, 1 or more"),
        ({"pooling_grid": 0}, "model.pooling_grid=0 is not a whole number, 1 or more"),
        ({"pooling": "grid", "pooling_grid": 5}, "model.pooling_grid=5 is above the tokens a side; use 4"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio=0.0 leaves the MLP no hidden unit"),
        ({"layer_scale_init": -1.0}, "model.layer_scale_init=-1.0 is not above 0"),
        ({"qk_norm": "yes"}, "model.qk_norm='yes' is not true or false"),
        ({"mean": (0.5, 0.5)}, "is not three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "not above 0"),
    ],
)
def test_impossible_dimensions_are_refused_with_a_remedy(changes: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _config(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_saved_before_grid_pooling_still_loads() -> None:
    saved = _config().to_dict()
    del saved["pooling_grid"], saved["head_dropout"]
    assert VisionTransformerConfig.from_dict(saved) == _config()


def test_config_survives_json() -> None:
    config = _config(stem="conv", pooling="class_token", qk_norm=True, layer_scale_init=1e-5, mean=(0.1, 0.2, 0.3))
    assert VisionTransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_refuses_unknown_and_missing_keys() -> None:
    values = _config().to_dict()
    with pytest.raises(ConfigError, match="unknown key 'embed_dims'; did you mean 'embed_dim'"):
        VisionTransformerConfig.from_dict({**values, "embed_dims": 3})
    del values["depth"]
    with pytest.raises(ConfigError, match="depth missing"):
        VisionTransformerConfig.from_dict(values)


def test_create_model_wants_dimensions_exactly_once() -> None:
    with pytest.raises(ValueError, match="which holds them"):
        create_model(_config(), num_tags=3)
    with pytest.raises(ValueError, match="pass num_tags and image_size"):
        create_model(ModelSection(), num_tags=3)


# Arithmetic


def _naive_block(block: TransformerBlock, tokens: Tensor, attended: Tensor | None) -> Tensor:
    """The block from the equations of the papers, one head and one image at a time."""
    weights = {name: value.detach() for name, value in block.state_dict().items()}
    heads = block.attn.num_heads
    width = tokens.shape[-1]
    size = width // heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    out = tokens.clone()
    for image in range(len(tokens)):
        x = tokens[image]
        query, key, value = linear(norm(x, "norm1"), "attn.qkv").split(width, dim=-1)
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = norm(query[:, part], "attn.q_norm") @ norm(key[:, part], "attn.k_norm").T / math.sqrt(size)
            if attended is not None:
                scores[:, ~attended[image]] = -math.inf
            shares = torch.exp(scores - scores.max(-1, keepdim=True).values)
            mixed.append(shares / shares.sum(-1, keepdim=True) @ value[:, part])
        x = x + linear(torch.cat(mixed, -1), "attn.proj") * weights["ls1.gamma"]
        hidden = linear(norm(x, "norm2"), "mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        out[image] = x + linear(hidden, "mlp.fc2") * weights["ls2.gamma"]
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_block_equals_the_written_out_formula_in_float64(masked: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(24, 3, 2.0, qk_norm=True, layer_scale_init=0.7).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randn(2, 6, 24, dtype=torch.float64)
    attended = torch.tensor([[True] * 6, [True, False, True, True, False, False]]) if masked else None
    found = block(tokens, None if attended is None else attended[:, None, None, :])
    torch.testing.assert_close(found, _naive_block(block, tokens, attended), rtol=1e-11, atol=1e-11)


def test_patch_stem_is_a_strided_convolution() -> None:
    torch.manual_seed(0)
    stem = PatchStem(8, 16).double()
    pixels = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    wanted = (
        F.conv2d(pixels, stem.proj.weight.reshape(16, 3, 8, 8), stem.proj.bias, stride=8).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(stem(pixels), wanted)


@pytest.mark.parametrize("patch_size", [2, 8, 16])
def test_conv_stem_gives_one_token_for_each_patch(patch_size: int) -> None:
    stem = ConvStem(patch_size, 48)
    assert stem(torch.zeros(2, 3, 3 * patch_size, 2 * patch_size)).shape == (2, 6, 48)
    assert len(stem.stages) == int(math.log2(patch_size)) - 1


def test_normalisation_is_the_textbook_one() -> None:
    model = SimplifiedTagger(_config(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))).double()
    images = _images(2)
    mean = np.array([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)
    std = np.array([0.2, 0.25, 0.3]).reshape(1, 3, 1, 1)
    wanted = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(model.normalise(images).numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_logits_are_the_head_of_the_features() -> None:
    model = _model()
    images = _images(3)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (3, 32)
        assert torch.equal(model(images), model.head(features))
        torch.testing.assert_close(features, model.encode(model.normalise(images.float())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_an_image_scores_the_same_in_any_batch(stem: str, pooling: str) -> None:
    model = _model(stem=stem, pooling=pooling)
    images = _images(4)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert together.shape == (4, 7)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32), "images are float32; expected uint8"),
        (torch.zeros(1, 3, 32, 30, dtype=torch.uint8), "[1, 3, 32, 30]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "[3, 32, 32]"),
        (torch.zeros(1, 4, 32, 32, dtype=torch.uint8), "[1, 4, 32, 32]"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        SimplifiedTagger(_config())(images)
    assert message in str(error.value)


def test_bf16_autocast_stays_close_to_float32() -> None:
    model = _model(qk_norm=True, layer_scale_init=0.5)
    images = _images(4)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(images)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


# Training


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_gradient_reaches_every_parameter(stem: str, pooling: str) -> None:
    torch.manual_seed(0)
    model = SimplifiedTagger(_config(stem=stem, pooling=pooling, qk_norm=True, layer_scale_init=1e-5)).train()
    model(_images(4)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_drop_path_and_dropout_do_nothing_in_evaluation() -> None:
    images = _images(3)
    with torch.no_grad():
        assert torch.equal(_model(drop_path=0.5, dropout=0.5)(images), _model()(images))


@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_a_new_model_predicts_the_prior_of_each_tag(pooling: typing.Any) -> None:
    torch.manual_seed(0)
    priors = torch.tensor([0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95])
    section = ModelSection(preset="vit_tiny", depth=2, pooling=pooling, pooling_grid=2)
    model = create_model(section, num_tags=7, image_size=32, tag_priors=priors).eval()
    with torch.no_grad():
        scores = torch.sigmoid(model(_images(64))).mean(0)
    assert ((scores / priors).log().abs() < 0.5).all()
    assert torch.allclose(torch.sigmoid(model.head.bias), priors, rtol=1e-5)


def test_priors_of_absent_and_universal_tags_stay_finite() -> None:
    model = create_model(_config(num_tags=2), tag_priors=torch.tensor([0.0, 1.0]))
    assert model.head.bias.tolist() == pytest.approx([math.log(1e-6 / (1 - 1e-6)), math.log(99)])


def test_zero_head_bias_ignores_priors() -> None:
    section = ModelSection(preset="vit_tiny", depth=1, head_bias="zero")
    model = create_model(section, num_tags=2, image_size=32, tag_priors=torch.tensor([0.1, 0.2]))
    assert model.head.bias.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("priors", [torch.tensor([0.1]), torch.tensor([0.1, 2.0]), torch.tensor([0.1, math.nan])])
def test_priors_that_are_not_shares_are_refused(priors: Tensor) -> None:
    with pytest.raises(ValueError, match="tag_priors"):
        create_model(_config(num_tags=2), tag_priors=priors)


def test_blocks_compile_in_place_without_graph_breaks_or_new_names() -> None:
    model, images = _model(drop_path=0.1, mask_padding=True), _images(2)
    names, valid_sizes = list(model.state_dict()), torch.tensor([[32, 20], [10, 32]])
    with torch.no_grad():
        wanted = model(images, valid_sizes)
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(model(images, valid_sizes), wanted)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("changes", [{}, {"register_tokens": 2}, {"stem": "conv"}, {"patch_dropout": 0.5}])
def test_an_image_without_content_gives_finite_numbers(changes: dict[str, typing.Any]) -> None:
    model = _model(mask_padding=True, **changes).train()
    logits = model(_images(3), torch.tensor([[0, 0], [32, 20], [0, 7]], dtype=torch.int32))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    "changes",
    [{"stem": "conv", "pooling": "class_token"}, {"positions": "rotary", "register_tokens": 2, "qk_norm": True}],
)
def test_model_exports_with_a_free_batch_size(changes: dict[str, typing.Any]) -> None:
    model = _model(**changes)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (_images(2),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(_images(5)), model(_images(5)))


# Padding


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_content_mask_marks_cells_that_hold_a_content_pixel(
    rows: int, columns: int, cell: int, data: typing.Any
) -> None:
    height, width = rows * cell, columns * cell
    size = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    pixels = np.zeros((height, width), dtype=bool)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    pixels[top : top + size[0], left : left + size[1]] = True
    wanted = pixels.reshape(rows, cell, columns, cell).any(axis=(1, 3))
    found = content_mask(torch.tensor([size], dtype=torch.int32), height, width, cell)
    assert np.array_equal(found[0].numpy(), wanted)


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_masked_padding_has_no_influence(stem: str, pooling: str) -> None:
    model = _model(stem=stem, pooling=pooling, mask_padding=True)
    valid_sizes = torch.tensor([[32, 13], [9, 32], [32, 32], [32, 1]], dtype=torch.int32)
    images = _images(4)
    padding = ~content_mask(valid_sizes, 32, 32)[:, None].expand_as(images)
    repainted = torch.where(padding, 255 - images, images)
    assert not torch.equal(images, repainted)
    with torch.no_grad():
        torch.testing.assert_close(model(images, valid_sizes), model(repainted, valid_sizes), rtol=0, atol=1e-5)
        seen = (model(images) - model(repainted)).abs().amax(1)
    assert (seen[[0, 1, 3]] > 1e-2).all(), "without sizes the padding is part of the picture"


@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_a_mask_over_nothing_changes_nothing(pooling: str) -> None:
    model = _model(pooling=pooling, mask_padding=True)
    with torch.no_grad():
        masked = model(_images(2), torch.tensor([[32, 32], [32, 32]]))
        torch.testing.assert_close(masked, model(_images(2)), rtol=1e-5, atol=1e-5)


def test_valid_sizes_are_not_looked_at_when_masking_is_off() -> None:
    model = _model()
    with torch.no_grad():
        assert torch.equal(model(_images(2), torch.tensor([[8, 8], [8, 8]])), model(_images(2)))


# Resolution and saving


@pytest.mark.parametrize("new_grid", [(14, 14), (3, 3), (9, 4), (7, 8)])
def test_position_embeddings_resize_like_torch_bicubic(new_grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    embedding = torch.randn(1, 7 * 7, 5, dtype=torch.float64)
    image = embedding.reshape(1, 7, 7, 5).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    found = resize_position_embedding(embedding, (7, 7), new_grid)
    torch.testing.assert_close(found, wanted.permute(0, 2, 3, 1).reshape(1, -1, 5))


def test_position_embeddings_of_the_same_grid_are_left_alone() -> None:
    embedding = torch.randn(1, 49, 5)
    assert resize_position_embedding(embedding, (7, 7), (7, 7)) is embedding


def test_other_image_sizes_follow_weights_that_change() -> None:
    model = _model()
    images = _images(2, 48, 16)
    with torch.inference_mode():
        before = model(images)
    with torch.no_grad():
        model.pos_embed.mul_(2.0)
    after = model(images)
    assert after.shape == (2, 7)
    assert (after - before).abs().max() > 1e-3
    after.sum().backward()
    assert model.pos_embed.grad is not None and model.pos_embed.grad.abs().sum() > 0


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_saved_model_gives_the_same_logits(stem: str) -> None:
    model = _model(stem=stem, pooling="class_token", qk_norm=True, layer_scale_init=0.1)
    again = create_model(VisionTransformerConfig.from_dict(model.config.to_dict())).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(_images(3)), model(_images(3)))


def test_weights_load_at_another_image_size() -> None:
    model = _model()
    larger = create_model(_config(image_size=48)).eval()
    saved = model.state_dict()
    larger.load_state_dict(saved, strict=True)
    assert saved["pos_embed"].shape[1] == 16, "the caller's weights stay as they were"
    with torch.no_grad():
        torch.testing.assert_close(larger(_images(2, 48, 48)), model(_images(2, 48, 48)))


def test_weights_of_another_width_are_still_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        create_model(_config(embed_dim=64)).load_state_dict(_model().state_dict())


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = _model()
    twin = copy.deepcopy(model)
    smaller = create_model(_config(image_size=16)).state_dict()
    before = model.pos_embed.detach().clone()
    twin.load_state_dict(smaller)
    assert torch.equal(model.pos_embed, before)
    assert not torch.equal(twin.pos_embed, before)


def test_state_dict_names_are_the_documented_ones() -> None:
    model = SimplifiedTagger(_config(depth=1, stem="conv", pooling="class_token", qk_norm=True, layer_scale_init=0.1))
    pairs = ["norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    norms = ["stem.norm"] + [f"stem.stages.{i}.norm{k}" for i in range(2) for k in (1, 2)]
    modules = [f"blocks.0.{name}" for name in pairs] + [*norms, "stem.proj", "norm", "head"]
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    expected |= {f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var", "num_batches_tracked")}
    expected |= {f"stem.stages.{i}.{name}.weight" for i in range(2) for name in ("conv1", "conv2", "skip")}
    expected |= {"stem.conv.weight", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    assert set(model.state_dict()) == expected | {"pos_embed", "cls_token"}
