"""RMSNorm and the linear layer after it, in one kernel: y = (gamma * s / rms(s)) W^T + bias, s = x + residual.

    x            [rows, hidden]   float32, float16 or bfloat16; all tensors share its dtype
    norm_weight  [hidden]         gamma
    weight       [out, hidden]    W, as torch.nn.Linear keeps it
    bias         [out]            optional
    residual     [rows, hidden]   optional; then s (rounded to the dtype) is returned too, as the new residual stream
    y            [rows, out]

rms(s) = sqrt(mean(s^2) + eps). Sums are kept in float32. The row's scale 1/rms commutes with the product, so it is
applied to the output, and gamma is multiplied into x on its way into the product.

Fused: residual add, norm, linear, bias. Saved: the normalised rows are never written nor read again
(2 * rows * hidden elements), and the sum s is not read a second time (rows * hidden elements).

Two kernels. Few rows (decode) are bound by reading W: each program owns a few rows of W, issues their loads first and
recomputes the row's rms, which is tiny. More rows go through a tiled product on tensor cores, up to 128 rows with
swapped operands (W x^T), so that the wide side of the instruction lies along W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import power_of_two, runs_triton, tl, triton
from kernels.silu_mul import silu_mul_values

VECTOR_ROWS = 4
"""Up to here each row is a matrix-vector product on the ordinary cores; above, tensor cores serve better."""
VECTOR_ELEMENTS = 4096
"""Elements of W per program of the matrix-vector kernel: 4 rows of 1024, all held in registers of 2 warps."""
VECTOR_HIDDEN = 8192
"""A longer row does not fit in one program's registers: the tiled kernel takes it, whatever the number of rows."""


@dataclass(frozen=True)
class Tile:
    """A tiled product's launch shape, used up to `max_rows` rows."""

    max_rows: int
    block_m: int
    block_n: int
    block_k: int
    swap: bool
    num_warps: int
    num_stages: int


MANY = 1 << 62
# Small row blocks keep enough programs to fill 132 multiprocessors; shared memory stays under sm_80's 163 KiB.
TILES = {
    2: (
        Tile(16, 16, 16, 256, True, 4, 4),
        Tile(32, 32, 32, 128, True, 4, 4),
        Tile(64, 64, 32, 128, True, 4, 3),
        Tile(128, 64, 64, 64, True, 4, 4),
        Tile(MANY, 128, 128, 64, False, 8, 3),
    ),
    # float32 in full precision runs on the ordinary cores: smaller tiles.
    4: (
        Tile(16, 16, 16, 128, True, 4, 3),
        Tile(64, 32, 32, 64, True, 4, 3),
        Tile(MANY, 64, 64, 32, False, 4, 3),
    ),
}


def reference(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain PyTorch, computed in float32."""
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    y = F.linear(rms_norm(stream, norm_weight, eps), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), stream)


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """gamma * x / rms(x) over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.float()


@triton.jit
def _load_stream(x, residual, offset, mask):
    """x, or x + residual rounded to the dtype, which is what the residual stream holds."""
    value = tl.load(x + offset, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + offset, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    return value


@triton.jit(do_not_specialize=["rows"])
def rms_norm_linear_vector_kernel(
    x, residual, norm_weight, weight, bias, y, new_residual, rows, out, eps,
    HIDDEN: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns for all rows (few), on the ordinary cores; `hidden` is one block."""
    program = tl.program_id(0)
    column = program * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = column < out
    k = tl.arange(0, BLOCK_K)
    in_hidden = k < HIDDEN
    w_mask = in_out[:, None] & in_hidden[None, :]
    # The weights come first: nothing before this kernel writes them, so their loads need not wait for x.
    w = tl.load(weight + column[:, None].to(tl.int64) * HIDDEN + k[None, :], mask=w_mask, other=0.0)
    if GATED:
        w_up = tl.load(weight + (column + out)[:, None].to(tl.int64) * HIDDEN + k[None, :], mask=w_mask, other=0.0)
    gamma = tl.load(norm_weight + k, mask=in_hidden, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        # A row beyond the last is as long as no row at all.
        stream = _load_stream(x, residual, row * HIDDEN + k, k < tl.where(row < rows, HIDDEN, 0))
        if residual is not None:
            owned = k < tl.where((row < rows) & (program == 0), HIDDEN, 0)
            tl.store(new_residual + row * HIDDEN + k, stream, mask=owned)
        value = stream.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
        value = (value * gamma)[None, :]
        result = tl.sum(w.to(tl.float32) * value, axis=1) * scale
        if GATED:
            result = silu_mul_values(result, tl.sum(w_up.to(tl.float32) * value, axis=1) * scale)
        if bias is not None:
            result += tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)
        tl.store(y + row * out + column, result.to(y.dtype.element_ty), mask=column < tl.where(row < rows, out, 0))


@triton.jit
def _accumulate(total, a, w, SWAP: tl.constexpr):
    if SWAP:
        total = dot(w, tl.trans(a), total)
    else:
        total = dot(a, tl.trans(w), total)
    return total


@triton.jit(do_not_specialize=["rows"])
def rms_norm_linear_tiled_kernel(
    x, residual, norm_weight, weight, bias, y, new_residual, rows, out, eps,
    HIDDEN: tl.constexpr, GATED: tl.constexpr, SCALE_FIRST: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns, on the tensor cores."""
    # Programs that run at the same time share rows and columns: GROUP_M row blocks go through the columns together.
    program = tl.program_id(0)
    column_blocks = tl.cdiv(out, BLOCK_N)
    first = program // (GROUP_M * column_blocks) * GROUP_M
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)
    inside = program % (GROUP_M * column_blocks)
    column_block = inside // height

    row = (first + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.arange(0, BLOCK_K)
    in_rows = row < rows
    owned = row < tl.where(column_block == 0, rows, 0)  # the new residual is written once
    in_out = column < out
    x_offset = row[:, None].to(tl.int64) * HIDDEN
    w_offset = column[:, None].to(tl.int64) * HIDDEN
    w_up_offset = (column + out)[:, None].to(tl.int64) * HIDDEN

    square = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.zeros([BLOCK_M], tl.float32)
    if SCALE_FIRST:
        for start in range(0, HIDDEN, BLOCK_K):
            k = start + k0
            mask = in_rows[:, None] & (k < HIDDEN)[None, :]
            value = _load_stream(x, residual, x_offset + k[None, :], mask).to(tl.float32)
            square += tl.sum(value * value, axis=1)
        scale = tl.rsqrt(square / HIDDEN + eps)

    total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    total_up = total
    for start in range(0, HIDDEN, BLOCK_K):
        k = start + k0
        in_hidden = k < HIDDEN
        mask = in_rows[:, None] & in_hidden[None, :]
        w_mask = in_out[:, None] & in_hidden[None, :]
        w = tl.load(weight + w_offset + k[None, :], mask=w_mask, other=0.0)
        stream = _load_stream(x, residual, x_offset + k[None, :], mask)
        if residual is not None:
            tl.store(new_residual + x_offset + k[None, :], stream, mask=owned[:, None] & in_hidden[None, :])
        value = stream.to(tl.float32)
        if SCALE_FIRST:
            value = value * scale[:, None]
        else:
            square += tl.sum(value * value, axis=1)
        gamma = tl.load(norm_weight + k, mask=in_hidden, other=0.0).to(tl.float32)
        a = (value * gamma[None, :]).to(w.dtype)
        total = _accumulate(total, a, w, SWAP)
        if GATED:
            w_up = tl.load(weight + w_up_offset + k[None, :], mask=w_mask, other=0.0)
            total_up = _accumulate(total_up, a, w_up, SWAP)

    result = tl.trans(total) if SWAP else total
    result_up = tl.trans(total_up) if SWAP else total_up
    if not SCALE_FIRST:
        scale = tl.rsqrt(square / HIDDEN + eps)
        result = result * scale[:, None]
        result_up = result_up * scale[:, None]
    if GATED:
        result = silu_mul_values(result, result_up)
    if bias is not None:
        result += tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    offset = row[:, None].to(tl.int64) * out + column[None, :]
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=in_rows[:, None] & in_out[None, :])


def launch(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the kernel that suits the shape; arguments are checked already. `gated` halves the output columns."""
    rows, hidden = x.shape
    out = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty((rows, out), dtype=x.dtype, device=x.device)
    new_residual = None if residual is None else torch.empty_like(residual)
    if rows > 0 and out > 0:
        tensors = (x, residual, norm_weight, weight, bias, y, new_residual)
        block_k = max(16, power_of_two(hidden))
        if rows <= VECTOR_ROWS and block_k <= VECTOR_HIDDEN:
            block_n = max(1, VECTOR_ELEMENTS // block_k // (2 if gated else 1))
            block_n = min(16, block_n)
            rms_norm_linear_vector_kernel[((out + block_n - 1) // block_n,)](
                *tensors, rows, out, eps,
                HIDDEN=hidden, GATED=gated, ROWS=power_of_two(rows), BLOCK_N=block_n, BLOCK_K=block_k,
                num_warps=2 if block_k <= VECTOR_ELEMENTS and x.element_size() == 2 else 4,
            )  # fmt: skip
        else:
            tile = next(tile for tile in TILES[x.element_size()] if rows <= tile.max_rows)
            block_n = tile.block_n // 2 if gated and tile.block_n > 16 else tile.block_n
            programs = -(-rows // tile.block_m) * -(-out // block_n)
            rms_norm_linear_tiled_kernel[(programs,)](
                *tensors, rows, out, eps,
                HIDDEN=hidden, GATED=gated,
                # In float16 gamma * s may overflow before 1/rms brings it back, so the scale goes in first.
                SCALE_FIRST=x.dtype == torch.float16,
                SWAP=tile.swap, BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k, GROUP_M=8,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    return y if new_residual is None else (y, new_residual)


def check(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes, devices and layouts fit together."""
    check_float("x", x, 2)
    hidden = x.shape[1]
    if hidden == 0:
        raise ValueError("x must have at least one column.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    check_like("norm_weight", norm_weight, (hidden,), x)
    check_like("weight", weight, (weight.shape[0], hidden), x)
    if bias is not None:
        check_like("bias", bias, (weight.shape[0],), x)
    if residual is not None:
        check_like("residual", residual, (x.shape[0], hidden), x)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (norm_weight * s / rms(s)) weight^T + bias with s = x + residual; shapes as in this module's docstring.

    Returns y, or (y, s) when `residual` is given. No input is changed. ValueError if the arguments do not fit.
    """
    check(x, norm_weight, weight, bias, residual)
    if not runs_triton(x):
        return reference(x, norm_weight, weight, eps, bias, residual)
    return launch(x, norm_weight, weight, eps, bias, residual, gated=False)


def saved_bytes(rows: int, hidden: int, element_bytes: int, residual: bool = False) -> int:
    """The normalised rows' write and read, and with a residual the second read of the sum."""
    return (3 if residual else 2) * rows * hidden * element_bytes


FUSION = Fusion(
    "rms_norm_linear", ("input_norm+qkv_proj", "final_norm+lm_head"), rms_norm_linear, reference, saved_bytes
)
