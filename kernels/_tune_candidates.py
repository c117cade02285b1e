"""Launches that `python -m kernels.tune` tries for a decode step's products."""

from __future__ import annotations

from collections.abc import Iterable

from kernels._triton import power_of_two, triton
from kernels._tune_models import Op
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import default_launch as default_head
from kernels.decode_linear_launch import Launch, default_launch, matrix_candidates
from kernels.decode_linear_matrix import MATRIX_PASSES
from kernels.prefill_linear import Launch as PrefillLaunch

HEAD_VECTOR_ROWS = 4
VECTOR_ROWS = 8
MATRIX_ROWS = 64
TILED_ROWS = 8
"""From here on the tiled kernel is tried, with norms in halves."""
PREFILL_ROWS = 128
"""From here on `prefill_gate_up` behind a norm is tried for gate and up."""
DESCRIBED_ROWS = 64
"""From so many rows of x in a tile on, loops by descriptors are tried too."""
TILED_STAGES = (6, 8)
"""Tiles of a tiled program's loop that are under way at once, at most: 8 are all of K = 1024 by 128."""

# Tiles that are small enough for 96 to 384 programs at 128 and 256 rows of 3072 columns, each of them a program: of two
# on a multiprocessor the one works while the other waits for its first tiles.
PREFILL_GATE_UP = (
    PrefillLaunch(64, 32, 64, 4, 4, per_sm=0),
    PrefillLaunch(64, 32, 128, 4, 3, per_sm=0),
    PrefillLaunch(64, 64, 64, 4, 3, per_sm=0),
    PrefillLaunch(64, 64, 64, 4, 4, per_sm=0),
    PrefillLaunch(64, 64, 128, 4, 2, per_sm=0),
    PrefillLaunch(64, 64, 128, 4, 4, per_sm=0),
    PrefillLaunch(64, 64, 64, 4, 3, per_sm=2),
    PrefillLaunch(64, 128, 64, 4, 4, per_sm=0),
    PrefillLaunch(64, 128, 64, 4, 5, per_sm=0),
    PrefillLaunch(128, 32, 64, 4, 4, per_sm=0),
    PrefillLaunch(128, 32, 64, 8, 4, per_sm=0),
    PrefillLaunch(128, 64, 64, 4, 3, per_sm=0),
    PrefillLaunch(128, 64, 64, 8, 3, per_sm=0),
    PrefillLaunch(128, 64, 64, 8, 5, per_sm=0),
)
QUICK_PREFILL_GATE_UP = PREFILL_GATE_UP[2:6:3]

HEAD_FEW_ROWS = 16
HEAD_TILES_ROWS = 8
# By rows: the head's tiles behind a norm. W comes from memory at its rate if enough of it is under way, some 40 KiB of
# each multiprocessor. What comes from the L2 besides, x for each tile of W and W again for each other block of rows, is
# half as many bytes with 64 rows and tiles of 128, and twice as many with 256. 1187 tiles of 128 fill 132
# multiprocessors 9 times.
HEAD_TILES = {
    16: (
        PrefillLaunch(16, 128, 64, 4, 8),
        PrefillLaunch(16, 128, 128, 4, 4),
        PrefillLaunch(16, 128, 64, 4, 6),
        PrefillLaunch(16, 128, 128, 4, 5),
        PrefillLaunch(16, 128, 64, 8, 8),
        PrefillLaunch(16, 128, 64, 4, 4, per_sm=2),
        PrefillLaunch(16, 128, 64, 4, 5, per_sm=2),
        PrefillLaunch(16, 256, 64, 4, 4),
        PrefillLaunch(16, 256, 64, 8, 5),
        PrefillLaunch(16, 256, 128, 8, 2),
        PrefillLaunch(16, 256, 64, 8, 2, per_sm=2),
    ),
    32: (
        PrefillLaunch(32, 128, 64, 4, 8),
        PrefillLaunch(32, 128, 128, 4, 4),
        PrefillLaunch(32, 128, 64, 4, 6),
        PrefillLaunch(32, 128, 64, 8, 8),
        PrefillLaunch(32, 128, 64, 4, 4, per_sm=2),
        PrefillLaunch(32, 128, 128, 4, 2, per_sm=2),
        PrefillLaunch(32, 256, 64, 4, 4),
        PrefillLaunch(32, 256, 64, 8, 4),
        PrefillLaunch(32, 256, 64, 8, 5),
        PrefillLaunch(32, 256, 128, 8, 2),
        PrefillLaunch(32, 256, 64, 8, 2, per_sm=2),
        PrefillLaunch(16, 128, 64, 4, 8),
    ),
    64: (
        PrefillLaunch(64, 128, 64, 4, 7),
        PrefillLaunch(64, 256, 64, 4, 4),
        PrefillLaunch(64, 128, 64, 4, 5),
        PrefillLaunch(64, 128, 128, 4, 3),
        PrefillLaunch(64, 128, 64, 4, 3, per_sm=2),
        PrefillLaunch(64, 128, 64, 8, 7),
        PrefillLaunch(64, 256, 64, 4, 3),
        PrefillLaunch(64, 256, 128, 4, 2),
        PrefillLaunch(32, 256, 64, 8, 5),
        PrefillLaunch(32, 128, 64, 4, 8),
    ),
    128: (
        PrefillLaunch(128, 128, 64, 8, 5),
        PrefillLaunch(128, 256, 64, 8, 3),
        PrefillLaunch(128, 128, 64, 8, 4),
        PrefillLaunch(128, 128, 64, 4, 5),
        PrefillLaunch(128, 128, 128, 8, 2),
        PrefillLaunch(128, 128, 64, 8, 2, per_sm=2),
        PrefillLaunch(128, 256, 64, 8, 2),
        PrefillLaunch(64, 128, 64, 4, 7),
        PrefillLaunch(64, 128, 64, 4, 3, per_sm=2),
        PrefillLaunch(64, 256, 64, 4, 4),
        PrefillLaunch(64, 256, 128, 4, 2),
    ),
    256: (
        PrefillLaunch(128, 256, 64, 8, 3),
        PrefillLaunch(256, 128, 64, 8, 3),
        PrefillLaunch(128, 128, 64, 8, 5),
        PrefillLaunch(128, 128, 64, 8, 4),
        PrefillLaunch(128, 128, 128, 8, 2),
        PrefillLaunch(128, 128, 64, 8, 2, per_sm=2),
        PrefillLaunch(128, 256, 64, 8, 2),
        PrefillLaunch(256, 128, 64, 8, 2),
        PrefillLaunch(64, 256, 64, 4, 4),
        PrefillLaunch(64, 128, 64, 4, 3, per_sm=2),
    ),
}


def candidates(op: Op, rows: int, quick: bool) -> list[Launch | PrefillLaunch]:
    """Launches worth timing, the default first."""
    found: list[Launch | PrefillLaunch] = [default_launch(rows, op.out, op.k, op.gated, 2)]
    if rows <= VECTOR_ROWS:
        found += _vector_candidates(op)
    if rows <= MATRIX_ROWS:
        found += matrix_candidates(rows, op.out, op.k, op.gated, 2)
    if rows >= TILED_ROWS:
        found += _tiled_candidates(op, rows, quick)
    if rows >= PREFILL_ROWS and op.gated:
        found += QUICK_PREFILL_GATE_UP if quick else PREFILL_GATE_UP
    return list(dict.fromkeys(found))


def _vector_candidates(op: Op) -> Iterable[Launch]:
    """4 to 16 KiB of W per warp: 32 to 128 registers of each thread."""
    row_bytes = op.k * 2 * (2 if op.gated else 1)
    for num_warps in (1, 2, 4):
        for block_n in (1, 2, 4, 8):
            if 4096 <= block_n * row_bytes / num_warps <= 16384:
                # Without a limit the compiler spreads x's loads over the sums, and each of them is waited for.
                for registers in (0, 255 if num_warps == 1 else 128):
                    yield Launch("vector", block_n, 256 * num_warps, num_warps, registers=registers)


def _tiled_candidates(op: Op, rows: int, quick: bool) -> Iterable[Launch]:
    """Tiles of W of 32 to 128 rows for 64 to 400 programs: their W held, or few and many loads under way in a loop."""
    padded = max(16, power_of_two(rows))
    for block_m in sorted({min(64, padded), min(128, padded), 64}):
        # Rows of x beyond the last fill the instruction where W's do not.
        for tile_n in (32, 64, 128) if block_m <= padded else (32,):
            block_n = tile_n // 2 if op.gated else tile_n
            tiles = -(-op.out // block_n) * -(-rows // block_m)
            for split_k in (1, 2, 3, 4, 6, 8, 12, 16):
                if op.k % split_k == 0 and 64 <= tiles * split_k <= 400:
                    yield from _held_candidates(op, block_m, tile_n, split_k)
                    if split_k <= 4 and block_m <= padded:
                        yield from _looped_candidates(op, block_m, tile_n, split_k, quick)


def _held_candidates(op: Op, block_m: int, tile_n: int, split_k: int) -> Iterable[Launch]:
    """A program's part of W is one tile: in registers, or in shared memory."""
    part, block_n = op.k // split_k, tile_n // 2 if op.gated else tile_n
    shared_bytes = (tile_n + block_m) * part * 2
    held = max(tile_n, block_m) * part // 64
    for num_warps, described in ((max(4, min(8, held // 64)), False), (4, True), (8, True)):
        # In the end the sums' tiles of all parts are in a thread's registers.
        if split_k > 1 and split_k * tile_n * block_m >= 512 * 32 * num_warps:
            continue
        if described:
            # Instructions of 16 rows take W from registers, and so do others where gate and up are one tile.
            held_in_registers = max(tile_n, block_m) < 64 or (op.gated and tile_n >= 64)
            fits = part <= 1024 and shared_bytes <= 200 << 10 and not (held_in_registers and part > 512)
            fits = fits and (num_warps == 8 or tile_n * block_m <= 64 * 64)
        else:
            fits = part <= 512 and shared_bytes <= 160 << 10
        if part >= 128 and part & (part - 1) == 0 and fits:
            yield Launch("tiled", block_n, part, num_warps, block_m, 1, split_k, described=described)


def _looped_candidates(op: Op, block_m: int, tile_n: int, split_k: int, quick: bool) -> Iterable[Launch]:
    """A program's part of W comes through a pipelined loop."""
    part, block_n = op.k // split_k, tile_n // 2 if op.gated else tile_n
    warps = 8 if tile_n * block_m > 64 * 64 else 4
    block_k = 128 if block_m <= 64 and tile_n <= 64 else 64
    if part % block_k or part < 3 * block_k:
        return
    stage_bytes = (tile_n + block_m) * block_k * 2
    # The next kernel's programs start early only if there is room for both.
    for shared_bytes in (108 << 10,) if quick else (108 << 10, 200 << 10):
        for most in TILED_STAGES:
            num_stages = min(most, part // block_k, shared_bytes // stage_bytes)
            if num_stages >= 2:
                yield Launch("tiled", block_n, block_k, warps, block_m, num_stages, split_k)
                # Of large tiles the threads issue so many loads that the accelerator may be the better one for it.
                if block_m >= DESCRIBED_ROWS and most == TILED_STAGES[0]:
                    yield Launch("tiled", block_n, block_k, warps, block_m, num_stages, split_k, described=True)


def head_candidates(rows: int, hidden: int, quick: bool) -> list[HeadLaunch]:
    """Launches of the head worth timing; for few rows the default first."""
    tiles = [HeadLaunch(tiles=launch) for launch in _head_tiles(rows, quick)]
    return tiles if rows > HEAD_FEW_ROWS else _few_rows_head_candidates(rows, hidden, quick) + tiles


def _head_tiles(rows: int, quick: bool) -> Iterable[PrefillLaunch]:
    """Of up to 200 KiB of shared memory, or a half where two programs share it; a group of 4 warps makes 64 rows."""
    block_m = max(16, power_of_two(rows))
    found = HEAD_TILES.get(min(block_m, 256), ()) if rows >= HEAD_TILES_ROWS else ()
    return found[:2] if quick else found


def _few_rows_head_candidates(rows: int, hidden: int, quick: bool) -> list[HeadLaunch]:
    """Of all ways but tiles."""
    found = [default_head(hidden, 2)]
    for block_n, num_warps, registers in ((4, 1, 255), (8, 2, 128), (8, 4, 128)) if rows <= HEAD_VECTOR_ROWS else ():
        found.append(HeadLaunch(product=Launch("vector", block_n, 256 * num_warps, num_warps, registers=registers)))
    for block_n, num_warps, chunks in ((16, 4, 1), (16, 4, 4), (8, 4, 1), (16, 8, 1)) if rows > 1 else ():
        block_k = 32 * num_warps * chunks
        product = Launch("matrix", block_n, block_k, num_warps, block_m=8 if rows <= 8 else 16, registers=255)
        found.append(HeadLaunch(product=product))
    for block_k, num_stages in ((64, 4), (128, 3)) if quick else ((64, 3), (64, 4), (64, 5), (128, 3), (128, 5)):
        for num_warps in (4, 8):
            found += [HeadLaunch(block_k, num_warps, num_stages, ahead) for ahead in ((1,) if quick else (0, 2))]
    return list(dict.fromkeys(found))


def compiled_for(launch: Launch | PrefillLaunch, rows: int) -> int:
    """What of the rows a kernel is compiled for: vector for each, matrix for its passes, the others for none."""
    if isinstance(launch, PrefillLaunch):
        return 0
    if launch.kernel == "vector":
        return rows
    return min(MATRIX_PASSES, triton.next_power_of_2(-(-rows // launch.block_m))) if launch.kernel == "matrix" else 0
