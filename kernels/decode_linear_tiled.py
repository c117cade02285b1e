"""The tiled kernel of `decode_linear`: W x^T on tensor cores, tile by tile, for about 8 to 256 rows.

    x        [rows, K]       its norm, if there is one, stands before the product: applied already, or half of it
    weight   [N, K]          gated: the gate's N/2 rows, then up's
    y        [rows, out]     out = N, or N/2 with gated

A norm in two halves spares its kernel. The product that adds to the residual stream also leaves gamma * stream,
rounded, and the stream's sum of squares over each program's columns (`HalfNormed`); the next product takes these rows
as its x and multiplies its sums by 1 / rms, since a row's factor commutes with the product.

Few columns give few programs; several may share the sum over K, the last to arrive adding the parts in a fixed order.
A program whose part of K is one tile holds its W before it waits for the kernel before: in registers, or, described, in
shared memory, where the tensor memory accelerator puts it and the instruction takes it from. Any other asks its part of
W into the L2 before the wait, and streams it from there through a pipelined loop, by ordinary loads or, described, by
the accelerator.

W's rows or x's stand along the 64 rows of the instruction, whichever fill it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels._dependent import ask_into_l2, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._rows import empty_rows
from kernels._triton import tl, triton
from kernels.decode_linear_launch import Launch
from kernels.prefill_linear import can_describe, described, described_rows, halves
from kernels.silu_mul import silu_mul_values

SQUARES_COLUMNS = 32
"""The kernel is compiled for sums of squares over so many columns each, and again only where they are over fewer."""
MAX_COUNTERS = 8192
"""Tiles whose sum over K may be shared among programs in one launch."""


@dataclass(frozen=True)
class HalfNormed:
    """Rows x on their way through a norm: all of it is done but the division by rms(x).

    rows: [rows, K] gamma * x, rounded to x's dtype
    squares: [parts, rows] float32, whose sum over the parts is a row's sum of x^2
    """

    rows: Tensor
    squares: Tensor


@triton.jit
def _product(w, a, total, X_FIRST: tl.constexpr):
    """total + a w^T, or its transpose."""
    return dot(a, tl.trans(w), total) if X_FIRST else dot(w, tl.trans(a), total)


@triton.jit
def _described_w(weight, column, k, GATED: tl.constexpr, TILE_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[TILE_N, BLOCK_K] of W by its descriptor; gated: the gate's rows, then up's."""
    if GATED:
        return tl.reshape(weight.load([0, column, k]), [TILE_N, BLOCK_K])
    else:
        return weight.load([column, k])


@triton.jit
def _sum_of_parts(place, size, SPLIT_K: tl.constexpr):
    """All parts are asked for before the first is added; past the L1, which does not know other programs' writes."""
    parts = (tl.load(place, cache_modifier=".cg"),)
    for other in tl.static_range(1, SPLIT_K):
        part = tl.load(place + other * size, cache_modifier=".cg")
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking here
    total = parts[0]
    for other in tl.static_range(1, SPLIT_K):
        total += parts[other]
    return total


@triton.jit(do_not_specialize=["rows", "squares_parts"])
def decode_linear_tiled_kernel(
    x, squares, weight, asked, bias, y, next_norm_weight, next_rows, next_squares, parts, counters, rows, out,
    squares_parts, eps, K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, PIECES: tl.constexpr,
    HELD: tl.constexpr, DESCRIBED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M rows and BLOCK_N columns of y, or one of SPLIT_K parts of its sum over K.

    DESCRIBED: x and weight are descriptors, and the parts are equal. asked: W itself, to be asked for before the wait.
    """
    let_next_start(DEPENDENT)
    # Gate and up in one tile: 8 rows of the one, 8 of the other, so that a thread gets both results of a column.
    # Descriptors bring all of the one, then the other.
    TILE_N: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    X_FIRST: tl.constexpr = TILE_N < 64 and BLOCK_M >= 64
    # Programs that run at the same time share columns of W: row blocks come first.
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_column = tile // row_blocks * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    n = tl.arange(0, TILE_N)
    if GATED:
        w_row = tl.minimum(first_column + n // 16 * 8 + n % 8, out - 1) + n // 8 % 2 * out
    else:
        w_row = tl.minimum(first_column + n, out - 1)
    w_row = w_row.to(tl.int64)
    first_row = tile % row_blocks * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < rows
    # Surplus rows read others again: all of them the last one, and all programs would wait for the same few lines. A
    # mask costs more, also where no row is surplus.
    x_row = (row % rows).to(tl.int64)
    offset = row[:, None].to(tl.int64) * out + column[None, :]
    stored = is_row[:, None] & (column < out)[None, :]
    PART: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = PART * SPLIT_K == K
    k0 = split * PART + tl.arange(0, BLOCK_K)
    if not DESCRIBED:
        w_tile = weight + w_row[:, None] * K + k0[None, :]
        x_tile = x + x_row[:, None] * K + k0[None, :]
    if HELD:
        if DESCRIBED:
            held = _described_w(weight, first_column, split * PART, GATED, TILE_N, BLOCK_K)
        else:
            held = tl.load(w_tile, eviction_policy="evict_first")
    elif asked is not None:
        piece = tl.arange(0, PIECES) * (PART // PIECES)
        ask_into_l2(
            asked + w_row[:, None] * K + split * PART + piece[None, :],
            PART // PIECES * asked.dtype.element_ty.itemsize,
        )
    if bias is not None:
        if GATED:
            b = tl.load(bias + tl.minimum(column, out - 1)).to(tl.float32)[None, :]
            b_up = tl.load(bias + out + tl.minimum(column, out - 1)).to(tl.float32)[None, :]
        else:
            b = tl.load(bias + tl.minimum(column, out - 1)).to(tl.float32)[None, :]
    if next_norm_weight is not None:
        gamma = tl.load(next_norm_weight + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
    # Not in the loop: its loads are moved ahead of it, and some of them depend on the kernel before.
    wait_for_previous(DEPENDENT)

    # What the end wants is asked for here, so that it comes while the product is made.
    if RESIDUAL:
        before = tl.load(y + offset, mask=stored, other=0.0)
    if squares is not None:
        part = tl.arange(0, SQUARES)[:, None]
        square = tl.load(squares + part * rows + x_row[None, :], mask=part < squares_parts, other=0.0)
    total = tl.zeros([BLOCK_M, TILE_N] if X_FIRST else [TILE_N, BLOCK_M], tl.float32)
    if HELD:
        a = x.load([first_row, split * PART]) if DESCRIBED else tl.load(x_tile)
        total = _product(held, a, total, X_FIRST)
    else:
        for start in range(0, PART, BLOCK_K):
            if DESCRIBED:
                w = _described_w(weight, first_column, split * PART + start, GATED, TILE_N, BLOCK_K)
                a = x.load([first_row, split * PART + start])
            elif EVEN:
                w = tl.load(w_tile + start, eviction_policy="evict_first")
                a = tl.load(x_tile + start)
            else:
                inside = (k0 + start < K)[None, :]
                w = tl.load(w_tile + start, mask=inside, other=0.0, eviction_policy="evict_first")
                a = tl.load(x_tile + start, mask=inside, other=0.0)
            total = _product(w, a, total, X_FIRST)

    last = True
    if SPLIT_K > 1:
        # Every program writes its part, then counts itself; the count of the one that comes last tells it that all
        # parts are written. The barrier puts this program's stores before its count, the count's acquire puts the
        # others' before the reads below. The count is zero again for the next launch.
        size = tl.num_programs(0).to(tl.int64) * TILE_N * BLOCK_M
        place = parts + tile.to(tl.int64) * TILE_N * BLOCK_M
        place = place + tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
        tl.store(place + split * size, total)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            total = _sum_of_parts(place, size, SPLIT_K)
            tl.store(counters + tile, 0)
    if last:
        result = total if X_FIRST else tl.trans(total)
        if squares is not None:
            result = result * tl.rsqrt(tl.sum(square, axis=0) / K + eps)[:, None]
        if GATED and DESCRIBED:
            result, result_up = halves(result, BLOCK_M, BLOCK_N)
        elif GATED:
            result = tl.permute(tl.reshape(result, [BLOCK_M, BLOCK_N // 8, 2, 8]), [0, 1, 3, 2])
            result, result_up = tl.split(result)
            result = tl.reshape(result, [BLOCK_M, BLOCK_N])
            result_up = tl.reshape(result_up, [BLOCK_M, BLOCK_N])
        if bias is not None:
            result += b
            if GATED:
                result_up += b_up
        if GATED:
            result = silu_mul_values(result, result_up)
        if RESIDUAL:
            result += before.to(tl.float32)
        rounded = result.to(y.dtype.element_ty)
        tl.store(y + offset, rounded, mask=stored)
        if next_norm_weight is not None:
            # Of the rounded sums: the stream is what a norm of its own would read.
            value = tl.where(stored, rounded.to(tl.float32), 0.0)
            tl.store(next_rows + offset, (value * gamma).to(y.dtype.element_ty), mask=stored)
            sums = next_squares + tile // row_blocks * rows + row
            tl.store(sums, tl.sum(value * value, axis=1), mask=is_row)


@lru_cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that shared sums count in and leave as zeros; launches that share a device must not overlap in time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode_linear with split_k must run once before it is captured in a graph.")
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def run_tiled(
    x: Tensor | HalfNormed,
    weight: Tensor,
    y: Tensor,
    *,
    eps: float,
    bias: Tensor | None,
    residual: bool,
    gated: bool,
    dependent: bool,
    launch: Launch,
    next_norm_weight: Tensor | None = None,
) -> HalfNormed | None:
    """Launches the kernel on checked arguments: writes y, or adds to it if it is the residual stream.

    With `next_norm_weight` [out] also what the next product needs of y's norm. ValueError where `launch` cannot run.
    """
    given, squares = (x.rows, x.squares) if isinstance(x, HalfNormed) else (x, None)
    rows, k = given.shape
    out = y.shape[1]
    column_blocks, split_k = -(-out // launch.block_n), launch.split_k
    tiles = column_blocks * -(-rows // launch.block_m)
    if split_k > 1 and tiles > MAX_COUNTERS:
        raise ValueError(f"split_k takes at most {MAX_COUNTERS} tiles.")
    parts = counters = None
    if split_k > 1:
        tile = launch.block_n * (2 if gated else 1) * launch.block_m
        parts = torch.empty((split_k, tiles, tile), dtype=torch.float32, device=given.device)
        counters = _counters(given.device)
    squares_parts = 0 if squares is None else squares.shape[0]
    left = None
    if next_norm_weight is not None:
        left = HalfNormed(
            empty_rows(rows, out, y),
            torch.empty((column_blocks, rows), dtype=torch.float32, device=y.device),
        )
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    held = launch.ahead and k == split_k * launch.block_k
    describes = launch.described and k % (split_k * launch.block_k) == 0 and can_describe(given, weight)
    pieces = _pieces(k, launch, given.element_size()) if dependent and launch.ahead and not held else 0
    operands: tuple[Any, Any] = given, weight
    if describes:
        operands = (
            described_rows(given, (launch.block_m, launch.block_k)),
            described(weight, (launch.block_n, launch.block_k), parts=2 if gated else 0),
        )
    decode_linear_tiled_kernel[(tiles, split_k)](
        operands[0], squares, operands[1], weight if pieces else None, bias, y, next_norm_weight, left and left.rows,
        left and left.squares, parts, counters, rows, out, squares_parts, eps,
        K=k, GATED=gated, RESIDUAL=residual,
        SQUARES=triton.next_power_of_2(max(1, squares_parts, k // SQUARES_COLUMNS)),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SPLIT_K=split_k,
        PIECES=pieces,
        HELD=held, DESCRIBED=describes, DEPENDENT=dependent,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **options,
    )  # fmt: skip
    return left


def _pieces(k: int, launch: Launch, element_bytes: int) -> int:
    """In how many requests a program asks for its part of one row of W; 0 if it cannot be cut into 16 bytes each."""
    part_bytes = k // launch.split_k * element_bytes
    if k % (launch.split_k * launch.block_k):
        return 0
    wanted = max(1, launch.num_warps * 32 // launch.block_n)
    return next((pieces for pieces in (wanted, 4, 2, 1) if pieces <= wanted and part_bytes % (16 * pieces) == 0), 0)
