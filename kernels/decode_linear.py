"""One linear layer of a decode step: y = (gamma * x / rms(x)) W^T + bias, for few rows, made to stream W.

    x            [rows, K]      float32, float16 or bfloat16; all tensors share its dtype
    weight       [N, K]         W, as torch.nn.Linear keeps it; gated: the gate's N/2 rows, then up's
    norm_weight  [K]            gamma, optional: without it x goes into the product as it is
    bias         [N]            optional
    residual     [rows, N]      optional: y is added to it in place
    y            [rows, N], or [rows, N/2] with gated: silu(gate) * up

rms(x) = sqrt(mean(x^2) + eps). Sums are kept in float32; a residual sum is rounded once.

Fused: norm before, bias, SiLU * mul or the residual add after. Saved: the normalised rows' write and read
(2 * rows * K elements), gate's and up's (2 * rows * N), with a residual the product's (2 * rows * N).

For few rows W is read once and nothing else is large, so the time is W's bytes over the bandwidth if loads never
pause. Launched dependently, a program asks for its weights before it waits for the kernel before, whose tail and
hand-over then cost nothing. Three kernels:

- vector, for a row or a few: a program holds whole rows of W in registers, so that all their bytes are under way
  before the wait. What is left after it is the load of x and a short sum.
- matrix, for 2 to about 64 rows: the same on tensor cores. A program's warps share the sum over K; each holds its
  part of W in registers, in the very places in which the instruction takes it, because the columns of W and x are
  counted in the order in which a thread's 16 bytes come.
- tiled, for about 8 to 256 rows (kernels/decode_linear_tiled.py): as products of matrices are usually made. A norm
  stands before it, in a kernel of its own or half in the product before (`decode_linear_half_norm`): multiplied into x
  in every program, it costs more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import power_of_two, runs_triton, tl, triton
from kernels.choices import chosen_for, launch_of, rows_measured
from kernels.decode_linear_tiled import HalfNormed, run_tiled, silu_mul_values
from kernels.prefill_linear import Launch as PrefillLaunch
from kernels.rms_norm import rms_norm
from kernels.rms_norm_linear import rms_norm as rms_norm_wide


@dataclass(frozen=True)
class Launch:
    """How a product is launched. Only time depends on it, and the order of sums.

    kernel: "vector", "matrix" or "tiled"
    block_n, block_k: rows and columns of W that are one tile; a vector or matrix program holds all of its rows' tiles
    block_m: rows of x per program (tiled), or per pass over the W that it holds (matrix)
    split_k: programs that share one sum over K (tiled)
    ahead: load the program's part of W, or ask for it, before the wait (tiled)
    described: W and x come by descriptors, where the GPU can; a part that is one tile, to shared memory (tiled)
    registers: the most that a thread may use. Where a number is named, the compiler asks for all of x at once instead
        of piece by piece, which would save registers. 0: the compiler's choice
    halves: as o_proj or down_proj also make half of the norm that comes next, if the product after it is tiled (tiled)
    """

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    block_m: int = 1
    num_stages: int = 1
    split_k: int = 1
    ahead: bool = True
    registers: int = 0
    halves: bool = True
    described: bool = False


def reference(
    x: Tensor | HalfNormed,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    if isinstance(x, HalfNormed):
        dtype = x.rows.dtype
        value = x.rows.float() * torch.rsqrt(x.squares.sum(0) / x.rows.shape[1] + eps)[:, None]
    else:
        dtype = x.dtype
        value = x.float() if norm_weight is None else rms_norm_wide(x, norm_weight, eps)
    y = F.linear(value, weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is None:
        return y.to(dtype)
    return residual.copy_((residual.float() + y).to(dtype))


def half_norm_reference(stream: Tensor, norm_weight: Tensor) -> HalfNormed:
    """`stream` [rows, K] on its way through the norm of `norm_weight`, in plain PyTorch."""
    wide = stream.float()
    return HalfNormed((wide * norm_weight.float()).to(stream.dtype), wide.square().sum(1)[None, :])


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


MATRIX_PASSES = 4
"""A matrix program's W serves at most this many blocks of rows, one after the other."""
VECTOR_ROWS = 4
"""Up to here the default is a matrix-vector product per row; above, tensor cores serve better."""
VECTOR_BYTES = 8192
"""W's bytes in each vector program of 2 warps: 32 registers of each thread."""
TILED_SHARED_BYTES = 96 * 1024
"""The tiled kernel's default stays below this much shared memory, which every GPU from 8.0 on gives a program."""


MATRIX_ROWS = 16
"""Up to here, from 2 on, the default is the matrix kernel, if its tiles fit."""
LARGE_WEIGHT = 16 << 20
"""Bytes of W from which on several rows take cuBLAS where nothing was measured. It streams large matrices well, while
the defaults, made so that small ones are under way at once, took an H200 twice as long for 21 to 100 MB."""
MATRIX_REGISTERS = 96
"""What a matrix program's W, x and gamma may take of each thread's 128 registers."""


def default_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int) -> Launch:
    """A launch that runs on any supported GPU, from the shape alone; `out` counts the output's columns."""
    if 2 <= rows <= MATRIX_ROWS and element_bytes == 2 and k % 8 == 0:
        block_m = 8 if rows <= 8 else 16
        for block_n in (16, 8) if out >= 16 * 192 and not gated else (8,):
            for num_warps in (8, 16):
                if _matrix_registers(block_m, block_n, k, gated, num_warps) <= MATRIX_REGISTERS:
                    return Launch("matrix", block_n, 32 * num_warps, num_warps, block_m=block_m, registers=128)
    reach = 16 // element_bytes * 32  # elements that one warp loads in one instruction, 16 bytes a thread
    row_bytes = k * element_bytes * (2 if gated else 1)
    if rows <= VECTOR_ROWS and row_bytes <= 8 * VECTOR_BYTES:
        num_warps = max(2, min(8, power_of_two(row_bytes) // VECTOR_BYTES * 2))
        block_n = max(1, min(16, VECTOR_BYTES * num_warps // 2 // power_of_two(row_bytes)))
        return Launch("vector", block_n, min(reach * num_warps, power_of_two(k)), num_warps)
    return _tiled_launch(rows, out, k, gated, element_bytes)


def _tiled_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int) -> Launch:
    block_m = min(128 if element_bytes == 2 else 32, max(16, power_of_two(rows)))
    block_n = next((size for size in (64, 32) if out >= size * 96), 16)
    block_k = min(max(16, power_of_two(k)), 128 if element_bytes == 2 and block_m <= 64 else 64)
    stage_bytes = (block_n * (2 if gated else 1) + block_m) * block_k * element_bytes
    stages = max(2, min(5, TILED_SHARED_BYTES // stage_bytes))
    return Launch("tiled", block_n, block_k, 4, block_m=block_m, num_stages=stages)


def _matrix_registers(block_m: int, block_n: int, k: int, gated: bool, num_warps: int) -> int:
    """Registers of each thread for W, for x of one pass and for gamma, which is held 8 times over, in 2-byte types."""
    return (block_n * (2 if gated else 1) + block_m + 8) * k // (num_warps * 32 * 2)


def matrix_candidates(rows: int, out: int, k: int, gated: bool, element_bytes: int) -> list[Launch]:
    """Matrix launches worth timing: 4 to 16 warps, short and long chains of products, few and many programs."""
    if element_bytes != 2 or k % 8:
        return []
    found = []
    for block_m in (8, 16) if 8 < rows <= 16 else (8,) if rows <= 8 else (16, 32):
        for block_n in (8, 16) if rows <= 16 else (8, 16, 32):
            if block_n > 8 and out < 64 * block_n:
                continue
            for num_warps in (4, 8, 16):
                held = _matrix_registers(block_m, block_n, k, gated, num_warps)
                sums = block_m * block_n // 16
                limit = 128 if held + sums <= MATRIX_REGISTERS or num_warps == 16 else 255
                if held + sums <= limit - 24:
                    chunks = {1, max(1, min(4, k // (32 * num_warps)))}
                    found += [
                        Launch("matrix", block_n, 32 * num_warps * count, num_warps, block_m, registers=limit)
                        for count in sorted(chunks)
                    ]
    return found


def shape_key(rows: int, out: int, k: int, gated: bool) -> str:
    """Under which a choice measured for so many rows is kept: the next number that is measured, and W's looks."""
    return f"{'gated ' if gated else ''}{out}x{k} rows {rows_measured(rows)[0]}"


def _measured(rows: int, out: int, k: int, gated: bool, element_bytes: int, device: torch.device) -> Any:
    """What the GPU's file says; None: nothing."""
    if element_bytes != 2:
        return None
    return chosen_for("decode_linear", rows, lambda count: shape_key(count, out, k, gated), device)


def best_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int, device: torch.device) -> Launch | None:
    """The launch measured fastest on this GPU, else the default; None where others' kernels were faster, or should be:
    cuBLAS with separate ones, or `prefill_gate_up`."""
    choice = _measured(rows, out, k, gated, element_bytes, device)
    if choice is None:
        large = rows > 1 and (2 if gated else 1) * out * k * element_bytes >= LARGE_WEIGHT
        return None if large else default_launch(rows, out, k, gated, element_bytes)
    return None if "path" in choice else launch_of(Launch, choice["launch"], device)


def best_prefill_gate_up(
    rows: int, out: int, k: int, gated: bool, element_bytes: int, device: torch.device
) -> PrefillLaunch | None:
    """How `prefill_gate_up` behind a norm was measured to be a decode step's fastest way here; None: it was not."""
    choice = _measured(rows, out, k, gated, element_bytes, device)
    if choice is None or choice.get("path") != "prefill":
        return None
    return launch_of(PrefillLaunch, choice["launch"], device)


def _check(
    x: Tensor | HalfNormed, weight: Tensor, norm_weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """The rows themselves."""
    if isinstance(x, HalfNormed):
        check_like("squares", x.squares, (x.squares.shape[0], x.rows.shape[0]), x.rows, torch.float32)
        if norm_weight is not None:
            raise ValueError("rows that are half normed take no other norm_weight.")
        x = x.rows
    check_float("x", x, 2)
    rows, k = x.shape
    if k == 0:
        raise ValueError("x must have at least one column.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    n = weight.shape[0]
    check_like("weight", weight, (n, k), x)
    if gated and n % 2:
        raise ValueError(f"weight must hold as many gate rows as up rows, but it has {n} rows.")
    if norm_weight is not None:
        check_like("norm_weight", norm_weight, (k,), x)
    if bias is not None:
        check_like("bias", bias, (n,), x)
    if residual is not None:
        check_like("residual", residual, (rows, n // 2 if gated else n), x)
    return x


def decode_linear(
    x: Tensor | HalfNormed,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    dependent: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """A decode step's linear layer with what stands before and after it; shapes as in this module's docstring.

    Returns y, or `residual` itself, to which the product was added. `residual` must not share memory with x.
    A half-normed x brings its norm's weight in it; `eps` is wanted still, and the kernel is the tiled one.
    `dependent`: launch dependently where the GPU can (kernels/_dependent.py); results are the same. `launch` overrides
    the measured choice for this GPU and the default. ValueError if the arguments do not fit.
    """
    given = _check(x, weight, norm_weight, bias, residual, gated)
    if not runs_triton(given):
        return reference(x, weight, norm_weight=norm_weight, eps=eps, bias=bias, residual=residual, gated=gated)
    rows, k = given.shape
    out = weight.shape[0] // 2 if gated else weight.shape[0]
    y = empty_rows(rows, out, given) if residual is None else residual
    if rows == 0 or out == 0:
        return y
    shape = (rows, out, k, gated, given.element_size())
    launch = launch or best_launch(*shape, given.device) or default_launch(*shape)
    # In float16 gamma * x may overflow before 1/rms brings it back: matrix cannot put the scale first.
    if launch.kernel == "matrix" and norm_weight is not None and given.dtype == torch.float16:
        launch = _tiled_launch(*shape)
    dependent = dependent and can_depend(given.device)
    if launch.kernel == "tiled" or isinstance(x, HalfNormed):
        if norm_weight is not None:
            x = rms_norm(given, norm_weight, eps, dependent=dependent)
        run_tiled(
            x, weight, y, eps=eps, bias=bias, residual=residual is not None, gated=gated, dependent=dependent,
            launch=launch if launch.kernel == "tiled" else _tiled_launch(*shape),
        )  # fmt: skip
        return y
    options: dict[str, Any] = {"num_warps": launch.num_warps}
    if dependent:
        options["launch_pdl"] = True
    if launch.registers:
        options["maxnreg"] = launch.registers
    if launch.kernel == "vector":
        decode_linear_vector_kernel[(-(-out // launch.block_n),)](
            given, norm_weight, weight, bias, y, rows, out, eps,
            K=k, GATED=gated, RESIDUAL=residual is not None, ROWS=power_of_two(rows), BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k, DEPENDENT=dependent, **options,
        )  # fmt: skip
        return y
    blocks = -(-rows // launch.block_m)
    passes = min(MATRIX_PASSES, power_of_two(blocks))
    decode_linear_matrix_kernel[(-(-out // launch.block_n), -(-blocks // passes))](
        given, norm_weight, weight, bias, y, rows, out, eps,
        K=k, GATED=gated, RESIDUAL=residual is not None, PASSES=passes, BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, WARPS=launch.num_warps,
        DEPENDENT=dependent, **options,
    )  # fmt: skip
    return y


def decode_linear_half_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    next_norm_weight: Tensor,
    *,
    bias: Tensor | None = None,
    dependent: bool = False,
    launch: Launch | None = None,
) -> HalfNormed:
    """`decode_linear` into the residual stream, which also brings the stream half through the norm that comes next.

    `residual` is changed in place; what is returned is the next product's x. By the tiled kernel. Not in float16, where
    gamma * stream may overflow. ValueError if the arguments do not fit.
    """
    _check(x, weight, None, bias, residual, False)
    check_like("next_norm_weight", next_norm_weight, (weight.shape[0],), x)
    if x.dtype == torch.float16:
        raise ValueError("half a norm takes no float16, in which gamma * stream may overflow.")
    if not runs_triton(x):
        return half_norm_reference(reference(x, weight, bias=bias, residual=residual), next_norm_weight)
    rows, k = x.shape
    shape = (rows, weight.shape[0], k, False, x.element_size())
    launch = launch or best_launch(*shape, x.device)
    left = run_tiled(
        x, weight, residual, eps=0.0, bias=bias, residual=True, gated=False,
        dependent=dependent and can_depend(x.device), next_norm_weight=next_norm_weight,
        launch=launch if launch is not None and launch.kernel == "tiled" else _tiled_launch(*shape),
    )  # fmt: skip
    assert left is not None
    return left


def saved_bytes(
    rows: int, k: int, out: int, element_bytes: int, norm: bool = True, gated: bool = False, residual: bool = False
) -> int:
    """Write and read of what stays in registers: the normalised rows, gate and up, the product before its addition."""
    elements = (2 * rows * k if norm else 0) + (4 * rows * out if gated else 0) + (2 * rows * out if residual else 0)
    return elements * element_bytes


FUSION = Fusion(
    "decode_linear",
    ("input_norm+qkv_proj", "o_proj+residual", "post_norm+gate_up_proj+silu_mul", "down_proj+residual"),
    decode_linear,
    reference,
    saved_bytes,
)
