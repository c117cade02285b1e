"""decode_attention from a stream, for many rows.

A program takes one row, one key/value head with all its query heads, and one piece of at least `Launch.piece` keys,
tile after tile through shared memory and tensor cores, whose tiles have 16 rows however few the query heads are. The
first tile may come into registers before the wait (`Launch.held`).
"""

from __future__ import annotations

from kernels._decode_attention_heads import pivot_of, places_of, rotated
from kernels._dependent import wait_for_previous
from kernels._dot import dot
from kernels._triton import tl, triton


@triton.jit
def _attend_tile(q, k, v, rest, peak, norm, total, scale_log2, BLOCK_N: tl.constexpr):
    """A tile of keys [BLOCK_N, D], of which `rest` exist, and values [D, BLOCK_N] into peak, norm [M] and total [D, M].

    q is [D, M].
    """
    score = dot(k, q, tl.zeros([BLOCK_N, q.shape[1]], tl.float32))
    score = tl.where(tl.arange(0, BLOCK_N)[:, None] < rest, score * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=0))
    pivot = pivot_of(new_peak)
    weight = tl.exp2(score - pivot[None, :])
    fade = tl.exp2(peak - pivot)
    return new_peak, norm * fade + tl.sum(weight, axis=0), dot(v, weight.to(v.dtype), total * fade[None, :])


@triton.jit
def _load_tile(
    k_head, v_head, table, last, start, rest,
    HEAD_DIM: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N, D] from `start` on, of which `rest` exist, and their values [D, BLOCK_N]: as columns, for the
    second product."""
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    v_n = tl.arange(0, BLOCK_N)[None, :]
    v_d = tl.arange(0, BLOCK_D)[:, None]
    within = n * KV_STRIDE + d if BLOCK_SIZE % BLOCK_N == 0 else d
    v_within = v_n * KV_STRIDE + v_d if BLOCK_SIZE % BLOCK_N == 0 else v_d
    places = places_of(table, last, start, n, BLOCK_SIZE, BLOCK_N)
    v_places = places_of(table, last, start, v_n, BLOCK_SIZE, BLOCK_N)
    k = tl.load(k_head + places * KV_STRIDE + within, mask=(n < rest) & (d < HEAD_DIM), other=0.0)
    v = tl.load(v_head + v_places * KV_STRIDE + v_within, mask=(v_n < rest) & (v_d < HEAD_DIM), other=0.0)
    return k, v


@triton.jit
def from_stream(
    token, q_weight, k_weight, angle, table, last, k_head, v_head, begin, end, new_place, adds_new, writes_new,
    kv_head, eps, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Keys begin to end of one key/value head, tile after tile, on tensor cores: total [M, D], norm and peak [M].

    With HELD the first tile is in registers before the wait.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    d = tl.arange(0, BLOCK_D)[None, :]
    in_d = d < HEAD_DIM
    other = tl.where(d < HALF, d + HALF, d - HALF)
    column = tl.where(d < HALF, d, d - HALF)
    cos = tl.load(angle + column, mask=in_d, other=0.0)
    sin = tl.load(angle + HALF + column, mask=in_d, other=0.0)
    sin = tl.where(d < HALF, -sin, sin)
    q_gamma = None
    q_gamma_other = None
    k_gamma = None
    k_gamma_other = None
    if q_weight is not None:
        q_gamma = tl.load(q_weight + d, mask=in_d, other=0.0)
        q_gamma_other = tl.load(q_weight + other, mask=in_d, other=0.0)
        k_gamma = tl.load(k_weight + d, mask=in_d, other=0.0)
        k_gamma_other = tl.load(k_weight + other, mask=in_d, other=0.0)
    if HELD:
        k, v = _load_tile(
            k_head, v_head, table, last, begin, end - begin, HEAD_DIM, KV_STRIDE, BLOCK_SIZE, BLOCK_N, BLOCK_D
        )

    wait_for_previous(DEPENDENT)
    g = tl.arange(0, BLOCK_G)[:, None]
    q_head = token + (kv_head * GROUP + g) * HEAD_DIM
    new_head = token + (HEADS + kv_head) * HEAD_DIM
    in_q = (g < GROUP) & in_d
    q = tl.load(q_head + d, mask=in_q, other=0.0)
    q_other = tl.load(q_head + other, mask=in_q, other=0.0)
    new_k = tl.load(new_head + d, mask=in_d, other=0.0)
    k_other = tl.load(new_head + other, mask=in_d, other=0.0)
    new_v = tl.load(new_head + KV_HEADS * HEAD_DIM + d, mask=in_d, other=0.0)
    q = rotated(q, q_other, q_gamma, q_gamma_other, cos, sin, eps, HEAD_DIM)
    new_k = rotated(new_k, k_other, k_gamma, k_gamma_other, cos, sin, eps, HEAD_DIM)
    tl.store(k_head + new_place + d, new_k.to(new_v.dtype), mask=in_d & writes_new)
    tl.store(v_head + new_place + d, new_v, mask=in_d & writes_new)

    # The softmax starts with the new token, from registers: nobody waits for its write to the cache.
    peak = tl.where(adds_new, tl.sum(q * new_k, axis=1) * scale_log2, float("-inf"))
    norm = tl.where(adds_new, 1.0, tl.zeros_like(peak))
    total = norm[:, None] * new_v.to(tl.float32)
    # The query heads are the columns of both products: the instruction takes columns by 8, but rows by 16.
    COLUMNS: tl.constexpr = BLOCK_G if BLOCK_G > 8 else 8  # fewer heads are repeated
    REPEAT: tl.constexpr = COLUMNS // BLOCK_G
    q = tl.reshape(tl.broadcast_to(q[None, :, :], [REPEAT, BLOCK_G, BLOCK_D]), [COLUMNS, BLOCK_D])
    q = tl.trans(q.to(new_v.dtype))
    total = tl.reshape(tl.broadcast_to(total[None, :, :], [REPEAT, BLOCK_G, BLOCK_D]), [COLUMNS, BLOCK_D])
    total = tl.trans(total)
    norm = tl.reshape(tl.broadcast_to(norm[None, :], [REPEAT, BLOCK_G]), [COLUMNS])
    peak = tl.reshape(tl.broadcast_to(peak[None, :], [REPEAT, BLOCK_G]), [COLUMNS])

    start = begin
    if HELD:
        peak, norm, total = _attend_tile(q, k, v, end - begin, peak, norm, total, scale_log2, BLOCK_N)
        start = begin + BLOCK_N
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        k, v = _load_tile(
            k_head, v_head, table, last, first, end - first, HEAD_DIM, KV_STRIDE, BLOCK_SIZE, BLOCK_N, BLOCK_D
        )
        peak, norm, total = _attend_tile(q, k, v, end - first, peak, norm, total, scale_log2, BLOCK_N)
    return tl.trans(total), norm, peak
