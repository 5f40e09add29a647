"""The parts of a transformer block: attention, MLP, layer scale and stochastic depth.

Refuses nothing: the model has checked sizes before it builds them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tagger.rotary import Rotation, rotate

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention; `qk_norm` normalises queries and keys per head (ViT-22B), which bounds the logits."""

    def __init__(self, embed_dim: int, num_heads: int, *, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, key_mask: Tensor | None, rotation: Rotation | None = None) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        # Norms and turns give float32 under autocast; attention wants one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        out: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        return out


class Mlp(nn.Module):
    """Two linear maps with GELU between them."""

    def __init__(self, embed_dim: int, hidden_dim: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.drop1(F.gelu(self.fc1(tokens)))
        out: Tensor = self.drop2(self.fc2(hidden))
        return out


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (CaiT, Touvron et al. 2021)."""

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, branch: Tensor) -> Tensor:
        scaled: Tensor = branch * self.gamma
        return scaled


class StochasticDepth(nn.Module):
    """Which samples' residual branches count in training: drawn for all blocks at once, outside of them.

    A block that knew its own rate would be compiled by itself; so all blocks are one compiled graph. `rate` is that of
    the last block, and those before it fall linearly to 0 for the first.
    """

    keep: Tensor

    def __init__(self, rate: float, depth: int) -> None:
        super().__init__()
        self.rate = rate
        kept = 1.0 - torch.linspace(0.0, rate, depth)
        self.register_buffer("keep", kept.reshape(depth, 1, 1, 1, 1), persistent=False)

    def forward(self, tokens: Tensor) -> Sequence[Tensor | None]:
        """For each block the factors [2, B, 1, 1] of its two branches, of mean 1: 0 where the branch is dropped.

        None for every block where none is. `tokens` are [B, N, D].
        """
        depth = self.keep.shape[0]
        if not self.training or self.rate == 0.0:
            return [None] * depth
        drawn = torch.rand(depth, 2, tokens.shape[0], 1, 1, device=tokens.device)
        return ((drawn < self.keep) / self.keep).unbind()

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"
