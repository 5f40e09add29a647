"""The parts of a transformer block: attention, MLP, layer scale and stochastic depth.

Refuses nothing: the model has checked sizes before it builds them.
"""

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


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the branch for whole samples and scales it up for the rest (same mean)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * (kept.to(branch.dtype) / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"
