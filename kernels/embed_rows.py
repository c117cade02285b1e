"""Rows of an embedding table: y[i] = table[tokens[i]].

    tokens  [rows] int32 (or int64)   0 <= token < vocab, which is not checked: they lie on the device
    table   [vocab, hidden]           float32, float16 or bfloat16
    y       [rows, hidden]            the table's dtype

Nothing is fused: tokens that lie on the device as int32 need not be converted to int64. What a decode step draws is
embedded by the kernel that draws it (kernels/sample.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_float, check_integers, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._triton import runs_triton, tl, triton

BLOCK = 1024
"""Columns per program: 8 elements per thread of 4 warps."""


def reference(tokens: Tensor, table: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return table[tokens.long()]


@triton.jit
def embed_rows_kernel(tokens, table, y, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One row and BLOCK of its columns."""
    let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    wait_for_previous(DEPENDENT)
    token = tl.load(tokens + row).to(tl.int64)
    tl.store(y + row * HIDDEN + column, tl.load(table + token * HIDDEN + column, mask=mask), mask=mask)


def embed_rows(tokens: Tensor, table: Tensor, *, out: Tensor | None = None, dependent: bool = False) -> Tensor:
    """table[tokens], written to `out` if given; shapes as in this module's docstring.

    ValueError if the arguments do not fit.
    """
    check_float("table", table, 2)
    rows, hidden = len(tokens), table.shape[1]
    check_integers("tokens", tokens, (rows,), table)
    if out is not None:
        check_like("out", out, (rows, hidden), table)
    if not runs_triton(table):
        return reference(tokens, table) if out is None else out.copy_(reference(tokens, table))
    depends = dependent and can_depend(table.device)
    y = torch.empty((rows, hidden), dtype=table.dtype, device=table.device) if out is None else out
    if y.numel() > 0:
        embed_rows_kernel[(rows, -(-hidden // BLOCK))](
            tokens, table, y, HIDDEN=hidden, BLOCK=min(BLOCK, triton.next_power_of_2(hidden)), DEPENDENT=depends,
            num_warps=4, **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return y
