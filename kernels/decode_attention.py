"""One decode step's attention in one kernel: QK-norm, rotary embedding, cache write, and attention over the pages.

    qkv           [rows, (heads + 2 * kv_heads) * head_dim]   q, k, v heads of new tokens; float32, float16, bfloat16
    q_weight, k_weight  [head_dim] or None                    gammas of the heads' norms; both or neither
    cos_sin       [max_pos, head_dim] float32                 cosines of head_dim / 2 angles, then their sines
    positions     [rows] int32 (or int64)                     tokens already cached = the new token's place; -1: padding
    block_tables  [rows, max_blocks] int32                    blocks of each sequence, in order
    k_cache, v_cache  [num_blocks, block_size, kv_heads, head_dim]   block_size a power of two >= 16; new k, v written
    o             [rows, heads * head_dim]                    the result; zeros in padding rows, which write no cache

Per row what `qk_norm_rope_cache` and `paged_attention` do one after the other: norm and rotate q and k, put k and v at
`positions` into the cache, o = softmax(scale q K^T) V over all positions up to it. Sums are kept in float32.

Fused: three launches and more into one. Saved: the write and read of q, k and v between them, the read of the new k
and v from the cache, and the launch that merges the splits' parts.

A captured graph is bound to the longest context, most contexts are far shorter; so the number of splits of a context
follows from shapes, and each row's own length is parted on the device; splits without a key return at once. A context
of one piece is written straight to the output; of several, the program that comes last merges them.

Three ways (`Launch.dot`, `Launch.fragments` in kernels/decode_attention_launch.py), each in a module of its own:
- _decode_attention_stream.py, for many rows: tile after tile through shared memory and tensor cores.
- _decode_attention_registers.py, for few rows: keys and values in registers before the wait, sums in float32.
- _decode_attention_fragments.py, for some: the same on tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._checks import check_integers, check_like, check_qkv
from kernels._decode_attention_fragments import from_fragments
from kernels._decode_attention_heads import places_of
from kernels._decode_attention_registers import from_registers
from kernels._decode_attention_stream import from_stream
from kernels._dependent import can_depend, let_next_start
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import runs_triton, tl, triton
from kernels.decode_attention_launch import (
    MAX_SPLITS,
    PART_ROWS,
    Launch,
    best_launch,
    block_d,
    block_g,
    keys_at_once,
)
from kernels.paged_attention import LOG2_E
from kernels.paged_attention import reference as attention_reference
from kernels.paged_attention import saved_bytes as attention_saved_bytes
from kernels.qk_norm_rope_cache import reference as rope_reference
from kernels.qk_norm_rope_cache import saved_bytes as rope_saved_bytes


@dataclass(frozen=True)
class Workspace:
    """Where the splits of one launch leave their parts. Launches that share it must run one after the other.

    parts: [rows * splits, heads, head_dim] float32, each split's own result; lse: [rows * splits, heads], log2 of its
    sum of exponentials; counters: [rows * heads * 2] int32, splits that are done. They are zero between launches.
    """

    parts: Tensor
    lse: Tensor
    counters: Tensor


def workspace(rows: int, heads: int, head_dim: int, device: torch.device) -> Workspace:
    """A workspace for every launch of up to `rows` rows: at most PART_ROWS * heads * (head_dim + 2) * 4 bytes."""
    parts = min(rows * MAX_SPLITS, PART_ROWS)
    return Workspace(
        torch.empty((parts, heads, head_dim), dtype=torch.float32, device=device),
        torch.empty((parts, heads), dtype=torch.float32, device=device),
        torch.zeros(min(rows, PART_ROWS) * heads * 2, dtype=torch.int32, device=device),
    )


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    block_tables: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int, head_dim: int,
    eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, computed in float32."""
    rows, block_size = qkv.shape[0], k_cache.shape[1]
    real = positions >= 0
    place = positions.clamp_min(0).long()
    block = torch.where(real, block_tables.gather(1, (place // block_size).unsqueeze(1)).squeeze(1), 0)
    slots = torch.where(real, block * block_size + place % block_size, -1)
    q = rope_reference(qkv, q_weight, k_weight, cos_sin, place, slots, k_cache, v_cache, heads, kv_heads, head_dim, eps)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=qkv.device)
    o = attention_reference(q, k_cache, v_cache, block_tables, starts, positions + 1, 1, scale)  # type: ignore[arg-type]
    return o.view(rows, heads * head_dim)


@triton.jit(do_not_specialize=["max_blocks"])
def decode_attention_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, o, parts, part_lse, counters,
    max_blocks, eps, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, PIECE: tl.constexpr, DOT: tl.constexpr, DEPENDENT: tl.constexpr, OWN: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    STAGES: tl.constexpr, FRAGMENTS: tl.constexpr, WARPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One row, OWN query heads that share a key/value head, and one split; without DOT one half of the values.

    Grid (programs of a row and split, rows, SPLITS).
    """
    HALVES: tl.constexpr = FRAGMENTS if FRAGMENTS else 1 if DOT else 2
    PER_KV: tl.constexpr = HEADS // KV_HEADS // OWN
    WIDTH: tl.constexpr = HEAD_DIM // HALVES
    # Fragments of values are 64 columns wide.
    BLOCK_W: tl.constexpr = 64 if FRAGMENTS and BLOCK_D // HALVES < 64 else BLOCK_D // HALVES
    let_next_start(DEPENDENT)
    index = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    half = index % HALVES
    first_head = index // HALVES * OWN
    kv_head = index // HALVES // PER_KV
    table = block_tables + row * max_blocks
    last = max_blocks - 1
    n = tl.arange(0, BLOCK_N)[:, None]

    # Written before this graph's chain began, and so read before the wait: positions, tables, and the earlier cache.
    position = tl.load(positions + row).to(tl.int32)
    cached = tl.maximum(position, 0)
    if DOT and not FRAGMENTS:
        piece = tl.maximum(tl.cdiv(tl.cdiv(cached, SPLITS), BLOCK_N) * BLOCK_N, PIECE)
        active = tl.maximum(tl.cdiv(cached, piece), 1)
    else:
        places = places_of(table, last, split * BLOCK_N, n, BLOCK_SIZE, BLOCK_N)  # waits for no position
        active = tl.minimum(tl.maximum(tl.cdiv(cached, BLOCK_N), 1), SPLITS)
    if split >= active:
        return
    newest = split == active - 1  # its program adds the new token
    real = position >= 0
    writes_new = newest & real & (first_head % (PER_KV * OWN) == 0)
    new_block = tl.load(table + cached // BLOCK_SIZE).to(tl.int64)
    new_place = (new_block * BLOCK_SIZE + cached % BLOCK_SIZE) * (KV_HEADS * HEAD_DIM)
    token = qkv + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angle = cos_sin + cached.to(tl.int64) * HEAD_DIM
    k_head = k_cache + kv_head * HEAD_DIM
    v_head = v_cache + kv_head * HEAD_DIM
    if FRAGMENTS:
        total, norm, peak = from_fragments(
            token, q_weight, k_weight, angle, table, last, k_head, v_head, places, split * BLOCK_N, cached,
            SPLITS * BLOCK_N, new_place, newest, writes_new, kv_head, half, eps, scale_log2,
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DEPENDENT, BLOCK_G, BLOCK_N, BLOCK_D, BLOCK_W, HALVES, WARPS,
        )  # fmt: skip
    elif DOT:
        begin = split * piece
        total, norm, peak = from_stream(
            token, q_weight, k_weight, angle, table, last, k_head, v_head, begin, tl.minimum(begin + piece, cached),
            new_place, newest, writes_new, kv_head, eps, scale_log2,
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DEPENDENT, BLOCK_G, BLOCK_N, BLOCK_D, STAGES, HELD,
        )  # fmt: skip
    else:
        total, norm, peak = from_registers(
            token, q_weight, k_weight, angle, table, last, k_head, v_head, places, split * BLOCK_N, cached,
            SPLITS * BLOCK_N, new_place, newest, writes_new, kv_head, first_head, half, eps, scale_log2,
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DEPENDENT, OWN, BLOCK_G, BLOCK_N, BLOCK_W, SLOTS,
        )  # fmt: skip
    result = tl.where(real, total / norm[:, None], 0.0)

    g = tl.arange(0, result.shape[0])[:, None]
    d = tl.arange(0, BLOCK_W)[None, :]
    in_result = (g < OWN) & (d < WIDTH)
    first = o + (row * HEADS + first_head) * HEAD_DIM + half * WIDTH
    if SPLITS == 1:  # noqa: SIM114 (known to the compiler, as `active` is not)
        tl.store(first + g * HEAD_DIM + d, result.to(o.dtype.element_ty), mask=in_result)
    elif active == 1:
        tl.store(first + g * HEAD_DIM + d, result.to(o.dtype.element_ty), mask=in_result)
    else:
        first_part = row * (SPLITS * HEADS) + first_head
        own_part = first_part + split * HEADS + g
        parts += half * WIDTH
        tl.store(parts + own_part * HEAD_DIM + d, result, mask=in_result)
        # Both halves' programs find, and store, the same sums.
        tl.store(part_lse + own_part, (peak + tl.log2(norm))[:, None], mask=g < OWN)
        # All threads' stores come before the barrier, the barrier before the one thread's addition. That releases them,
        # since release is cumulative; the program that comes last acquires them by its own addition, whose result all
        # of its threads wait for. The loads go to L2 (.cg), where the parts are, past older lines of an L1.
        tl.debug_barrier()
        counter = counters + row * (KV_HEADS * PER_KV * HALVES) + index
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == active - 1:
            # Nobody else counts in this launch any more, and the next one that does waits for this one's end.
            tl.store(counter, 0)
            part_split = tl.arange(0, SPLITS)[:, None, None]
            part_g = tl.arange(0, BLOCK_G)[None, :, None]
            part_d = tl.arange(0, BLOCK_W)[None, None, :]
            part = first_part + part_split * HEADS + part_g
            in_parts = (part_split < active) & (part_g < OWN)
            lse = tl.load(part_lse + part, mask=in_parts, other=0.0, cache_modifier=".cg")
            lse = tl.where(part_split < active, lse, float("-inf"))
            values = tl.load(
                parts + part * HEAD_DIM + part_d, mask=in_parts & (part_d < WIDTH), other=0.0, cache_modifier=".cg"
            )
            share = tl.exp2(lse - tl.max(lse, axis=0)[None, :, :])
            merged = tl.sum(values * share, axis=0) / tl.sum(share, axis=0)
            to_g = tl.arange(0, BLOCK_G)[:, None]
            tl.store(first + to_g * HEAD_DIM + d, merged.to(o.dtype.element_ty), mask=(to_g < OWN) & (d < WIDTH))


def _check(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    block_tables: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int, head_dim: int,
) -> None:  # fmt: skip
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, {kv_heads}, not {heads}.")
    check_qkv(qkv, q_weight, k_weight, cos_sin, positions, heads, kv_heads, head_dim)
    rows = qkv.shape[0]
    if k_cache.dim() != 4 or block_tables.dim() != 2:
        raise ValueError(
            "k_cache must be [num_blocks, block_size, kv_heads, head_dim] and block_tables [rows, max_blocks], "
            f"not {tuple(k_cache.shape)} and {tuple(block_tables.shape)}."
        )
    blocks, block_size = k_cache.shape[:2]
    if runs_triton(qkv) and (block_size < 16 or block_size & (block_size - 1)):
        raise ValueError(f"the cache's block size must be a power of two of at least 16, not {block_size}.")
    check_like("k_cache", k_cache, (blocks, block_size, kv_heads, head_dim), qkv)
    check_like("v_cache", v_cache, (blocks, block_size, kv_heads, head_dim), qkv)
    check_integers("block_tables", block_tables, (rows, block_tables.shape[1]), qkv)


def _check_workspace(workspace: Workspace, launch: Launch, rows: int, heads: int, head_dim: int) -> None:
    """Launches of one split do not use it."""
    parts = workspace.parts
    if launch.splits > 1 and (parts.shape[0] < rows * launch.splits or parts.shape[1:] != (heads, head_dim)):
        raise ValueError(
            f"the workspace holds {parts.shape[0]} parts of {tuple(parts.shape[1:])}; {rows} rows in {launch.splits} "
            f"splits need {rows * launch.splits} of {(heads, head_dim)}."
        )


def decode_attention(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    block_tables: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int, head_dim: int,
    eps: float, scale: float, *, workspace: Workspace, dependent: bool = False, launch: Launch | None = None,
    max_context: int | None = None,
) -> Tensor:  # fmt: skip
    """Norm, rotate, cache and attend each row's new token: o [rows, heads * head_dim]; shapes as in the module's text.

    `workspace` comes from the function of that name. With `dependent` the kernel starts while the one before it in the
    stream still runs, where the GPU can do so, and reads positions, tables and the cache at once: then nothing before
    it since the last ordinary launch may write those, the new tokens' places in the cache excepted. `max_context`
    bounds the contexts in tokens (default: what the tables hold) and only guides the choice of a launch. ValueError
    if the arguments do not fit; positions and blocks, which lie on the device, are not checked.
    """
    _check(qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, heads, kv_heads, head_dim)
    if not runs_triton(qkv):
        return reference(
            qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, heads, kv_heads, head_dim,
            eps, scale,
        )  # fmt: skip
    rows, block_size, max_blocks = qkv.shape[0], k_cache.shape[1], block_tables.shape[1]
    o = empty_rows(rows, heads * head_dim, qkv)
    if rows == 0:
        return o
    if launch is None:
        longest = max_context or max_blocks * block_size
        launch = best_launch(rows, heads, kv_heads, head_dim, longest, qkv.element_size(), qkv.device)
    _check_workspace(workspace, launch, rows, heads, head_dim)
    depends = dependent and can_depend(qkv.device)
    own = launch.heads or heads // kv_heads
    if (heads // kv_heads) % own:
        raise ValueError(f"a launch's heads must divide the {heads // kv_heads} of a group, not {own}.")
    parts = launch.fragments or (1 if launch.dot else 2)
    slots = min(launch.block_n, keys_at_once(launch.num_warps, head_dim, qkv.element_size()))
    decode_attention_kernel[(heads // own * parts, rows, launch.splits)](
        qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, o,
        workspace.parts, workspace.lse, workspace.counters, max_blocks, eps, scale * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        SPLITS=launch.splits, PIECE=launch.piece, DOT=launch.dot, DEPENDENT=depends, OWN=own,
        BLOCK_G=block_g(own), BLOCK_N=launch.block_n, BLOCK_D=block_d(head_dim), SLOTS=slots,
        STAGES=launch.num_stages,
        FRAGMENTS=launch.fragments, WARPS=launch.num_warps,
        HELD=launch.held,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **({"launch_pdl": True} if depends else {}),
        **({"maxnreg": launch.registers} if launch.registers else {}),
    )  # fmt: skip
    return o


def saved_bytes(
    rows: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, norm: bool = True
) -> int:
    """What `qk_norm_rope_cache` and `paged_attention` save, and between them q, the new k and v through memory."""
    between = 2 * rows * (num_heads + num_kv_heads) * head_dim * element_bytes
    apart = rope_saved_bytes(rows, num_heads, num_kv_heads, head_dim, element_bytes, norm)
    return between + apart + rows * attention_saved_bytes(1, context, num_heads, num_kv_heads, head_dim, element_bytes)


FUSION = Fusion(
    "decode_attention",
    ("qk_norm+rope+kv_write+attention", "rope+kv_write+attention"),
    decode_attention,
    reference,
    saved_bytes,
)
