"""The network: a Vision Transformer that turns uint8 images into one logit per tag.

`VisionTransformerConfig` is the set of dimensions resolved from the `model` section of the configuration and saved with
the model. Refuses images that are not uint8 (normalisation happens inside) and sizes that the patches do not divide.

State-dict names (stable; `N` is the block):
    stem.proj.{weight,bias}   patches -> tokens; weight [D, 3 * P * P] in (channel, row, column) order
    stem.{conv,norm,proj}.*, stem.stages.I.{conv1,norm1,conv2,norm2,skip}.*   conv stem (batch norms)
    pos_embed [1, rows * columns, D] (learned positions only), cls_token [1, 1, D] (class-token pooling only)
    register_tokens [1, R, D] (where there are any)
    blocks.N.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}.{weight,bias}
    blocks.N.{attn.q_norm,attn.k_norm}.{weight,bias} (qk_norm), blocks.N.{ls1,ls2}.gamma (layer_scale_init)
    norm.{weight,bias}, head.weight [C, F], head.bias [C] (F: D, with grid pooling D * cells)
With several members (`model.num_members`) each name is behind `members.I.`, I from 0.
"""

import dataclasses
import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from Configuration_System import ModelSection
from tagger.attention import AttentionShape, pinned_attention
from tagger.config_io import ConfigError
from tagger.devices import product_dtype, without_autocast
from tagger.dimensions import Rgb, check_choice, check_multiple, check_rgb, is_number, setting_of
from tagger.ensemble import Ensemble
from tagger.layers import NORM_EPS, Attention, LayerScale, Mlp, StochasticDepth
from tagger.pooling import GridPooling, mean_pooling
from tagger.registry import Registry
from tagger.rotary import RotaryTable, Rotation, rotation_of
from tagger.tokens import (
    ConvStem,
    PatchStem,
    PositionResizer,
    content_mask,
    draw_kept_tokens,
    resize_position_embedding,
)

_LOGGER = logging.getLogger(__name__)

DEFAULT_MEAN: Rgb = (0.5, 0.5, 0.5)
DEFAULT_STD: Rgb = (0.5, 0.5, 0.5)
# A tag on no image, or on all, must not start at an infinite logit.
_PRIOR_RANGE = (1e-6, 0.99)


@dataclass(frozen=True)
class Preset:
    """Width, depth and heads of a published model (ViT: Dosovitskiy et al. 2021; tiny and small: DeiT)."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    mlp_ratio: float = 4.0


PRESET_DIMENSIONS: dict[str, Preset] = {
    "vit_tiny": Preset(192, 12, 3),
    "vit_small": Preset(384, 12, 6),
    "vit_base": Preset(768, 12, 12),
    "vit_large": Preset(1024, 24, 16),
}


@dataclass(frozen=True)
class VisionTransformerConfig:
    """Every dimension of a model; `mean` and `std` are per RGB channel, of pixels scaled to 0..1."""

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_tags: int
    stem: Literal["patch", "conv"] = "patch"
    pooling: Literal["mean", "class_token", "grid"] = "mean"
    pooling_grid: int = 3
    qk_norm: bool = False
    layer_scale_init: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0
    head_dropout: float = 0.0
    patch_dropout: float = 0.0
    mask_padding: bool = False
    positions: Literal["learned", "rotary"] = "learned"
    register_tokens: int = 0
    num_members: int = 1
    mean: Rgb = DEFAULT_MEAN
    std: Rgb = DEFAULT_STD

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "patch_size",
            "embed_dim",
            "depth",
            "num_heads",
            "num_tags",
            "register_tokens",
            "pooling_grid",
            "num_members",
        ):
            value: object = getattr(self, name)
            least = 0 if name == "register_tokens" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{setting_of(name)}={value!r} is not a whole number, {least} or more")
        check_choice("stem", self.stem, ("patch", "conv"))
        check_choice("pooling", self.pooling, ("mean", "class_token", "grid"))
        check_choice("positions", self.positions, ("learned", "rotary"))
        for name in ("qk_norm", "mask_padding"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{setting_of(name)}={getattr(self, name)!r} is not true or false; use one")
        for name in ("drop_path", "dropout", "head_dropout", "patch_dropout"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise ConfigError(f"{setting_of(name)}={getattr(self, name)!r} is not in 0 <= x < 1; 0 turns it off")
        if not (is_number(self.mlp_ratio) and int(self.embed_dim * self.mlp_ratio) >= 1):
            raise ConfigError(f"model.mlp_ratio={self.mlp_ratio!r} leaves the MLP no hidden unit; 4.0 is usual")
        if not (self.layer_scale_init is None or (is_number(self.layer_scale_init) and self.layer_scale_init > 0)):
            raise ConfigError(
                f"model.layer_scale_init={self.layer_scale_init!r} is not above 0; null turns it off, 1e-5 is usual"
            )
        check_multiple("data.image_size", self.image_size, "model.patch_size", self.patch_size)
        check_multiple("model.embed_dim", self.embed_dim, "model.num_heads", self.num_heads)
        if self.pooling == "grid" and self.pooling_grid > self.grid_size:
            raise ConfigError(
                f"model.pooling_grid={self.pooling_grid} is above the tokens a side; use {self.grid_size}"
            )
        if self.positions == "rotary":
            check_multiple("model.embed_dim", self.embed_dim, "4 x model.num_heads", 4 * self.num_heads)
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ConfigError(
                f"model.patch_size={self.patch_size} is not a power of two, which model.stem=conv (it halves the image "
                "step by step) needs; use 8 or 16"
            )
        for name in ("mean", "std"):
            object.__setattr__(self, name, check_rgb(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise ConfigError(f"std={list(self.std)} holds a number that is not above 0; 0.5 for each channel is usual")

    @property
    def grid_size(self) -> int:
        """Tokens along a side at `image_size`."""
        return self.image_size // self.patch_size

    @property
    def num_features(self) -> int:
        """Numbers an image is pooled into, which the head reads."""
        return self.embed_dim * (self.pooling_grid**2 if self.pooling == "grid" else 1)

    def to_dict(self) -> dict[str, object]:
        """The config as what JSON can hold; `from_dict` gives an equal one back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "VisionTransformerConfig":
        """The config that `to_dict` wrote; ConfigError for a key that is unknown (with the nearest) or missing."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean '{close[0]}'?" if close else "the model was written by another version"
                raise ConfigError(f"model config: unknown key '{key}'; {hint}")
        missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
        if missing:
            raise ConfigError(f"model config: {', '.join(missing)} missing; take the file that training wrote")
        # __post_init__ checks every value, so what the file holds need not be trusted here.
        return cls(**cast(Any, values))


def resolve_model_config(
    section: ModelSection,
    *,
    num_tags: int,
    image_size: int,
    mean: Rgb = DEFAULT_MEAN,
    std: Rgb = DEFAULT_STD,
) -> VisionTransformerConfig:
    """The dimensions that a `model` section means: its preset, with what the section sets itself on top."""
    preset = dataclasses.asdict(PRESET_DIMENSIONS[section.preset])
    values: dict[str, Any] = {"num_tags": num_tags, "image_size": image_size, "mean": mean, "std": std}
    for field in dataclasses.fields(VisionTransformerConfig):
        if field.name not in values:
            own = getattr(section, field.name)
            values[field.name] = preset.get(field.name) if own is None else own
    return VisionTransformerConfig(**values)


class TransformerBlock(nn.Module):
    """One pre-norm block: attention, then MLP, each on a residual branch.

    Compiles on its own (`block.compile(fullgraph=True)`), which leaves state-dict names as they are.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: bool = False,
        layer_scale_init: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = Attention(embed_dim, num_heads, qk_norm=qk_norm, dropout=dropout)
        self.ls1 = nn.Identity() if layer_scale_init is None else LayerScale(embed_dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), dropout=dropout)
        self.ls2 = nn.Identity() if layer_scale_init is None else LayerScale(embed_dim, layer_scale_init)

    def forward(
        self,
        tokens: Tensor,
        key_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        branch_factors: Tensor | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; `key_mask` bool [B, 1, 1, N], True where a token may be attended to.

        `rotation` turns queries and keys by their tokens' positions (`tagger.rotary`); `branch_factors` [2, B, 1, 1]
        multiply what attention and MLP add (`StochasticDepth`).
        """
        attended = self.ls1(self.attn(self.norm1(tokens), key_mask, rotation))
        if branch_factors is not None:
            attended = attended * branch_factors[0].to(attended.dtype)
        tokens = tokens + attended
        mapped: Tensor = self.ls2(self.mlp(self.norm2(tokens)))
        if branch_factors is not None:
            mapped = mapped * branch_factors[1].to(mapped.dtype)
        return tokens + mapped


class SimplifiedTagger(nn.Module):
    """Vision Transformer: uint8 images [B, 3, H, W] -> logits [B, C]. One network.

    H and W may be any multiples of `config.patch_size`; positions are interpolated to grids other than the one of
    `config.image_size`. Weights saved at another image size load: the embeddings are resized on the way in.
    In training, `patch_dropout` (a share of the patch tokens, 0 <= x < 1) may be set anew between steps.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        if config.num_members != 1:
            raise ValueError(f"num_members={config.num_members} for one network; use create_model")
        self.config = config
        self.patch_dropout = config.patch_dropout
        # (x / 255 - mean) / std as one multiply-add; no state, since the config holds mean and std.
        std = torch.tensor(config.std).reshape(3, 1, 1)
        self.register_buffer("pixel_scale", 1.0 / (255.0 * std), persistent=False)
        self.register_buffer("pixel_shift", -torch.tensor(config.mean).reshape(3, 1, 1) / std, persistent=False)

        stem = ConvStem if config.stem == "conv" else PatchStem
        self.stem = stem(config.patch_size, config.embed_dim)
        learned = config.positions == "learned"
        self.pos_embed = self._extra_tokens(config.grid_size**2 if learned else 0)
        self.cls_token = self._extra_tokens(1 if config.pooling == "class_token" else 0)
        self.register_tokens = self._extra_tokens(config.register_tokens)
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                qk_norm=config.qk_norm,
                layer_scale_init=config.layer_scale_init,
                dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.drop_path = StochasticDepth(config.drop_path, config.depth)
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self._pool_cells = GridPooling(config.pooling_grid) if config.pooling == "grid" else None
        self.head_drop = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.num_features, config.num_tags)
        self._num_prefix_tokens = config.register_tokens + (self.cls_token is not None)
        self._resize_positions = PositionResizer((config.grid_size, config.grid_size))
        head_dim = config.embed_dim // config.num_heads
        self._rotary = None if learned else RotaryTable(head_dim, self._num_prefix_tokens)
        self._init_weights()
        self.register_load_state_dict_pre_hook(_fit_position_embedding)  # type: ignore[no-untyped-call]

    def _extra_tokens(self, count: int) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(1, count, self.config.embed_dim)) if count else None

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for extra in (self.pos_embed, self.cls_token, self.register_tokens):
            if extra is not None:
                nn.init.trunc_normal_(extra, std=0.02)

    @torch.no_grad()
    def set_head_bias(self, tag_priors: Tensor) -> None:
        """Start every tag at its prior: bias = logit(share of images that carry it), so that training need not find it.

        `tag_priors` [C], 0..1, clipped to 1e-6..0.99.
        """
        if tag_priors.shape != self.head.bias.shape:
            expected = list(self.head.bias.shape)
            raise ValueError(
                f"tag_priors has shape {list(tag_priors.shape)}; expected {expected}, one share for each tag"
            )
        if not bool(((tag_priors >= 0) & (tag_priors <= 1)).all()):
            raise ValueError("tag_priors holds a value outside 0..1; pass count / number of images for each tag")
        logits = torch.logit(tag_priors.cpu().to(torch.float64).clamp(*_PRIOR_RANGE))
        self.head.bias.copy_(logits.to(self.head.bias.dtype))

    def forward(self, images: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Logits [B, C] of uint8 images [B, 3, H, W], 0..255 RGB; in evaluation float32, also under autocast.

        `valid_sizes` [B, 2], the (h, w) in pixels of the content centred in each image, is used when
        `config.mask_padding` is on: what lies outside then has no influence.
        """
        features = self.forward_features(images, valid_sizes)
        if self.training or product_dtype(features) == features.dtype:
            return cast(Tensor, self.head(features))
        with without_autocast(features):  # the 8 bits of bfloat16 would make images tie
            return cast(Tensor, self.head(features.to(self.head.weight.dtype)))

    def forward_features(self, images: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Pooled features [B, F] of uint8 images; `head` turns them into logits. Arguments as for `forward`."""
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images are {str(images.dtype).removeprefix('torch.')}; expected uint8, 0..255 (the model normalises "
                "them itself)"
            )
        masked = self.config.mask_padding and valid_sizes is not None  # a mask acts on normalised pixels
        if masked or isinstance(self.stem, ConvStem):
            return self.encode(self.normalise(images), valid_sizes)
        grid = self._grid(images)
        return self._mix(self.stem(images, (self.pixel_scale, self.pixel_shift)), grid, None)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels 0..255 of any dtype -> what `encode` takes. For exports whose input is float; else use `forward`."""
        self._grid(images)
        return images.to(self.pixel_scale.dtype) * self.pixel_scale + self.pixel_shift

    def encode(self, pixels: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Pooled features [B, F] of pixels [B, 3, H, W] from `normalise`."""
        grid = self._grid(pixels)
        token_mask = None
        if valid_sizes is not None and self.config.mask_padding:
            height, width = pixels.shape[2], pixels.shape[3]
            # Zero is the mean colour. Without this the edge tokens, half content and half padding, would see it.
            pixels = pixels * content_mask(valid_sizes, height, width)[:, None].to(pixels.dtype)
            token_mask = content_mask(valid_sizes, height, width, self.config.patch_size).flatten(1)
        return self._mix(self.stem(pixels), grid, token_mask)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"images have shape {list(images.shape)}; expected [B, 3, H, W] with H and W multiples of "
                f"model.patch_size={side}"
            )
        return images.shape[2] // side, images.shape[3] // side

    def _mix(self, tokens: Tensor, grid: tuple[int, int], token_mask: Tensor | None) -> Tensor:
        """Positions, extra tokens, blocks and pooling: patch tokens [B, rows * columns, D] -> features [B, F]."""
        # The residual stream keeps the weights' dtype, whatever the stem gave under autocast.
        tokens = tokens.to(self.pixel_scale.dtype)
        if self.pos_embed is not None:
            tokens = tokens + self._resize_positions(self.pos_embed, grid)
        rotation = None if self._rotary is None else self._rotary(grid, self.pixel_scale)
        kept = None
        if self.training and self.patch_dropout > 0:
            kept = draw_kept_tokens(tokens, self.patch_dropout, token_mask)
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
            token_mask = None if token_mask is None else token_mask.gather(1, kept)
            rotation = None if rotation is None else rotation_of(rotation, kept, self._num_prefix_tokens)
        prefix = [t.expand(tokens.shape[0], -1, -1) for t in (self.cls_token, self.register_tokens) if t is not None]
        tokens = self.pos_drop(torch.cat([*prefix, tokens], dim=1) if prefix else tokens)
        key_mask = None
        if token_mask is not None:
            key_mask = F.pad(token_mask, (self._num_prefix_tokens, 0), value=True)[:, None, None, :]
        with pinned_attention(self._attention_shape(tokens, key_mask), tokens.device):
            for block, factors in zip(self.blocks, self.drop_path(tokens), strict=True):
                tokens = block(tokens, key_mask, rotation, factors)
        tokens = self.norm(tokens)
        if self.cls_token is not None:
            pooled = tokens[:, 0]
        elif self._pool_cells is not None:
            pooled = self._pool_cells(tokens[:, self._num_prefix_tokens :], grid, token_mask, kept)
        else:
            pooled = mean_pooling(tokens[:, self._num_prefix_tokens :], token_mask)
        return cast(Tensor, self.head_drop(pooled))

    def _attention_shape(self, tokens: Tensor, key_mask: Tensor | None) -> AttentionShape:
        return AttentionShape(
            heads=self.config.num_heads,
            head_dim=self.config.embed_dim // self.config.num_heads,
            tokens=tokens.shape[1],
            dtype=product_dtype(tokens),
            masked=key_mask is not None,
            trains=torch.is_grad_enabled(),
        )

    def num_parameters(self) -> int:
        """How many numbers training moves."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def _fit_position_embedding(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Load hook: position embeddings of another image size are resized to this model's."""
    assert isinstance(module, SimplifiedTagger)
    saved, own_embed = state_dict.get(f"{prefix}pos_embed"), module.pos_embed
    if saved is None or own_embed is None or saved.shape == own_embed.shape or saved.shape[-1] != own_embed.shape[-1]:
        return  # nothing to do, or a mismatch for load_state_dict to report
    side, own = math.isqrt(saved.shape[1]), module.config.grid_size
    if side * side != saved.shape[1]:
        return
    _LOGGER.info("position embeddings resized from %dx%d to %dx%d tokens", side, side, own, own)
    state_dict[f"{prefix}pos_embed"] = resize_position_embedding(saved, (side, side), (own, own))


class TaggerEnsemble(Ensemble):
    """`config.num_members` taggers of the same dimensions as one model."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        alone = dataclasses.replace(config, num_members=1)
        super().__init__([SimplifiedTagger(alone) for _ in range(config.num_members)])
        self.config = config


TaggerModel = SimplifiedTagger | TaggerEnsemble


class ModelBuilder(Protocol):
    """What is registered under a model name: makes the network from its section and what the data decides."""

    def __call__(
        self, section: ModelSection, *, num_tags: int, image_size: int, mean: Rgb, std: Rgb
    ) -> TaggerModel: ...


MODELS: Registry[ModelBuilder] = Registry("model")


@MODELS.register("vit")
def _build_vit(section: ModelSection, *, num_tags: int, image_size: int, mean: Rgb, std: Rgb) -> TaggerModel:
    return _tagger_of(resolve_model_config(section, num_tags=num_tags, image_size=image_size, mean=mean, std=std))


def _tagger_of(config: VisionTransformerConfig) -> TaggerModel:
    return SimplifiedTagger(config) if config.num_members == 1 else TaggerEnsemble(config)


def create_model(
    section: ModelSection | VisionTransformerConfig,
    num_tags: int | None = None,
    image_size: int | None = None,
    *,
    mean: Rgb = DEFAULT_MEAN,
    std: Rgb = DEFAULT_STD,
    tag_priors: Tensor | None = None,
) -> TaggerModel:
    """A new model from a `model` section (with `num_tags` and `image_size`), or from a saved config alone.

    `mean` and `std` are per channel, of pixels scaled to 0..1. `tag_priors` [C], the share of images that carry a tag,
    sets the head's bias (see `set_head_bias`) unless the section says `head_bias: zero`.
    """
    if isinstance(section, VisionTransformerConfig):
        if num_tags is not None or image_size is not None:
            raise ValueError(
                "num_tags and image_size were passed beside a VisionTransformerConfig, which holds them; leave them out"
            )
        model = _tagger_of(section)
    else:
        if num_tags is None or image_size is None:
            raise ValueError("a model section alone does not fix the network; pass num_tags and image_size too")
        builder = MODELS.get(section.name)
        model = builder(section, num_tags=num_tags, image_size=image_size, mean=mean, std=std)
        if section.head_bias == "zero":
            return model
    if tag_priors is not None:
        model.set_head_bias(tag_priors)
    return model
