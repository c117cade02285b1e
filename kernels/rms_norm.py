"""RMSNorm of rows: y = gamma * x / rms(x), rms(x) = sqrt(mean(x^2) + eps).

    x            [rows, hidden]   float32, float16 or bfloat16; all tensors share its dtype
    norm_weight  [hidden]         gamma
    y            [rows, hidden]

Computed in float32, rounded to the dtype before gamma and after, as transformers does. For products that cuBLAS makes:
fused with nothing, but read and written once, and able to start while the kernel before it ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._rows import empty_rows
from kernels._triton import power_of_two, runs_triton, tl, triton

FEW_ROWS = 1024
"""Up to here a program takes one row; above, one for each of its warps, so that more loads are under way."""


def reference(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """The same in plain PyTorch."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm_weight


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, norm_weight, y, rows, eps,
    HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows."""
    let_next_start(DEPENDENT)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    gamma = tl.load(norm_weight + k, mask=k < HIDDEN, other=0.0)[None, :]
    offset = row[:, None].to(tl.int64) * HIDDEN + k[None, :]
    mask = (row < rows)[:, None] & (k < HIDDEN)[None, :]
    wait_for_previous(DEPENDENT)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / HIDDEN + eps)
    normalised = (value * scale[:, None]).to(gamma.dtype).to(tl.float32)
    tl.store(y + offset, (normalised * gamma.to(tl.float32)).to(y.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float, dependent: bool = False) -> Tensor:
    """norm_weight * x / rms(x) for each row; ValueError if the arguments do not fit.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for.
    """
    check_float("x", x, 2)
    rows, hidden = x.shape
    check_like("norm_weight", norm_weight, (hidden,), x)
    if not runs_triton(x):
        return reference(x, norm_weight, eps)
    y = empty_rows(rows, hidden, x)
    if y.numel() > 0:
        block_k = power_of_two(hidden)
        # Sixteen bytes at a time and four such loads a thread, or up to 16 warps where a row is longer.
        warps = max(1, min(16, block_k // 1024))
        block_m = 1 if rows <= FEW_ROWS else max(1, 4 // warps)
        depends = dependent and can_depend(x.device)
        rms_norm_kernel[(-(-rows // block_m),)](
            x, norm_weight, y, rows, eps,
            HIDDEN=hidden, BLOCK_M=block_m, BLOCK_K=block_k, DEPENDENT=depends,
            num_warps=warps * block_m, **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return y
