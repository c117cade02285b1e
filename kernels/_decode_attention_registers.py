"""decode_attention from registers, for few rows, where latencies count.

A program holds a whole tile of keys, and one half of its values' columns, in registers before the wait; two programs do
the same scores for two halves of the output, and none of them needs the other. Products are sums in float32, which need
no exchange between threads but that of the scores. Keys are spread over SLOTS groups of threads; each slot has a
softmax of its own, merged with the others' at the end. Of SPLITS programs each takes every SPLITS-th tile: its first
one is found without the context's length.
"""

from __future__ import annotations

from kernels._decode_attention_heads import load_head, pivot_of, places_of, rotated_halves
from kernels._dependent import wait_for_previous
from kernels._triton import tl, triton


@triton.jit
def _load_tile(
    k_head, v_head, places, n, rest,
    HALF: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of `rest` keys, and the half of their values that starts at `v_head`: [BLOCK_N, D / 2] each."""
    d = tl.arange(0, BLOCK_HALF)[None, :]
    within = places * KV_STRIDE + (n * KV_STRIDE + d if BLOCK_SIZE % BLOCK_N == 0 else d)
    mask = (n < rest) & (d < HALF)
    low = tl.load(k_head + within, mask=mask, other=0.0)
    high = tl.load(k_head + HALF + within, mask=mask, other=0.0)
    return low, high, tl.load(v_head + within, mask=mask, other=0.0)


@triton.jit
def from_registers(
    token, q_weight, k_weight, angle, table, last, k_head, v_head, places, begin, end, step, new_place, adds_new,
    writes_new, kv_head, first_head, half, eps, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr, OWN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """OWN query heads, every `step` / BLOCK_N-th tile, half of the values: total [G, D / 2], norm and peak [G].

    The first tile is loaded before the wait. Keys are spread over SLOTS groups of threads; each has a softmax of its
    own, and holds what all of them need (the query, the new key) itself: no thread waits for another one until the
    slots are merged.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    WAVES: tl.constexpr = BLOCK_N // SLOTS
    n = tl.arange(0, BLOCK_N)[:, None]
    v_head += half * HALF
    low, high, v = _load_tile(k_head, v_head, places, n, end - begin, HALF, KV_STRIDE, BLOCK_SIZE, BLOCK_N, BLOCK_HALF)
    # What every slot holds, as one row for each of them.
    d = tl.zeros([SLOTS, 1], tl.int32) + tl.arange(0, BLOCK_HALF)[None, :]
    in_d = d < HALF
    cos = load_head(angle + d, in_d, 1, SLOTS, BLOCK_HALF)
    sin = load_head(angle + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)
    q_gamma_low = None
    q_gamma_high = None
    k_gamma_low = None
    k_gamma_high = None
    if q_weight is not None:
        q_gamma_low = load_head(q_weight + d, in_d, 1, SLOTS, BLOCK_HALF)
        q_gamma_high = load_head(q_weight + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)
        k_gamma_low = load_head(k_weight + d, in_d, 1, SLOTS, BLOCK_HALF)
        k_gamma_high = load_head(k_weight + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)

    wait_for_previous(DEPENDENT)
    g = tl.arange(0, BLOCK_G * SLOTS)[:, None] // SLOTS
    q_d = tl.arange(0, BLOCK_HALF)[None, :]
    q_head = token + (first_head + g) * HEAD_DIM + q_d
    in_q = (g < OWN) & (q_d < HALF)
    new_head = token + (HEADS + kv_head) * HEAD_DIM + d
    q_low = load_head(q_head, in_q, BLOCK_G, SLOTS, BLOCK_HALF)
    q_high = load_head(q_head + HALF, in_q, BLOCK_G, SLOTS, BLOCK_HALF)
    new_low = load_head(new_head, in_d, 1, SLOTS, BLOCK_HALF)
    new_high = load_head(new_head + HALF, in_d, 1, SLOTS, BLOCK_HALF)
    new_v = load_head(new_head + KV_HEADS * HEAD_DIM + half * HALF, in_d, 1, SLOTS, BLOCK_HALF)
    q_low, q_high = rotated_halves(q_low, q_high, q_gamma_low, q_gamma_high, cos, sin, eps, HEAD_DIM)
    new_low, new_high = rotated_halves(new_low, new_high, k_gamma_low, k_gamma_high, cos, sin, eps, HEAD_DIM)
    new_low = new_low.to(new_v.dtype)  # as the cache stores them
    new_high = new_high.to(new_v.dtype)

    # The softmax starts with the new token, from registers: nobody waits for its write to the cache.
    slot = tl.arange(0, SLOTS)
    adds_new = adds_new & (slot == 0)[None, :]
    peak = tl.sum(q_low * new_low.to(tl.float32) + q_high * new_high.to(tl.float32), axis=2) * scale_log2
    peak = tl.where(adds_new, peak, float("-inf"))
    norm = tl.where(adds_new, 1.0, tl.zeros_like(peak))
    total = norm[:, :, None] * new_v.to(tl.float32)
    written = writes_new & (slot == 0)[:, None] & in_d
    half_k = tl.reshape(tl.where(half == 0, new_low, new_high), [SLOTS, BLOCK_HALF])
    tl.store(k_head + half * HALF + new_place + d, half_k, mask=written)
    tl.store(v_head + new_place + d, tl.reshape(new_v, [SLOTS, BLOCK_HALF]), mask=written)

    q_low = tl.expand_dims(q_low, 1)
    q_high = tl.expand_dims(q_high, 1)
    wave_n = tl.arange(0, WAVES)[None, :, None] * SLOTS + slot[None, None, :]
    for start in tl.range(begin, end, step, num_stages=1):
        this_low = tl.reshape(low, [1, WAVES, SLOTS, BLOCK_HALF]).to(tl.float32)
        this_high = tl.reshape(high, [1, WAVES, SLOTS, BLOCK_HALF]).to(tl.float32)
        score = tl.sum(q_low * this_low + q_high * this_high, axis=3)
        score = tl.where(wave_n < end - start, score * scale_log2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        pivot = pivot_of(new_peak)
        weight = tl.exp2(score - pivot[:, None, :])
        fade = tl.exp2(peak - pivot)
        norm = norm * fade + tl.sum(weight, axis=1)
        this_v = tl.reshape(v, [1, WAVES, SLOTS, BLOCK_HALF]).to(tl.float32)
        total = total * fade[:, :, None] + tl.sum(weight[:, :, :, None] * this_v, axis=1)
        peak = new_peak
        if start + step < end:
            places = places_of(table, last, start + step, n, BLOCK_SIZE, BLOCK_N)
            low, high, v = _load_tile(
                k_head, v_head, places, n, end - start - step, HALF, KV_STRIDE, BLOCK_SIZE, BLOCK_N, BLOCK_HALF
            )
    slot_peak = peak
    peak = tl.max(slot_peak, axis=1)
    share = tl.exp2(slot_peak - pivot_of(peak)[:, None])
    return tl.sum(total * share[:, :, None], axis=1), tl.sum(norm * share, axis=1), peak
