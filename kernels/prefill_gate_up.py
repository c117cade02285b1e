"""Gate and up projection of many rows with the activation in their end: y = silu(x G^T) * (x U^T).

    x       [rows, hidden]        normalised rows; float16, bfloat16 or float32; all tensors share its dtype
    weight  [2 * inter, hidden]   the gate's rows G, then up's U
    y       [rows, inter]

Sums, activation and product are float32; y is rounded once.

Fused: both projections, SiLU, multiplication. Saved: the write and read of gate and up (4 * rows * inter elements).
How tiles are made and launched: kernels/prefill_linear.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import INTERPRETED, runs_triton, tl, triton
from kernels.prefill_linear import (
    Launch,
    best_launch,
    can_describe,
    default_launch,
    described,
    described_rows,
    halves,
    product_tile,
    programs,
    tile_at,
)

_INTERPRETED = tl.constexpr(INTERPRETED)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


@triton.jit
def _silu_mul(gate, up):
    """silu(gate) * up, of float32; the tensor cores wait for it, so it takes few instructions."""
    if _INTERPRETED:
        return gate / (1.0 + tl.exp(-gate)) * up
    else:
        # The same to some units in the last place, without the care that the compiler takes of denormal numbers.
        sigmoid = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -log2(e)
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return gate * sigmoid * up


@triton.jit
def _store(y, tile, row, column, rows, inter, M: tl.constexpr, N: tl.constexpr, DESCRIBED: tl.constexpr):
    if DESCRIBED:
        y.store([row, column], tile.to(y.dtype))
    else:
        i = row + tl.arange(0, M)
        j = column + tl.arange(0, N)
        mask = (i < rows)[:, None] & (j < inter)[None, :]
        tl.store(y + i[:, None].to(tl.int64) * inter + j[None, :], tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_tile(
    x, weight, y, row, column, rows, inter, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PIECES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    both = product_tile(x, weight, row, column, rows, inter, K, 2, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIBED)
    gate, up = halves(both, BLOCK_M, BLOCK_N)
    value = _silu_mul(gate, up)
    if PIECES == 2:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(value, BLOCK_M, HALF)
        _store(y, left, row, column, rows, inter, BLOCK_M, HALF, DESCRIBED)
        _store(y, right, row, column + HALF, rows, inter, BLOCK_M, HALF, DESCRIBED)
    else:
        _store(y, value, row, column, rows, inter, BLOCK_M, BLOCK_N, DESCRIBED)


@triton.jit(do_not_specialize=["rows"])
def prefill_gate_up_kernel(
    x, weight, y, rows, inter, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PIECES: tl.constexpr, DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of y, or every so-many-th; x, weight and y are descriptors or pointers."""
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(inter, BLOCK_N)
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
            row, column = tile_at(index, row_blocks, column_blocks, GROUP_M)
            _gate_up_tile(
                x, weight, y, row * BLOCK_M, column * BLOCK_N, rows, inter, K, BLOCK_M, BLOCK_N, BLOCK_K, PIECES,
                DESCRIBED,
            )  # fmt: skip
    else:
        row, column = tile_at(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
        _gate_up_tile(
            x, weight, y, row * BLOCK_M, column * BLOCK_N, rows, inter, K, BLOCK_M, BLOCK_N, BLOCK_K, PIECES, DESCRIBED
        )


def prefill_gate_up(x: Tensor, weight: Tensor, launch: Launch | None = None, dependent: bool = False) -> Tensor:
    """silu(x G^T) * (x U^T), [rows, inter], with G and U the halves of `weight`; shapes as in this module's docstring.

    `launch`: how; else as measured, or as every GPU can. `dependent`: start while the kernel before it in the stream
    still runs, where the GPU can; it is waited for. ValueError if the arguments do not fit together.
    """
    check_float("x", x, 2)
    rows, hidden = x.shape
    if weight.dim() != 2 or weight.shape[0] % 2:
        raise ValueError(f"weight must have as many gate rows as up rows, not shape {tuple(weight.shape)}.")
    check_like("weight", weight, (weight.shape[0], hidden), x)
    if launch is not None and launch.pieces not in (1, 2):
        raise ValueError(f"a tile is written in 1 or 2 pieces, not {launch.pieces}.")
    if not runs_triton(x):
        return reference(x, weight)
    inter = weight.shape[0] // 2
    y = empty_rows(rows, inter, x)
    if y.numel() == 0 or hidden == 0:
        return y.zero_()
    launch = launch or best_launch("prefill_gate_up", 2 * inter, hidden, rows, x.dtype, x.device)
    launch = launch or default_launch(x.element_size())
    tiles = -(-rows // launch.block_m) * -(-inter // launch.block_n)
    operands = (x, weight, y)
    if describes := can_describe(*operands):
        operands = (
            described_rows(x, (launch.block_m, launch.block_k)),
            described(weight, (launch.block_n, launch.block_k), parts=2),
            described(y, (launch.block_m, launch.block_n // launch.pieces)),
        )
    depends = dependent and can_depend(x.device)
    prefill_gate_up_kernel[(programs(launch, tiles, x.device),)](
        *operands, rows, inter,
        K=hidden, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        PIECES=launch.pieces, DESCRIBED=describes, PERSISTENT=launch.per_sm > 0, DEPENDENT=depends,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
        **({"launch_pdl": True} if depends else {}),
    )  # fmt: skip
    return y


def saved_bytes(rows: int, inter: int, element_bytes: int) -> int:
    """The write and read of gate and up."""
    return 4 * rows * inter * element_bytes


FUSION = Fusion("prefill_gate_up", ("gate_up_proj+silu_mul",), prefill_gate_up, reference, saved_bytes)
