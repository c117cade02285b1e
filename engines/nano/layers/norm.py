"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.nano.utils.compile import compiled


class RMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps) over the last dimension, computed in float32.

    With a residual, x + residual is normalised and also returned as the new residual.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.normalise(x) if residual is None else self.add_and_normalise(x, residual)

    @compiled
    def normalise(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    @compiled
    def add_and_normalise(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        # Normalised from the rounded sum, as every reference does: the next layer sees no other.
        total = x + residual
        return rms_norm(total, self.weight, self.eps), total


class HeadNorm(nn.Module):
    """Qwen3's norm of each query and key head: q [tokens, heads, dim], k [tokens, kv_heads, dim]."""

    def __init__(self, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
        super().__init__()
        self._norms = (q_norm, k_norm)  # a tuple, so that the parameters keep the names they have in the checkpoint

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self._norms
        return self.normalise(q, k, q_norm.weight, k_norm.weight, q_norm.eps)

    @compiled
    def normalise(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised in float32, rounded to x's dtype before the weight, as transformers does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
