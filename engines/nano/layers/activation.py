"""The gate of the feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from engines.nano.utils.compile import compiled


class SiluMul(nn.Module):
    """silu(gate) · up for x [rows, 2 · size], gate first."""

    @compiled
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up
