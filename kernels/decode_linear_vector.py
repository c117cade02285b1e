"""The vector kernel of `decode_linear`: W's rows in registers before the wait, for a row of x or a few.

What is left after the wait is the load of x and a short sum, on ordinary cores. Arguments are `decode_linear`'s.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels._dependent import let_next_start, wait_for_previous
from kernels._triton import power_of_two, tl, triton
from kernels.decode_linear_launch import Launch
from kernels.silu_mul import silu_mul_values


@triton.jit
def _load_rows(rows, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """Whole rows of K elements from a column of pointers, as a tuple of tiles of BLOCK_K; each is read only once."""
    k = tl.arange(0, BLOCK_K)
    tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if start + BLOCK_K <= K:
            tile = tl.load(rows + (start + k)[None, :], eviction_policy="evict_first")
        else:
            tile = tl.load(rows + (start + k)[None, :], mask=(start + k < K)[None, :], other=0.0,
                           eviction_policy="evict_first")  # fmt: skip
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking here
    return tiles


@triton.jit
def _load_vector(vector, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """K elements as a tuple of blocks of BLOCK_K, zeros after the last."""
    k = tl.arange(0, BLOCK_K)
    blocks = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if start + BLOCK_K <= K:
            block = tl.load(vector + start + k)
        else:
            block = tl.load(vector + start + k, mask=start + k < K, other=0.0)
        blocks = blocks + (block,)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@triton.jit(do_not_specialize=["rows"])
def decode_linear_vector_kernel(
    x, norm_weight, weight, bias, y, rows, out, eps,
    K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y for all rows, one row after the other."""
    let_next_start(DEPENDENT)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The last program's surplus rows read the last one again: cheaper than a mask on every load.
    w_column = tl.minimum(column, out - 1).to(tl.int64)
    w = _load_rows(weight + w_column[:, None] * K, BLOCK_K, K)
    if GATED:
        w_up = _load_rows(weight + (w_column + out)[:, None] * K, BLOCK_K, K)
    if norm_weight is not None:
        gamma = _load_vector(norm_weight, BLOCK_K, K)
    wait_for_previous(DEPENDENT)
    for r in tl.static_range(ROWS):
        # ROWS is the next power of two: surplus rows read the last row and are not stored.
        row = tl.minimum(r, rows - 1).to(tl.int64)
        offset = row * out + column
        stored = (column < out) & (r < rows)
        tiles = _load_vector(x + row * K, BLOCK_K, K)
        if RESIDUAL:
            before = tl.load(y + offset, mask=stored, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        total_up = total
        square = tl.zeros([BLOCK_K], tl.float32)
        for i in tl.static_range(len(tiles)):
            value = tiles[i].to(tl.float32)
            if norm_weight is not None:
                square += value * value
                value = value * gamma[i].to(tl.float32)
            total += w[i].to(tl.float32) * value[None, :]
            if GATED:
                total_up += w_up[i].to(tl.float32) * value[None, :]
        result = tl.sum(total, axis=1)
        result_up = result
        if GATED:
            result_up = tl.sum(total_up, axis=1)
        if norm_weight is not None:
            scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
            result = result * scale
            result_up = result_up * scale
        if bias is not None:
            result += tl.load(bias + w_column).to(tl.float32)
            if GATED:
                result_up += tl.load(bias + out + w_column).to(tl.float32)
        if GATED:
            result = silu_mul_values(result, result_up)
        if RESIDUAL:
            result += before
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=stored)


def run_vector(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, *, eps: float,
    residual: bool, gated: bool, dependent: bool, launch: Launch, options: dict[str, Any],
) -> None:  # fmt: skip
    """Write y, or with `residual` add to it."""
    (rows, k), out = x.shape, y.shape[1]
    decode_linear_vector_kernel[(-(-out // launch.block_n),)](
        x, norm_weight, weight, bias, y, rows, out, eps,
        K=k, GATED=gated, RESIDUAL=residual, ROWS=power_of_two(rows), BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        DEPENDENT=dependent, **options,
    )  # fmt: skip
