"""decode_attention from fragments, for some rows.

The same on tensor cores. All query heads of a key/value head are in one program, so each key is loaded once (twice if
two programs share the values' columns); the 16 bytes that a thread loads are its part of the instruction's factor,
because columns of q and k are counted in the order in which they come. Warps take 8 keys in turn and have a softmax
each; through shared memory go q and, at the end, the warps' sums.
"""

from __future__ import annotations

from kernels._decode_attention_heads import load_head, pivot_of, places_of, rotated_halves
from kernels._dependent import wait_for_previous
from kernels._dot import dot
from kernels._triton import tl, triton


@triton.jit
def _sources(
    head, place, table, last, start, rest, n, d,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where columns d of the tile's keys n lie, of which `rest` exist; and the mask that goes with it.

    `place` is the first key's, for tiles that one block of the cache holds.
    """
    mask = n < rest
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (d < WIDTH)
    if BLOCK_SIZE % BLOCK_N == 0:
        return head + place * KV_STRIDE + (n * KV_STRIDE + d), mask
    else:
        return head + places_of(table, last, start, n, BLOCK_SIZE, BLOCK_N) * KV_STRIDE + d, mask


@triton.jit
def _load_key_fragments(
    k_head, place, table, last, start, end,
    HALF: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Both halves of KEYS keys for each warp, as columns of pieces of 16 bytes (of 2-byte elements).

    Pieces are numbered by 32 columns, then by 8 keys, warp, key, and 4 pieces of 32 columns: the warp's 32 threads get
    4 pieces of 8 keys each. Warps take 8 keys in turn.
    """
    piece = tl.arange(0, BLOCK_HALF // 8 * KEYS * WARPS)[:, None]
    n = piece // (32 * WARPS) % (KEYS // 8) * (8 * WARPS) + piece // 4 % (8 * WARPS)
    d = piece // (4 * KEYS * WARPS) * 32 + piece % 4 * 8 + tl.arange(0, 8)[None, :]
    source, mask = _sources(
        k_head, place, table, last, start, end - start, n, d, HALF, BLOCK_HALF, KV_STRIDE, BLOCK_SIZE, KEYS * WARPS
    )
    return tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)


@triton.jit
def _scores(q, k, KEYS: tl.constexpr, WARPS: tl.constexpr):
    """Half of the sums: q [WARPS, ROWS, columns] times pieces of keys, [WARPS, ROWS, KEYS], on tensor cores.

    The instruction wants 2 elements of each of 4 threads, then the next 2: so this is the order of the columns.
    """
    CHUNKS: tl.constexpr = q.shape[2] // 32
    q = tl.reshape(q, [WARPS, q.shape[1], CHUNKS, 4, 4, 2])
    q = tl.reshape(tl.permute(q, [0, 1, 2, 4, 3, 5]), [WARPS, q.shape[1], CHUNKS * 32])
    k = tl.reshape(k, [CHUNKS, KEYS // 8, WARPS, 8, 4, 4, 2])
    k = tl.reshape(tl.permute(k, [2, 0, 5, 4, 6, 1, 3]), [WARPS, CHUNKS * 32, KEYS])
    return dot(q, k, tl.zeros([WARPS, q.shape[1], KEYS], tl.float32))


@triton.jit
def _repeated(x, TIMES: tl.constexpr):
    """Rows of [WARPS, n, columns], all of them TIMES times."""
    x = tl.broadcast_to(tl.expand_dims(x, 1), [x.shape[0], TIMES, x.shape[1], x.shape[2]])
    return tl.reshape(x, [x.shape[0], TIMES * x.shape[2], x.shape[3]])


@triton.jit
def _load_value_fragments(
    v_head, place, table, last, start, end,
    WIDTH: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_W: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The values of `_load_key_fragments`'s keys: pieces by 64 columns, 8 keys, key of a pair, warp, column, pair."""
    piece = tl.arange(0, BLOCK_W // 8 * KEYS * WARPS)[:, None]
    n = piece // (64 * WARPS) % (KEYS // 8) * (8 * WARPS) + piece // 32 % WARPS * 8
    n += piece % 4 * 2 + piece // (32 * WARPS) % 2
    d = piece // (8 * KEYS * WARPS) * 64 + piece // 4 % 8 * 8 + tl.arange(0, 8)[None, :]
    source, mask = _sources(
        v_head, place, table, last, start, end - start, n, d, WIDTH, BLOCK_W, KV_STRIDE, BLOCK_SIZE, KEYS * WARPS
    )
    return tl.load(source, mask=mask, other=0.0)


@triton.jit
def _attend_fragments(
    q_low, q_high, low, high, v, rest, peak, norm, total, scale_log2, KEYS: tl.constexpr, WARPS: tl.constexpr
):
    """One tile, of which `rest` keys exist, into peak and norm [WARPS, heads] and total [WARPS, columns, heads].

    Without a total it starts at zero.
    """
    HEADS: tl.constexpr = peak.shape[1]
    n = tl.arange(0, KEYS)[None, None, :]
    n = n // 8 * (8 * WARPS) + n % 8 + tl.arange(0, WARPS)[:, None, None] * 8
    score = tl.fma(_scores(q_low, low, KEYS, WARPS), 1.0, _scores(q_high, high, KEYS, WARPS))
    if q_low.shape[1] > HEADS:
        score, _ = tl.split(tl.permute(tl.reshape(score, [WARPS, 2, HEADS, KEYS]), [0, 2, 3, 1]))
    score = tl.where(n < rest, score * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=2))
    pivot = pivot_of(new_peak)
    weight = tl.exp2(score - pivot[:, :, None])
    fade = tl.exp2(peak - pivot)
    norm = norm * fade + tl.sum(weight, axis=2)
    COLUMNS: tl.constexpr = v.shape[0] * 8 // (KEYS * WARPS)
    weight = tl.permute(weight.to(v.dtype), [0, 2, 1])
    v = tl.reshape(v, [COLUMNS // 64, KEYS // 8, 2, WARPS, 8, 4, 8])
    v = tl.reshape(tl.permute(v, [3, 0, 6, 4, 1, 5, 2]), [WARPS, COLUMNS, KEYS])
    if total is None:
        total = tl.zeros([WARPS, COLUMNS, HEADS], tl.float32)
    else:
        total = total * fade[:, None, :]
    return new_peak, norm, dot(v, weight, total)


@triton.jit
def _merge_peaks(peak, norm, other_peak, other_norm):
    """Two parts' largest scores and sums of exponentials as those of one."""
    merged = tl.maximum(peak, other_peak)
    pivot = pivot_of(merged)
    return merged, norm * tl.exp2(peak - pivot) + other_norm * tl.exp2(other_peak - pivot)


@triton.jit
def from_fragments(
    token, q_weight, k_weight, angle, table, last, k_head, v_head, place, begin, end, step, new_place, adds_new,
    writes_new, kv_head, half, eps, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr, HALVES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """All query heads of a key/value head, every `step` / BLOCK_N-th tile, one of HALVES of the values' columns.

    Total [G, BLOCK_W], norm and peak [G]. Keys and values are loaded into the places from which the tensor cores take
    them, the first tile before the wait. Each warp has its own keys and its own softmax, waits for no other one in the
    loop, and all are merged at the end. Scores are [16 query heads, keys], of which 8 heads are kept: these registers
    are the second factor of V^T P^T, [columns, 8 heads], as they are. Fewer heads are repeated.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = HEAD_DIM // HALVES
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    KEYS: tl.constexpr = BLOCK_N // WARPS
    BLOCK_HALF: tl.constexpr = BLOCK_D // 2 if BLOCK_D > 64 else 32
    ROWS: tl.constexpr = BLOCK_G if BLOCK_G > 16 else 16
    COLUMNS: tl.constexpr = BLOCK_G if BLOCK_G > 8 else 8
    REPEAT: tl.constexpr = COLUMNS // BLOCK_G
    v_head += half * WIDTH
    low, high = _load_key_fragments(
        k_head, place, table, last, begin, end, HALF, KV_STRIDE, BLOCK_SIZE, KEYS, BLOCK_HALF, WARPS
    )
    v = _load_value_fragments(
        v_head, place, table, last, begin, end, WIDTH, KV_STRIDE, BLOCK_SIZE, KEYS, BLOCK_W, WARPS
    )
    # Each warp norms and rotates the query and the new key for itself.
    g = tl.arange(0, WARPS * BLOCK_G)[:, None] % BLOCK_G
    d = tl.arange(0, BLOCK_HALF)[None, :]
    in_d = (g < GROUP) & (d < HALF)
    d = d + g * 0
    cos = load_head(angle + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    sin = load_head(angle + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    q_gamma_low = None
    q_gamma_high = None
    k_gamma_low = None
    k_gamma_high = None
    if q_weight is not None:
        q_gamma_low = load_head(q_weight + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        q_gamma_high = load_head(q_weight + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        k_gamma_low = load_head(k_weight + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        k_gamma_high = load_head(k_weight + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)

    wait_for_previous(DEPENDENT)
    q_head = token + (kv_head * GROUP + g) * HEAD_DIM + d
    new_head = token + (HEADS + kv_head) * HEAD_DIM
    w_d = tl.arange(0, BLOCK_W)
    q_low = load_head(q_head, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    q_high = load_head(q_head + HALF, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_low = load_head(new_head + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_high = load_head(new_head + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_v = tl.load(new_head + KV_STRIDE + half * WIDTH + w_d, mask=w_d < WIDTH, other=0.0)
    q_low, q_high = rotated_halves(q_low, q_high, q_gamma_low, q_gamma_high, cos, sin, eps, HEAD_DIM)
    new_low, new_high = rotated_halves(new_low, new_high, k_gamma_low, k_gamma_high, cos, sin, eps, HEAD_DIM)
    q_low = q_low.to(new_v.dtype)
    q_high = q_high.to(new_v.dtype)
    new_low = new_low.to(new_v.dtype)  # as the cache stores them
    new_high = new_high.to(new_v.dtype)
    written = writes_new & in_d & (tl.arange(0, WARPS * BLOCK_G)[:, None] == 0)
    stored_k = k_head + new_place + d
    tl.store(stored_k, tl.reshape(new_low, [WARPS * BLOCK_G, BLOCK_HALF]), mask=written & (half == 0))
    tl.store(stored_k + HALF, tl.reshape(new_high, [WARPS * BLOCK_G, BLOCK_HALF]), mask=written & (half == HALVES - 1))
    tl.store(v_head + new_place + w_d, new_v, mask=writes_new & (w_d < WIDTH))

    # The softmax starts with the new token, from registers, in the first warp: nobody waits for its write to the cache.
    new_score = q_low.to(tl.float32) * new_low.to(tl.float32) + q_high.to(tl.float32) * new_high.to(tl.float32)
    new_score = tl.sum(new_score, axis=2) * scale_log2
    new_score = tl.where(adds_new & (tl.arange(0, WARPS)[:, None] == 0), new_score, float("-inf"))
    peak = tl.reshape(tl.broadcast_to(new_score[:, None, :], [WARPS, REPEAT, BLOCK_G]), [WARPS, COLUMNS])
    norm = tl.where(peak == float("-inf"), 0.0, 1.0)
    q_low = _repeated(q_low, ROWS // BLOCK_G)
    q_high = _repeated(q_high, ROWS // BLOCK_G)
    peak, norm, total = _attend_fragments(
        q_low, q_high, low, high, v, end - begin, peak, norm, None, scale_log2, KEYS, WARPS
    )
    for start in tl.range(begin + step, end, step, num_stages=1):
        next_place = places_of(table, last, start, 0, BLOCK_SIZE, BLOCK_N)
        low, high = _load_key_fragments(
            k_head, next_place, table, last, start, end, HALF, KV_STRIDE, BLOCK_SIZE, KEYS, BLOCK_HALF, WARPS
        )
        v = _load_value_fragments(
            v_head, next_place, table, last, start, end, WIDTH, KV_STRIDE, BLOCK_SIZE, KEYS, BLOCK_W, WARPS
        )
        peak, norm, total = _attend_fragments(
            q_low, q_high, low, high, v, end - start, peak, norm, total, scale_log2, KEYS, WARPS
        )
    # Of the repeated heads each keeps another share of the columns that its thread holds: [WARPS, G, BLOCK_W].
    total = tl.reshape(total, [WARPS, BLOCK_W // 64, REPEAT, 8 // REPEAT, 8, REPEAT, BLOCK_G])
    share = tl.arange(0, REPEAT)[None, None, :, None, None, None, None]
    repeat = tl.arange(0, REPEAT)[None, None, None, None, None, :, None]
    total = tl.sum(tl.where(share == repeat, total, 0.0), axis=2)
    total = tl.reshape(tl.permute(total, [0, 5, 1, 3, 4, 2]), [WARPS, BLOCK_G, BLOCK_W])
    warp_peak = tl.max(tl.reshape(peak, [WARPS, REPEAT, BLOCK_G]), axis=1)
    norm = tl.max(tl.reshape(norm, [WARPS, REPEAT, BLOCK_G]), axis=1)
    peak, norm = tl.reduce((warp_peak, norm), 0, _merge_peaks)
    pivot = pivot_of(peak)[None, :]
    total = total * tl.exp2(warp_peak - pivot)[:, :, None]
    total += tl.exp2(new_score - pivot)[:, :, None] * new_v.to(tl.float32)[None, None, :]
    return tl.sum(total, axis=0), norm, peak
