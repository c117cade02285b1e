"""How `decode_linear` is launched: what can be chosen, what every GPU can run, what is worth measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels._triton import power_of_two
from kernels.choices import chosen_for, launch_of, rows_measured
from kernels.prefill_linear import Launch as PrefillLaunch

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
WIDE_PROGRAM = 16, 16
"""Rows of W and warps of a default matrix program in whose place cuBLAS runs where nothing was measured: an H200 took
1.7 times as long with it for 8 rows of x and W of 2048 columns and 3072 or 4096 rows."""
MATRIX_REGISTERS = 96
"""What a matrix program's W, x and gamma may take of each thread's 128 registers."""


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
    return tiled_launch(rows, out, k, gated, element_bytes)


def tiled_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int) -> Launch:
    """The tiled kernel's default."""
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
        default = default_launch(rows, out, k, gated, element_bytes)
        large = rows > 1 and (2 if gated else 1) * out * k * element_bytes >= LARGE_WEIGHT
        wide = default.kernel == "matrix" and (default.block_n, default.num_warps) == WIDE_PROGRAM
        return None if large or wide else default
    return None if "path" in choice else launch_of(Launch, choice["launch"], device)


def best_prefill_gate_up(
    rows: int, out: int, k: int, gated: bool, element_bytes: int, device: torch.device
) -> PrefillLaunch | None:
    """How `prefill_gate_up` behind a norm was measured to be a decode step's fastest way here; None: it was not."""
    choice = _measured(rows, out, k, gated, element_bytes, device)
    if choice is None or choice.get("path") != "prefill":
        return None
    return launch_of(PrefillLaunch, choice["launch"], device)
