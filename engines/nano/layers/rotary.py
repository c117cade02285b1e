"""Rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from engines.base import InputError
from engines.nano.utils.compile import compiled


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None) -> Tensor:
    """[head_dim / 2] float32. `scaling` of type llama3 stretches the slow waves (Llama 3.1 report, section 3.4.1)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = (scaling or {}).get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind != "llama3" or scaling is None:
        raise InputError(f"Rotary scaling of type {kind} is not known; default and llama3 are.")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast wave, left alone; 0: a slow one, stretched
    return keep * frequencies + (1 - keep) * frequencies / factor


class RotaryEmbedding(nn.Module):
    """Rotates the two halves of each head by its position's angles (the layout of GPT-NeoX).

    `cos_sin` [max_position, head_dim] float32 holds the cosines, then the sines. One table serves all layers.
    """

    cos_sin: Tensor

    def __init__(self, head_dim: int, max_position: int, theta: float, scaling: dict | None) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_position).float(), inverse_frequencies(head_dim, theta, scaling))
        self.register_buffer("cos_sin", torch.cat((angles.cos(), angles.sin()), -1), persistent=False)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """positions [tokens], q [tokens, heads, dim], k [tokens, kv_heads, dim]; new tensors of the same shapes."""
        return self.rotate(positions, q, k, self.cos_sin)

    @compiled
    def rotate(self, positions: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)

        def turn(x: Tensor) -> Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

        return turn(q), turn(k)
