"""QK-norm, rotary embedding, cache write and causal attention of short prompts, in one kernel.

    qkv           [tokens, (heads + 2 * kv_heads) * head_dim]   q heads, k heads, v heads; float32, float16, bfloat16
    q_weight, k_weight   [head_dim] or None                     gammas of the norms of q and k heads; both or neither
    cos_sin       [max_pos, head_dim] float32                   cosines of head_dim / 2 angles, then their sines
    positions     [tokens] int32 (or int64)                     each token's position, below max_pos
    slot_mapping  [tokens] int32 (or int64)                     block * block_size + offset; -1: do not write
    k_cache, v_cache   [num_blocks, block_size, kv_heads, head_dim]   written in place, each slot at most once
    o             [tokens, heads * head_dim]                    the result

The tokens are whole sequences end to end, nothing of them in the cache before: a row's sequence starts as many rows
before it as its position says, and its keys are the rows from there to itself. Rows of padding have position 0, so that
each sees itself and gives finite values. Norm and rotation as in `qk_norm_rope_cache`, rounded to the dtype after them;
score, softmax and sums are float32.

Fused: all between the projections. A program takes a few rows of the query heads that share a kv head, and norms and
rotates their keys again in each program: little work while prompts are short, for which two launches, a read and a
write of everything are saved.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels._checks import check_cache_write, check_qkv
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import HAVE_TRITON, runs_triton, tl, triton
from kernels.causal_attention import reference as causal_attention_reference
from kernels.qk_norm_rope_cache import reference as qk_norm_rope_cache_reference
from kernels.qk_norm_rope_cache import saved_bytes as rope_saved_bytes

LOG2_E = 1.4426950408889634
BLOCK_T, BLOCK_N = 16, 64
"""Tokens of a program, and keys that it takes at a time."""
WARPS = 8
SHARED_BYTES = 400, 16
"""Of shared memory a program takes at most, for each byte of a head: so much, and so much more for each query head of
a group. From compiling for sm_80 to sm_90 with groups of 2 to 8 and heads of 128 and 256."""


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, computed in float32."""
    q, k, v = qk_norm_rope_cache_reference(
        qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, num_kv_heads, head_dim,
        eps, return_kv=True,
    )  # fmt: skip
    return causal_attention_reference(q, k, v, positions, scale).flatten(1)


@triton.jit
def _rotated(source, weight, d, cos, sin, mask, eps, HALF: tl.constexpr):
    """Both halves [rows, HALF] of heads at `source`, normed and rotated, in the dtype that they have there."""
    raw_a = tl.load(source, mask=mask, other=0.0)
    raw_b = tl.load(source + HALF, mask=mask, other=0.0)
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)
    if weight is not None:
        gamma_a = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
        gamma_b = tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)
        a = a * scale[:, None] * gamma_a[None, :]
        b = b * scale[:, None] * gamma_b[None, :]
    return (a * cos - b * sin).to(raw_a.dtype), (b * cos + a * sin).to(raw_a.dtype)


@triton.jit
def _angles(cos_sin, positions, row, d, mask, HALF: tl.constexpr):
    angle = cos_sin + tl.load(positions + row, mask=mask, other=0).to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
    inside = mask[:, None] & (d < HALF)[None, :]
    return tl.load(angle, mask=inside, other=0.0), tl.load(angle + HALF, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def prefill_attention_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, o, tokens, eps, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one kv head and its query heads, of which GROUP rows each are made (a power of two)."""
    let_next_start(DEPENDENT)
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    kv_head = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_T
    d = tl.arange(0, BLOCK_HALF)
    in_half = d < HALF

    # Queries: the heads of one token side by side.
    m = tl.arange(0, GROUP * BLOCK_T)
    row = first_row + m // GROUP
    head = kv_head * (HEADS // KV_HEADS) + m % GROUP
    in_rows = row < tokens
    is_head = in_rows & (m % GROUP < HEADS // KV_HEADS)
    position = tl.load(positions + row, mask=in_rows, other=0).to(tl.int32)
    start = row - position
    q_cos, q_sin = _angles(cos_sin, positions, row, d, in_rows, HALF)
    own = first_row + tl.arange(0, BLOCK_T)
    own_cos, own_sin = _angles(cos_sin, positions, own, d, own < tokens, HALF)
    slot = tl.load(slot_mapping + own, mask=own < tokens, other=-1).to(tl.int64)
    first_key = tl.min(tl.where(in_rows, start, tokens), axis=0)
    end = tl.minimum(first_row + BLOCK_T, tokens)

    wait_for_previous(DEPENDENT)
    q_mask = is_head[:, None] & in_half[None, :]
    q_source = qkv + row.to(tl.int64)[:, None] * WIDTH + (head * HEAD_DIM)[:, None] + d[None, :]
    q_a, q_b = _rotated(q_source, q_weight, d, q_cos, q_sin, q_mask, eps, HALF)

    # The program's own keys and values go to the cache.
    k_source = qkv + (HEADS + kv_head) * HEAD_DIM + d[None, :]
    own_source = k_source + own.to(tl.int64)[:, None] * WIDTH
    own_mask = (own < tokens)[:, None] & in_half[None, :]
    own_a, own_b = _rotated(own_source, k_weight, d, own_cos, own_sin, own_mask, eps, HALF)
    cached = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + d[None, :]
    written = (slot >= 0)[:, None] & in_half[None, :]
    tl.store(k_cache + cached, own_a, mask=written)
    tl.store(k_cache + cached + HALF, own_b, mask=written)
    own_values = own_source + KV_HEADS * HEAD_DIM
    tl.store(v_cache + cached, tl.load(own_values, mask=own_mask, other=0.0), mask=written)
    tl.store(v_cache + cached + HALF, tl.load(own_values + HALF, mask=own_mask, other=0.0), mask=written)

    top = tl.full([GROUP * BLOCK_T], -1e30, tl.float32)  # finite: a row may see nothing of a tile
    total = tl.zeros([GROUP * BLOCK_T], tl.float32)
    o_a = tl.zeros([GROUP * BLOCK_T, BLOCK_HALF], tl.float32)
    o_b = tl.zeros([GROUP * BLOCK_T, BLOCK_HALF], tl.float32)
    for tile in range(first_key, end, BLOCK_N):
        key = tile + tl.arange(0, BLOCK_N)
        mask = (key < end)[:, None] & in_half[None, :]
        source = k_source + key.to(tl.int64)[:, None] * WIDTH
        cos, sin = _angles(cos_sin, positions, key, d, key < end, HALF)
        k_a, k_b = _rotated(source, k_weight, d, cos, sin, mask, eps, HALF)
        v_a = tl.load(source + KV_HEADS * HEAD_DIM, mask=mask, other=0.0)
        v_b = tl.load(source + KV_HEADS * HEAD_DIM + HALF, mask=mask, other=0.0)
        scores = dot(q_a, tl.trans(k_a), tl.zeros([GROUP * BLOCK_T, BLOCK_N], tl.float32))
        scores = dot(q_b, tl.trans(k_b), scores) * scale
        seen = (key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(v_a.dtype)
        o_a = dot(weights, v_a, o_a * shrink[:, None])
        o_b = dot(weights, v_b, o_b * shrink[:, None])
        top = new_top

    total = tl.where(total > 0, total, 1.0)[:, None]  # rows beyond the last
    to_o = o + row.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + d[None, :]
    tl.store(to_o, (o_a / total).to(o.dtype.element_ty), mask=q_mask)
    tl.store(to_o + HALF, (o_b / total).to(o.dtype.element_ty), mask=q_mask)


def prefill_attention(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, scale: float, dependent: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of whole sequences [tokens, heads * head_dim] from their joint projection; shapes as in this module's
    docstring.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for, but
    positions, slots and the table must have been written before it started. ValueError if the arguments do not fit;
    positions and slots, which lie on the device, are not checked against their tables.
    """
    check_qkv(qkv, q_weight, k_weight, cos_sin, positions, num_heads, num_kv_heads, head_dim)
    tokens = qkv.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} kv heads cannot be shared evenly by {num_heads} query heads.")
    check_cache_write(slot_mapping, k_cache, v_cache, num_kv_heads, head_dim, qkv)
    if not runs_triton(qkv):
        return reference(
            qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, num_kv_heads,
            head_dim, eps, scale,
        )  # fmt: skip
    o = torch.empty((tokens, num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens > 0:
        depends = dependent and can_depend(qkv.device)
        prefill_attention_kernel[(-(-tokens // BLOCK_T), num_kv_heads)](
            qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, o, tokens, eps, scale * LOG2_E,
            HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            GROUP=1 << (num_heads // num_kv_heads - 1).bit_length(), BLOCK_T=BLOCK_T,
            BLOCK_N=BLOCK_N if qkv.element_size() == 2 else BLOCK_N // 2,
            BLOCK_HALF=max(16, 1 << (head_dim // 2 - 1).bit_length()), DEPENDENT=depends, num_warps=WARPS,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return o


def fits(num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, device: torch.device) -> bool:
    """Whether a program has room on this GPU: small ones have 99 KiB of shared memory, and large groups want more."""
    if device.type != "cuda" or not HAVE_TRITON:
        return True
    per_byte, per_head = SHARED_BYTES
    group = 1 << (num_heads // num_kv_heads - 1).bit_length()
    wanted = head_dim * element_bytes * (per_byte + per_head * group)
    return bool(wanted <= _shared_memory_bytes(device))


@lru_cache
def _shared_memory_bytes(device: torch.device) -> int:
    """The most that a program may have, as Triton sees it when it launches one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def saved_bytes(
    tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, norm: bool = True
) -> int:
    """What `qk_norm_rope_cache` saves, and the write and read of q and k between it and attention."""
    apart = rope_saved_bytes(tokens, num_heads, num_kv_heads, head_dim, element_bytes, norm)
    return apart + 2 * tokens * (num_heads + num_kv_heads) * head_dim * element_bytes


FUSION = Fusion(
    "prefill_attention", ("qk_norm+rope+kv_write+attention", "rope+kv_write+attention"), prefill_attention, reference,
    saved_bytes,
)  # fmt: skip
