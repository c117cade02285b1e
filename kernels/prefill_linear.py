"""Products of many rows whose ends do more than store: what `prefill_gate_up`, `prefill_qkv_rope` and
`decode_head_tiles` share.

    x        [rows, K]         float16, bfloat16 or float32; all tensors share its dtype
    weight   [parts * N, K]    W in `parts` equal parts, one above the other
    product  [rows, parts, N]  float32, a tile of which is all that ever exists

A tile is block_m rows and block_n columns of every part, so that what belongs together (a gate and its up) meets in
one thread. The parts' tiles of W come by one load of three dimensions and go into one instruction, parts * block_n
wide: two sums in one loop would be two instructions that wait for each other.

Programs are either one per tile, or a few per multiprocessor that go on from tile to tile: the loop over tiles and the
one over K are then one loop for the compiler, which loads the next tile's first operands during this one's end.

From sm_90 on the loads are the tensor memory accelerator's, by descriptors that travel with the kernel's parameters: a
captured graph keeps them, as it keeps pointers. Elsewhere, and where a row is no multiple of 16 bytes, they are
ordinary loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels._dependent import can_depend
from kernels._dot import dot
from kernels._rows import rows_in_tiles
from kernels._triton import HAVE_TRITON, INTERPRETED, power_of_two, tl, triton
from kernels.choices import chosen, launch_of

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

DESCRIPTOR_ALIGNMENT = 16
"""Bytes: a described tensor begins, and each of its rows ends, at a multiple of these."""


@dataclass(frozen=True)
class Launch:
    """How a product is launched. Only time depends on it, and the order of sums.

    block_m, block_n, block_k: rows of x, columns of each part of the product, and columns of x that are one tile
    group_m: so many blocks of rows go through the columns together, for the L2
    per_sm: programs per multiprocessor that go from tile to tile; 0: a program for each tile
    pieces: in so many pieces of columns a tile is written, one after the other through the same shared memory
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    per_sm: int = 1
    pieces: int = 1


@triton.jit
def tile_at(index, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    """(block of rows, block of columns) of the tile that comes at `index`."""
    first = index // (GROUP_M * column_blocks) * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    inside = index % (GROUP_M * column_blocks)
    return first + inside % height, inside // height


@triton.jit
def _x_tile(x, row, k, rows, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr):
    """[BLOCK_M, BLOCK_K], zeros outside."""
    if DESCRIBED:
        return x.load([row, k])
    else:
        i = row + tl.arange(0, BLOCK_M)
        j = k + tl.arange(0, BLOCK_K)
        return tl.load(
            x + i[:, None].to(tl.int64) * K + j[None, :], mask=(i < rows)[:, None] & (j < K)[None, :], other=0.0
        )


@triton.jit
def _weight_tile(
    weight, column, k, columns, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[PARTS * BLOCK_N, BLOCK_K], zeros outside."""
    if DESCRIBED:
        return tl.reshape(weight.load([0, column, k]), [PARTS * BLOCK_N, BLOCK_K])
    else:
        n = tl.arange(0, PARTS * BLOCK_N)
        i = column + n % BLOCK_N
        j = k + tl.arange(0, BLOCK_K)
        source = weight + (n // BLOCK_N * columns + i)[:, None].to(tl.int64) * K + j[None, :]
        return tl.load(source, mask=(i < columns)[:, None] & (j < K)[None, :], other=0.0)


@triton.jit
def product_tile(
    x, weight, row, column, rows, columns, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr, W_FIRST: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK_M, PARTS * BLOCK_N] float32 of the product, from `row` and from `column` of each part on.

    W_FIRST: W's rows, not x's, stand along the 64 rows of the instruction; for fewer rows of x than those.
    """
    total = tl.zeros([PARTS * BLOCK_N, BLOCK_M] if W_FIRST else [BLOCK_M, PARTS * BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = _x_tile(x, row, k, rows, K, BLOCK_M, BLOCK_K, DESCRIBED)
        w = _weight_tile(weight, column, k, columns, K, PARTS, BLOCK_N, BLOCK_K, DESCRIBED)
        total = dot(w, tl.trans(a), total) if W_FIRST else dot(a, tl.trans(w), total)
    return tl.trans(total) if W_FIRST else total


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a tile's columns, [M, N] each, without a move between threads."""
    return tl.split(tl.permute(tl.reshape(tile, [M, 2, N]), [0, 2, 1]))


def can_describe(*tensors: Tensor) -> bool:
    """Whether the GPU (or the interpreter) loads by descriptors, and all of these tensors' places and rows allow it."""
    # The GPUs that start kernels dependently are those that have the tensor memory accelerator.
    if not (INTERPRETED or can_depend(tensors[0].device)):
        return False
    return all(
        t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0 and t.shape[-1] * t.element_size() % DESCRIPTOR_ALIGNMENT == 0
        for t in tensors
    )


def described(tensor: Tensor, block: tuple[int, int], parts: int = 0) -> Any:
    """A descriptor of `tensor` [rows, columns] by tiles of `block`; with `parts`, of that many tensors one above the
    other, a tile being one of each, [parts, *block]."""
    # The stride of a single row says nothing, and may be no multiple of 16 bytes.
    row_stride = tensor.stride(0) if len(tensor) > 1 else tensor.shape[1]
    shape, strides, block_shape = list(tensor.shape), [row_stride, 1], list(block)
    if parts:
        rows = shape[0] // parts
        shape, strides, block_shape = [parts, rows, shape[1]], [rows * shape[1], *strides], [parts, *block_shape]
    return TensorDescriptor(tensor, shape, strides, block_shape)


def described_rows(x: Tensor, block: tuple[int, int]) -> Any:
    """A descriptor of contiguous x [rows, columns] that is only read, with what lies behind its rows in their tile."""
    return TensorDescriptor(x, [rows_in_tiles(x, block[0]), x.shape[1]], [x.shape[1], 1], list(block))


def programs(launch: Launch, tiles: int, device: torch.device) -> int:
    """Of a launch, for so many tiles."""
    return min(tiles, launch.per_sm * _multiprocessors(device)) if launch.per_sm else tiles


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def default_launch(element_bytes: int) -> Launch:
    """A launch that every GPU can run, for either product of parts or heads of up to 64 columns."""
    if element_bytes == 4:  # in full precision, on the ordinary cores
        return Launch(32, 16, 32, 4, 2, per_sm=0)
    return Launch(128, 64, 64, 8, 3, per_sm=0)


def shape_key(out: int, k: int, rows: int) -> str:
    """The name of a product's shape in the tables of choices; one launch serves all rows up to a power of two."""
    return f"{out}x{k} rows {power_of_two(rows)}"


def best_launch(kernel: str, out: int, k: int, rows: int, dtype: torch.dtype, device: torch.device) -> Launch | None:
    """What was measured fastest for `kernel`; None where cuBLAS and separate kernels were, or nothing was measured.

    out: columns of the weight's product, gate's and up's both
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    entry = chosen(kernel, shape_key(out, k, rows), device)
    return None if entry is None or "launch" not in entry else launch_of(Launch, entry["launch"], device)
