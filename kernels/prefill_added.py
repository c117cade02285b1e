"""A product of many rows added to the residual stream: stream += x W^T, which may leave the stream half normed.

    x            [rows, K]      float16, bfloat16 or float32; all tensors share its dtype
    weight       [N, K]         W
    stream       [rows, N]      changed in place; the sum is float32 and rounded once
    norm_weight  [N]            optional: gamma of the norm that comes next

With gamma the kernel also leaves gamma * stream, rounded, and the stream's sum of squares over each tile's columns: all
of the norm but the division by rms(stream), which commutes with the next product and is made in its end
(kernels/decode_linear_tiled.py::HalfNormed).

Fused: projection, residual add, half of the norm. Saved: the product's write and read (2 * rows * N elements), with
gamma the norm's read of the stream as well (rows * N).
How tiles are made and launched: kernels/prefill_linear.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton
from kernels.decode_linear import half_norm_reference
from kernels.decode_linear_tiled import HalfNormed
from kernels.prefill_linear import (
    Launch,
    best_launch,
    can_describe,
    default_launch,
    described,
    product_tile,
    programs,
    tile_at,
)


def reference(x: Tensor, weight: Tensor, stream: Tensor, norm_weight: Tensor | None = None) -> HalfNormed | None:
    """The same in plain PyTorch, computed in float32."""
    stream.copy_((stream.float() + F.linear(x.float(), weight.float())).to(stream.dtype))
    return None if norm_weight is None else half_norm_reference(stream, norm_weight)


@triton.jit
def _added_tile(
    x, weight, stream, norm_weight, normed, squares, row_block, column_block, rows, columns, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD: the stream is loaded before the product, whose end then waits for nothing. Where the loop over tiles is
    one with the product's, it would be kept in registers all through it."""
    first_row, first_column = row_block * BLOCK_M, column_block * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    if AHEAD:
        before = tl.load(stream + place, mask=inside, other=0.0)
    total = product_tile(x, weight, first_row, first_column, rows, columns, K, 1, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIBED)
    if not AHEAD:
        before = tl.load(stream + place, mask=inside, other=0.0)
    after = (total + before.to(tl.float32)).to(stream.dtype.element_ty)
    tl.store(stream + place, after, mask=inside)
    if norm_weight is not None:
        # Of the rounded stream: that is what a norm of its own would read.
        gamma = tl.load(norm_weight + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(inside, after.to(tl.float32), 0.0)
        tl.store(normed + place, (value * gamma[None, :]).to(stream.dtype.element_ty), mask=inside)
        tl.store(squares + column_block * rows + row, tl.sum(value * value, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def prefill_added_kernel(
    x, weight, stream, norm_weight, normed, squares, rows, columns, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of the stream, or every so-many-th; x and weight are descriptors or pointers."""
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
            row, column = tile_at(index, row_blocks, column_blocks, GROUP_M)
            _added_tile(
                x, weight, stream, norm_weight, normed, squares, row, column, rows, columns, K, BLOCK_M, BLOCK_N,
                BLOCK_K, DESCRIBED, AHEAD=False,
            )  # fmt: skip
    else:
        row, column = tile_at(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
        _added_tile(
            x, weight, stream, norm_weight, normed, squares, row, column, rows, columns, K, BLOCK_M, BLOCK_N, BLOCK_K,
            DESCRIBED, AHEAD=True,
        )  # fmt: skip


def prefill_added(
    x: Tensor, weight: Tensor, stream: Tensor, norm_weight: Tensor | None = None, launch: Launch | None = None,
    dependent: bool = False,
) -> HalfNormed | None:  # fmt: skip
    """Add x W^T to `stream`, in place; with `norm_weight` returns the stream half through the norm that comes next.

    Shapes as in this module's docstring; x must not share memory with `stream`. `launch`: how; else as measured, or as
    every GPU can. `dependent`: start while the kernel before it still runs, where the GPU can; it is waited for.
    ValueError if the arguments do not fit together, and for half a norm in float16, in which gamma * stream may
    overflow.
    """
    check_float("x", x, 2)
    rows, k = x.shape
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    columns = weight.shape[0]
    check_like("weight", weight, (columns, k), x)
    check_like("stream", stream, (rows, columns), x)
    if norm_weight is not None:
        check_like("norm_weight", norm_weight, (columns,), x)
        if x.dtype == torch.float16:
            raise ValueError("half a norm takes no float16, in which gamma * stream may overflow.")
    if not runs_triton(x) or stream.numel() == 0 or k == 0:
        return reference(x, weight, stream, norm_weight)
    launch = launch or best_launch("prefill_added", columns, k, rows, x.dtype, x.device)
    launch = launch or default_launch(x.element_size())
    column_blocks = -(-columns // launch.block_n)
    left = None
    if norm_weight is not None:
        squares = torch.empty((column_blocks, rows), dtype=torch.float32, device=x.device)
        left = HalfNormed(torch.empty_like(stream), squares)
    operands = (x, weight)
    if describes := can_describe(*operands):
        operands = (
            described(x, (launch.block_m, launch.block_k)),
            described(weight, (launch.block_n, launch.block_k), parts=1),
        )
    depends = dependent and can_depend(x.device)
    prefill_added_kernel[(programs(launch, -(-rows // launch.block_m) * column_blocks, x.device),)](
        *operands, stream, norm_weight, left and left.rows, left and left.squares, rows, columns,
        K=k, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        DESCRIBED=describes, PERSISTENT=launch.per_sm > 0, DEPENDENT=depends,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
        **({"launch_pdl": True} if depends else {}),
    )  # fmt: skip
    return left


def saved_bytes(rows: int, out: int, element_bytes: int, norm: bool = True) -> int:
    """The product's write and read; with half a norm, the norm's read of the stream."""
    return (3 if norm else 2) * rows * out * element_bytes


FUSION = Fusion("prefill_added", ("o_proj+residual", "down_proj+residual"), prefill_added, reference, saved_bytes)
