"""RMSNorm, gate and up projections and SiLU * mul, in one kernel: y = silu(n G^T) * (n U^T), n = gamma * s / rms(s).

    x            [rows, hidden]          float32, float16 or bfloat16; all tensors share its dtype
    norm_weight  [hidden]                gamma
    weight       [2 * inter, hidden]     G's rows, then U's
    residual     [rows, hidden]          optional; s = x + residual is then returned too, rounded to the dtype
    y            [rows, inter]

Each program computes matching columns of gate and up, so the product of the two is formed in its registers.

Fused: residual add, norm, both projections, SiLU, multiplication. Saved: the normalised rows' write and read
(2 * rows * hidden elements), the sum's second read, and the write and read of gate and up (4 * rows * inter elements).
The kernels are those of `rms_norm_linear`, with GATED on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels._fusion import Fusion
from kernels._triton import runs_triton
from kernels.rms_norm_linear import check, launch, rms_norm
from kernels.rms_norm_linear import saved_bytes as linear_saved_bytes


def reference(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch, computed in float32."""
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    gate, up = F.linear(rms_norm(stream, norm_weight, eps), weight.float()).chunk(2, dim=-1)
    y = (F.silu(gate) * up).to(x.dtype)
    return y if residual is None else (y, stream)


def rms_norm_gate_up_silu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """silu(gate) * up of the normalised s = x + residual; shapes as in this module's docstring.

    Returns y, or (y, s) when `residual` is given. No input is changed. ValueError if the arguments do not fit.
    """
    check(x, norm_weight, weight, None, residual)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must hold as many gate rows as up rows, but it has {weight.shape[0]} rows.")
    if not runs_triton(x):
        return reference(x, norm_weight, weight, eps, residual)
    return launch(x, norm_weight, weight, eps, None, residual, gated=True)


def saved_bytes(rows: int, hidden: int, inter: int, element_bytes: int, residual: bool = False) -> int:
    """What the norm's fusion saves, and the write and read of gate and up."""
    return linear_saved_bytes(rows, hidden, element_bytes, residual) + 4 * rows * inter * element_bytes


FUSION = Fusion(
    "rms_norm_gate_up_silu", ("post_norm+gate_up_proj+silu_mul",), rms_norm_gate_up_silu, reference, saved_bytes
)
