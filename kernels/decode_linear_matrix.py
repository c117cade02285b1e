"""The matrix kernel of `decode_linear`: W held in registers before the wait, for 2 to about 64 rows on tensor cores.

A program's warps share the sum over K. Each holds its part of W in the very places in which the instruction takes it,
because the columns of W and x are counted in the order in which a thread's 16 bytes come. Arguments are
`decode_linear`'s.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels._dependent import let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._triton import power_of_two, tl, triton
from kernels.decode_linear_launch import Launch
from kernels.silu_mul import silu_mul_values

MATRIX_PASSES = 4
"""A matrix program's W serves at most this many blocks of rows, one after the other."""


@triton.jit
def _fragment_rows(BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """The row of each 16 bytes (of 2-byte elements) in a tile of BLOCK rows: a column of numbers.

    Numbered by chunk of 32 columns, then by 8 rows, warp, row, and 4 pieces of a chunk; so a warp's 32 threads get
    8 rows with 4 pieces each, as the tensor cores' instructions take them.
    """
    piece = tl.arange(0, CHUNKS * BLOCK * WARPS * 4)
    return (piece // (32 * WARPS) % (BLOCK // 8) * 8 + piece // 4 % 8)[:, None]


@triton.jit
def _fragment_columns(BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """The columns of each piece, numbered as in `_fragment_rows`; a warp's chunks lie side by side."""
    piece = tl.arange(0, CHUNKS * BLOCK * WARPS * 4)
    chunk = piece // 32 % WARPS * CHUNKS + piece // (4 * BLOCK * WARPS)
    return (chunk * 32 + piece % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def _load_fragments(pointers, columns, BLOCK_K: tl.constexpr, K: tl.constexpr, EVICT: tl.constexpr):
    """Whole rows of K elements, as a tuple of tiles of BLOCK_K columns; `pointers` to those of the first tile."""
    tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if start + BLOCK_K <= K:
            tile = tl.load(pointers + start, eviction_policy=EVICT)
        else:
            tile = tl.load(pointers + start, mask=columns + start < K, other=0.0, eviction_policy=EVICT)
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _per_warp(tile, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """A tile of pieces as one matrix [BLOCK, columns] per warp, without moving anything between threads.

    The instruction wants 2 elements of each of 4 threads, then the next 2: so this is the order of the columns, in W
    and x alike, and a product's sum has no order.
    """
    tile = tl.reshape(tile, [CHUNKS, BLOCK // 8, WARPS, 8, 4, 4, 2])
    return tl.reshape(tl.permute(tile, [2, 1, 3, 0, 5, 4, 6]), [WARPS, BLOCK, CHUNKS * 32])


@triton.jit
def _load_sums(
    y, first_row, first_column, rows, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr
):
    """y's tile where the instruction keeps its sums, [WARPS, BLOCK_M, BLOCK_N]: the first warp's, the others' are 0."""
    piece = tl.arange(0, BLOCK_M * BLOCK_N * WARPS // 2)
    row = first_row + piece // (32 * WARPS) % (BLOCK_M // 8) * 8 + piece // 4 % 8
    column = first_column + (piece // (4 * BLOCK_M * WARPS) * 8 + piece % 4 * 2)[:, None] + tl.arange(0, 2)[None, :]
    inside = ((piece // 32 % WARPS == 0) & (row < rows))[:, None] & (column < out)
    sums = tl.load(y + row[:, None].to(tl.int64) * out + column, mask=inside, other=0.0).to(tl.float32)
    sums = tl.reshape(sums, [BLOCK_N // 8, BLOCK_M // 8, WARPS, 8, 4, 2])
    return tl.reshape(tl.permute(sums, [2, 1, 3, 0, 4, 5]), [WARPS, BLOCK_M, BLOCK_N])


@triton.jit
def _plus(total, product):
    """total + product, hidden from Triton, which would make one chain of all products, each waiting for the last."""
    return tl.fma(product, 1.0, total)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["rows"])
def decode_linear_matrix_kernel(
    x, norm_weight, weight, bias, y, rows, out, eps,
    K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, PASSES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y for PASSES * BLOCK_M rows."""
    let_next_start(DEPENDENT)
    CHUNKS: tl.constexpr = BLOCK_K // (32 * WARPS)
    # Gate and up in one tile: 8 rows of the one, 8 of the other, so that a thread gets both results of a column.
    TILE_N: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    # The instruction multiplies 16 rows by 8 columns: W stands first where it fills the 16.
    W_FIRST: tl.constexpr = TILE_N >= 16 and not RESIDUAL
    # What the product is simply added to is where its sums start: asked for with x, not after it.
    START: tl.constexpr = RESIDUAL and norm_weight is None and not GATED
    first = tl.program_id(0) * BLOCK_N
    w_row = _fragment_rows(TILE_N, CHUNKS, WARPS)
    if GATED:
        w_row = tl.minimum(first + w_row // 16 * 8 + w_row % 8, out - 1) + w_row // 8 % 2 * out
    else:
        w_row = tl.minimum(first + w_row, out - 1)
    w_columns = _fragment_columns(TILE_N, CHUNKS, WARPS)
    w = _load_fragments(weight + w_row.to(tl.int64) * K + w_columns, w_columns, BLOCK_K, K, "evict_first")
    x_columns = _fragment_columns(BLOCK_M, CHUNKS, WARPS)
    if norm_weight is not None:
        gamma = _load_fragments(norm_weight + x_columns, x_columns, BLOCK_K, K, "")
    column = first + tl.arange(0, BLOCK_N)
    w_column = tl.minimum(column, out - 1)
    if bias is not None:
        b = tl.load(bias + w_column).to(tl.float32)[:, None]
        if GATED:
            b_up = tl.load(bias + out + w_column).to(tl.float32)[:, None]
    wait_for_previous(DEPENDENT)

    diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
    for i in tl.static_range(PASSES):
        first_row = (tl.program_id(1) * PASSES + i) * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        offset = row[None, :].to(tl.int64) * out + column[:, None]
        stored = (row < rows)[None, :] & (column < out)[:, None]
        x_row = tl.minimum(first_row + _fragment_rows(BLOCK_M, CHUNKS, WARPS), rows - 1).to(tl.int64)
        tiles = _load_fragments(x + x_row * K + x_columns, x_columns, BLOCK_K, K, "")
        total = tl.zeros([WARPS, TILE_N, BLOCK_M] if W_FIRST else [WARPS, BLOCK_M, TILE_N], tl.float32)
        zeros = total
        if START:
            total = _load_sums(y, first_row, first, rows, out, BLOCK_M, BLOCK_N, WARPS)

        square = tl.zeros([WARPS, BLOCK_M], tl.float32)
        if norm_weight is not None:
            # x x^T on tensor cores holds the sums of squares in its diagonal.
            squares = tl.zeros([WARPS, BLOCK_M, BLOCK_M], tl.float32)
            for j in tl.static_range(len(tiles)):
                a = _per_warp(tiles[j], BLOCK_M, CHUNKS, WARPS)
                squares = _plus(squares, dot(a, tl.permute(a, [0, 2, 1]), tl.zeros_like(squares)))
            square = tl.sum(tl.where(diagonal[None, :, :], squares, 0.0), axis=1 if W_FIRST else 2)

        for j in tl.static_range(len(tiles)):
            a = tiles[j]
            if norm_weight is not None:
                a = (a.to(tl.float32) * gamma[j].to(tl.float32)).to(weight.dtype.element_ty)
            a = _per_warp(a, BLOCK_M, CHUNKS, WARPS)
            b_tile = _per_warp(w[j], TILE_N, CHUNKS, WARPS)
            if W_FIRST:
                total = _plus(total, dot(b_tile, tl.permute(a, [0, 2, 1]), zeros))
            else:
                total = _plus(total, dot(a, tl.permute(b_tile, [0, 2, 1]), zeros))

        # Over the warps, through shared memory: both sums at once where they are small.
        if norm_weight is not None:
            square = tl.expand_dims(square, 1 if W_FIRST else 2)
            if TILE_N * BLOCK_M <= 128:
                result, square = tl.reduce((total, tl.broadcast_to(square, total.shape)), 0, _add_pairs)
            else:
                result = tl.sum(total, axis=0)
                square = tl.sum(square, axis=0)
            result = result * tl.rsqrt(square / K + eps)
        else:
            result = tl.sum(total, axis=0)
        if not W_FIRST:
            result = tl.trans(result)
        if GATED:
            result = tl.reshape(result, [BLOCK_N // 8, 2, 8, BLOCK_M])
            result, result_up = tl.split(tl.permute(result, [0, 2, 3, 1]))
            result = tl.reshape(result, [BLOCK_N, BLOCK_M])
            result_up = tl.reshape(result_up, [BLOCK_N, BLOCK_M])
        if bias is not None:
            result += b
            if GATED:
                result_up += b_up
        if GATED:
            result = silu_mul_values(result, result_up)
        if RESIDUAL and not START:
            result += tl.load(y + offset, mask=stored, other=0.0).to(tl.float32)
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=stored)


def run_matrix(
    x: Tensor, norm_weight: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, *, eps: float,
    residual: bool, gated: bool, dependent: bool, launch: Launch, options: dict[str, Any],
) -> None:  # fmt: skip
    """Write y, or with `residual` add to it."""
    (rows, k), out = x.shape, y.shape[1]
    blocks = -(-rows // launch.block_m)
    passes = min(MATRIX_PASSES, power_of_two(blocks))
    decode_linear_matrix_kernel[(-(-out // launch.block_n), -(-blocks // passes))](
        x, norm_weight, weight, bias, y, rows, out, eps,
        K=k, GATED=gated, RESIDUAL=residual, PASSES=passes, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k, WARPS=launch.num_warps, DEPENDENT=dependent, **options,
    )  # fmt: skip
