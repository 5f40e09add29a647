"""Bytes to tokens with the normalisation folded into the weights, and which tokens training leaves out."""

import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model_architecture import SimplifiedTagger, VisionTransformerConfig
from tagger.tokens import PatchStem, content_mask, draw_kept_tokens

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def _model(**changes: typing.Any) -> SimplifiedTagger:
    torch.manual_seed(0)
    base = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
    return SimplifiedTagger(VisionTransformerConfig(**{**base, "num_tags": 5, "mean": MEAN, "std": STD, **changes}))


def _images(batch: int, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + height + width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def _textbook(stem: PatchStem, images: Tensor, normalise: typing.Callable[[Tensor], Tensor]) -> Tensor:
    side = stem.patch_size
    kernel = stem.proj.weight.reshape(-1, 3, side, side)
    return F.conv2d(normalise(images), kernel, stem.proj.bias, stride=side).flatten(2).transpose(1, 2)


# Folded normalisation


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_bytes_give_the_tokens_of_normalised_pixels(dtype: torch.dtype, tolerance: float) -> None:
    # The scale and shift of a byte are float32 buffers, which bounds what float64 can show.
    model = _model().to(dtype)
    images = _images(3, 32, 48)
    found = model.stem(images, (model.pixel_scale, model.pixel_shift))
    wanted = _textbook(typing.cast(PatchStem, model.stem), images, model.normalise)
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.detach().abs().max()))


def test_bytes_give_the_gradients_of_normalised_pixels() -> None:
    model, images = _model().double(), _images(3)
    stem = typing.cast(PatchStem, model.stem)
    slope = torch.randn(3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = list(stem.parameters())
    found = torch.autograd.grad(stem(images, (model.pixel_scale, model.pixel_shift)), parameters, slope)
    wanted = torch.autograd.grad(_textbook(stem, images, model.normalise), parameters, slope)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_sixteen_bit_products_of_bytes_are_as_exact_as_those_of_rounded_pixels() -> None:
    torch.manual_seed(0)
    # Light backgrounds are the hard case: what the weights' rounding adds is multiplied by a large common value.
    stem = PatchStem(16, 64)
    images = (255 - _images(64, 32, 32) // 8).contiguous()
    for mean, std in (((0.5,) * 3, (0.5,) * 3), (MEAN, STD)):
        model = _model(mean=mean, std=std)
        fold = (model.pixel_scale, model.pixel_shift)
        exact = stem(images, fold).detach().double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            folded, unfolded = stem(images, fold), stem(model.normalise(images))
        assert folded.dtype == torch.bfloat16
        errors = [float((tokens.detach().double() - exact).square().mean().sqrt()) for tokens in (folded, unfolded)]
        assert errors[0] < 1.1 * errors[1]


def test_no_image_in_float32_is_made_from_bytes_under_autocast() -> None:
    model, images = _model(), _images(8)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        model.stem(images, (model.pixel_scale, model.pixel_shift))
    pictures = {tensor.dtype for tensor in saved if tensor.numel() >= images.numel()}
    assert pictures == {torch.bfloat16}, "the operand of the product, and nothing wider"


@pytest.mark.slow
def test_the_masked_forward_exports() -> None:
    model = _model(depth=1, mask_padding=True, patch_dropout=0.5).eval()
    arguments = (_images(2), torch.tensor([[32, 20], [10, 32]]))
    exported = torch.export.export(model, arguments).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(*arguments), model(*arguments))


# Patch dropout


def test_every_image_keeps_the_same_number_of_different_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.zeros(50, 12, 3)
    kept = draw_kept_tokens(tokens, 0.6, None)
    assert kept.shape == (50, 5)
    assert all(len(set(row)) == 5 for row in kept.tolist())
    assert draw_kept_tokens(tokens, 0.999, None).shape == (50, 1)


def test_all_tokens_are_kept_equally_often() -> None:
    torch.manual_seed(0)
    counts = np.bincount(draw_kept_tokens(torch.zeros(20_000, 8, 1), 0.25, None).flatten().numpy(), minlength=8)
    assert np.abs(counts / 20_000 - 0.75).max() < 0.02  # standard error 0.003


def test_padding_is_left_out_before_content() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, :3] = mask[1, :12] = mask[2] = True
    kept = draw_kept_tokens(torch.zeros(3, 16, 1), 0.5, mask)
    assert set(range(3)) <= set(kept[0].tolist())
    assert mask.gather(1, kept)[1:].all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("pooling", ["mean", "class_token", "grid"])
def test_a_model_sees_the_kept_patches_at_their_own_places(
    positions: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(positions=positions, pooling=pooling, register_tokens=2, mask_padding=True).train()
    kept = torch.tensor([[0, 3, 12, 15], [6, 5, 10, 9]])
    model.patch_dropout = 0.75
    monkeypatch.setattr("model_architecture.draw_kept_tokens", lambda *_: kept)
    images = _images(2)
    with torch.no_grad():
        found = model.forward_features(images)
        # The same through the other way to leave tokens out: attention and pooling that may not look at them.
        model.patch_dropout = 0.0
        monkeypatch.setattr(
            "model_architecture.content_mask",
            lambda sizes, height, width, cell=1: (
                torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True).reshape(2, 4, 4)
                if cell > 1
                else content_mask(sizes, height, width)
            ),
        )
        wanted = model.forward_features(images, torch.tensor([[32, 32], [32, 32]]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_patch_dropout_acts_in_training_alone_and_follows_the_seed() -> None:
    model, images = _model(patch_dropout=0.5), _images(4)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), _model().eval()(images))
        model.train()
        torch.manual_seed(7)
        first = model(images)
        assert not torch.equal(model(images), first)
        torch.manual_seed(7)
        assert torch.equal(model(images), first)
    assert "patch_dropout" not in model.state_dict()


def test_images_that_are_mostly_padding_stay_finite_under_patch_dropout() -> None:
    model = _model(patch_dropout=0.9, mask_padding=True, pooling="mean").train()
    logits = model(_images(64), torch.full((64, 2), 1))
    assert torch.isfinite(logits).all()


def test_blocks_see_fewer_tokens() -> None:
    model = _model(patch_dropout=0.75, register_tokens=1).train()
    lengths: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: lengths.append(inputs[0].shape[1]))
    model(_images(2))
    model.patch_dropout = 0.0
    model(_images(2))
    assert lengths == [1 + 4, 1 + 16]
