"""SiLU of one half times the other: y = silu(gate) * up.

    gate_up  [rows, 2 * inter]   float32, float16 or bfloat16; the gate's columns first, then up's
    y        [rows, inter]

Fused: the activation and the product. Saved: the write and read of silu(gate) (2 * rows * inter elements).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import runs_triton, tl, triton

BLOCK = 1024
WARPS = 2
"""Of a program, which takes BLOCK columns: two 16-byte loads per thread of gate and up each."""


def reference(gate_up: Tensor) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def silu_mul_values(gate, up):
    """silu(gate) * up, of float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_mul_kernel(gate_up, y, inter, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One row and BLOCK of its columns; programs that run at the same time go through memory in its order."""
    let_next_start(DEPENDENT)
    blocks = tl.cdiv(inter, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < inter
    wait_for_previous(DEPENDENT)
    gate = tl.load(gate_up + row * 2 * inter + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * inter + column, mask=mask, other=0.0).to(tl.float32)
    value = silu_mul_values(gate, up)
    tl.store(y + row * inter + column, value.to(y.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, dependent: bool = False) -> Tensor:
    """silu(gate_up[:, :inter]) * gate_up[:, inter:]; ValueError if `gate_up` is not a contiguous float matrix.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for.
    """
    check_float("gate_up", gate_up, 2)
    rows, columns = gate_up.shape
    if columns % 2:
        raise ValueError(f"gate_up must have as many gate columns as up columns, but it has {columns} columns.")
    if not runs_triton(gate_up):
        return reference(gate_up)
    inter = columns // 2
    y = empty_rows(rows, inter, gate_up)
    if y.numel() > 0:
        depends = dependent and can_depend(gate_up.device)
        silu_mul_kernel[(rows * -(-inter // BLOCK),)](
            gate_up, y, inter, BLOCK=BLOCK, DEPENDENT=depends, num_warps=WARPS,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return y


def saved_bytes(rows: int, inter: int, element_bytes: int) -> int:
    """The write and read of the activated gate."""
    return 2 * rows * inter * element_bytes


FUSION = Fusion("silu_mul", ("silu_mul",), silu_mul, reference, saved_bytes)
