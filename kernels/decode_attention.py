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

Three ways (`Launch.dot`, `Launch.fragments`):
- A stream, for many rows: a program takes one row, one key/value head with all its query heads, and one piece of at
  least `Launch.piece` keys, tile after tile through shared memory and tensor cores, whose tiles have 16 rows however
  few the query heads are. The first tile may come into registers before the wait (`Launch.held`).
- From registers, for few rows, where latencies count: a program holds a whole tile of keys, and one half of its
  values' columns, in registers before the wait; two programs do the same scores for two halves of the output, and none
  of them needs the other. Products are sums in float32, which need no exchange between threads but that of the scores.
  Keys are spread over SLOTS groups of threads; each slot has a softmax of its own, merged with the others' at the end.
  Of SPLITS programs each takes every SPLITS-th tile: its first one is found without the context's length.
- From fragments, for some rows: the same on tensor cores. All query heads of a key/value head are in one program, so
  each key is loaded once (twice if two programs share the values' columns); the 16 bytes that a thread loads are its
  part of the instruction's factor, because columns of q and k are counted in the order in which they come. Warps take 8
  keys in turn and have a softmax each; through shared memory go q and, at the end, the warps' sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._checks import check_integers, check_like, check_qkv
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton
from kernels.choices import chosen, launch_of
from kernels.paged_attention import LOG2_E
from kernels.paged_attention import reference as attention_reference
from kernels.paged_attention import saved_bytes as attention_saved_bytes
from kernels.qk_norm_rope_cache import reference as rope_reference
from kernels.qk_norm_rope_cache import saved_bytes as rope_saved_bytes

MAX_SPLITS = 32
PART_ROWS = 512
"""Rows times splits of a launch with more than one split: bounds the workspace."""
SPLIT_TOKENS = 256
"""Part a context into pieces of at least about so many keys: merging the parts costs more than it gains below."""
FULL_PROGRAMS = 256
"""Split until about so many programs run: a large GPU's multiprocessors have one or two each."""
REGISTER_ROWS = 4
"""Up to here launches without tensor cores are tried, in types of 2 bytes."""
STREAMS = (
    (64, 2, 3, True), (32, 1, 7, True), (64, 2, 5, True), (32, 1, 3, True), (32, 1, 5, False), (32, 1, 7, False),
    (64, 2, 3, False), (128, 4, 5, False),
)  # fmt: skip
"""block_n, num_warps, num_stages and held of streams worth measuring; the first two also for the fewest rows."""
MERGED_ELEMENTS = 64
"""Elements of all parts that a thread of the merging program holds in registers at most."""


@dataclass(frozen=True)
class Launch:
    """A launch configuration.

    block_n: keys of a tile, a power of two
    splits: programs that share a row's context, a power of two, up to MAX_SPLITS
    piece: least keys of a split, a multiple of block_n
    dot: products on tensor cores; else piece is block_n
    num_stages: of the dot's software pipeline, where the look-up of the block takes half: 5 keep two tiles under way
    fragments: with dot, K and V straight into the registers from which tensor cores take them, in 1 or 2 programs that
        share the values' columns; then piece is block_n, 16 keys or more for each warp. 0: through shared memory
    heads: without dot, query heads of a program, a divisor of the group; 0: all that share the key/value head
    registers: at most so many for each thread, 0: any number. Programs start before the wait only where they fit beside
        those of the kernel before
    held: a stream's first tile is loaded into registers before the wait, the others as ever
    """

    block_n: int
    splits: int
    piece: int
    num_warps: int
    dot: bool
    num_stages: int = 1
    fragments: int = 0
    heads: int = 0
    registers: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        for name in ("block_n", "splits"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}.")
        if self.splits > MAX_SPLITS:
            raise ValueError(f"splits must be at most {MAX_SPLITS}, not {self.splits}.")
        if self.piece < 1 or self.piece % self.block_n:
            raise ValueError(f"piece must be a multiple of block_n, {self.block_n}, not {self.piece}.")
        if (self.fragments or not self.dot) and self.piece != self.block_n:
            raise ValueError(f"without dot or with fragments, piece must be block_n, {self.block_n}, not {self.piece}.")
        if self.held and (self.fragments or not self.dot):
            raise ValueError("held is for a stream; the other ways hold their first tile as it is.")
        if self.dot and self.heads:
            raise ValueError("heads are for launches without dot.")
        if self.fragments not in (0, 1, 2) or (self.fragments and not self.dot):
            raise ValueError(f"fragments must be 1 or 2, and dot true, or 0, not {self.fragments}.")
        if self.fragments and self.block_n < 16 * self.num_warps:
            raise ValueError(f"fragments need 16 keys for each of {self.num_warps} warps, not {self.block_n} in all.")


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


@triton.jit
def _head(source, mask, COUNT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [COUNT * SLOTS, WIDTH] as [COUNT, SLOTS, WIDTH].

    Triton (3.6 and 3.7 differ) spreads the dimensions of a load over threads by its own rules; of two, as one wants it:
    16 bytes of a row for each thread, then whole rows, and rows that lie SLOTS apart in the same thread.
    """
    return tl.reshape(tl.load(source, mask=mask, other=0.0), [COUNT, SLOTS, WIDTH])


@triton.jit
def _rotated(x, partner, gamma, gamma_partner, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads [n, D]; float32, rounded as the cache stores it.

    An element of one half of a head turns with its `partner` in the other; `sin` bears the sign.
    """
    turned_x = x.to(tl.float32)
    turned_y = partner.to(tl.float32)
    if gamma is not None:
        scale = tl.rsqrt(tl.sum(turned_x * turned_x, axis=1) / HEAD_DIM + eps)[:, None]
        turned_x = turned_x * scale * gamma.to(tl.float32)
        turned_y = turned_y * scale * gamma_partner.to(tl.float32)
    return (turned_x * cos + turned_y * sin).to(x.dtype).to(tl.float32)


@triton.jit
def _rotated_halves(low, high, gamma_low, gamma_high, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads whose halves are apart, [n, SLOTS, D / 2] each; float32, not rounded."""
    x = low.to(tl.float32)
    y = high.to(tl.float32)
    if gamma_low is not None:
        scale = tl.expand_dims(tl.rsqrt(tl.sum(x * x + y * y, axis=2) / HEAD_DIM + eps), 2)
        x = x * scale * gamma_low.to(tl.float32)
        y = y * scale * gamma_high.to(tl.float32)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def _places(table, last, start, n, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile's keys start + n lie in the cache: of its first key where one block holds them all, else of each.

    The index into the table is bounded instead of masked by the length: the first look-up need not wait for the length.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        position = start
    else:
        position = start + n
    block = tl.load(table + tl.minimum(position // BLOCK_SIZE, last))
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _pivot(peak):
    """What to subtract before exp2: a peak of -inf (no key seen yet) would give NaN, 0 gives weights of 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _attend_tile(q, k, v, rest, peak, norm, total, scale_log2, BLOCK_N: tl.constexpr):
    """A tile of keys [BLOCK_N, D], of which `rest` exist, and values [D, BLOCK_N] into peak, norm [M] and total [D, M].

    q is [D, M].
    """
    score = dot(k, q, tl.zeros([BLOCK_N, q.shape[1]], tl.float32))
    score = tl.where(tl.arange(0, BLOCK_N)[:, None] < rest, score * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=0))
    pivot = _pivot(new_peak)
    weight = tl.exp2(score - pivot[None, :])
    fade = tl.exp2(peak - pivot)
    return new_peak, norm * fade + tl.sum(weight, axis=0), dot(v, weight.to(v.dtype), total * fade[None, :])


@triton.jit
def _from_stream(
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
    n = tl.arange(0, BLOCK_N)[:, None]
    within = n * KV_STRIDE + d if BLOCK_SIZE % BLOCK_N == 0 else d
    # Values are loaded as columns, for the second product.
    v_n = tl.arange(0, BLOCK_N)[None, :]
    v_d = tl.arange(0, BLOCK_D)[:, None]
    v_within = v_n * KV_STRIDE + v_d if BLOCK_SIZE % BLOCK_N == 0 else v_d
    if HELD:
        places = _places(table, last, begin, n, BLOCK_SIZE, BLOCK_N)
        v_places = _places(table, last, begin, v_n, BLOCK_SIZE, BLOCK_N)
        k = tl.load(k_head + places * KV_STRIDE + within, mask=(n < end - begin) & in_d, other=0.0)
        v = tl.load(v_head + v_places * KV_STRIDE + v_within, mask=(v_n < end - begin) & (v_d < HEAD_DIM), other=0.0)

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
    q = _rotated(q, q_other, q_gamma, q_gamma_other, cos, sin, eps, HEAD_DIM)
    new_k = _rotated(new_k, k_other, k_gamma, k_gamma_other, cos, sin, eps, HEAD_DIM)
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
        places = _places(table, last, first, n, BLOCK_SIZE, BLOCK_N)
        v_places = _places(table, last, first, v_n, BLOCK_SIZE, BLOCK_N)
        k = tl.load(k_head + places * KV_STRIDE + within, mask=(n < end - first) & in_d, other=0.0)
        v = tl.load(v_head + v_places * KV_STRIDE + v_within, mask=(v_n < end - first) & (v_d < HEAD_DIM), other=0.0)
        peak, norm, total = _attend_tile(q, k, v, end - first, peak, norm, total, scale_log2, BLOCK_N)
    return tl.trans(total), norm, peak


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
def _from_registers(
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
    cos = _head(angle + d, in_d, 1, SLOTS, BLOCK_HALF)
    sin = _head(angle + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)
    q_gamma_low = None
    q_gamma_high = None
    k_gamma_low = None
    k_gamma_high = None
    if q_weight is not None:
        q_gamma_low = _head(q_weight + d, in_d, 1, SLOTS, BLOCK_HALF)
        q_gamma_high = _head(q_weight + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)
        k_gamma_low = _head(k_weight + d, in_d, 1, SLOTS, BLOCK_HALF)
        k_gamma_high = _head(k_weight + HALF + d, in_d, 1, SLOTS, BLOCK_HALF)

    wait_for_previous(DEPENDENT)
    g = tl.arange(0, BLOCK_G * SLOTS)[:, None] // SLOTS
    q_d = tl.arange(0, BLOCK_HALF)[None, :]
    q_head = token + (first_head + g) * HEAD_DIM + q_d
    in_q = (g < OWN) & (q_d < HALF)
    new_head = token + (HEADS + kv_head) * HEAD_DIM + d
    q_low = _head(q_head, in_q, BLOCK_G, SLOTS, BLOCK_HALF)
    q_high = _head(q_head + HALF, in_q, BLOCK_G, SLOTS, BLOCK_HALF)
    new_low = _head(new_head, in_d, 1, SLOTS, BLOCK_HALF)
    new_high = _head(new_head + HALF, in_d, 1, SLOTS, BLOCK_HALF)
    new_v = _head(new_head + KV_HEADS * HEAD_DIM + half * HALF, in_d, 1, SLOTS, BLOCK_HALF)
    q_low, q_high = _rotated_halves(q_low, q_high, q_gamma_low, q_gamma_high, cos, sin, eps, HEAD_DIM)
    new_low, new_high = _rotated_halves(new_low, new_high, k_gamma_low, k_gamma_high, cos, sin, eps, HEAD_DIM)
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
        pivot = _pivot(new_peak)
        weight = tl.exp2(score - pivot[:, None, :])
        fade = tl.exp2(peak - pivot)
        norm = norm * fade + tl.sum(weight, axis=1)
        this_v = tl.reshape(v, [1, WAVES, SLOTS, BLOCK_HALF]).to(tl.float32)
        total = total * fade[:, :, None] + tl.sum(weight[:, :, :, None] * this_v, axis=1)
        peak = new_peak
        if start + step < end:
            places = _places(table, last, start + step, n, BLOCK_SIZE, BLOCK_N)
            low, high, v = _load_tile(
                k_head, v_head, places, n, end - start - step, HALF, KV_STRIDE, BLOCK_SIZE, BLOCK_N, BLOCK_HALF
            )
    slot_peak = peak
    peak = tl.max(slot_peak, axis=1)
    share = tl.exp2(slot_peak - _pivot(peak)[:, None])
    return tl.sum(total * share[:, :, None], axis=1), tl.sum(norm * share, axis=1), peak


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
    mask = n < end - start
    if HALF != BLOCK_HALF:
        mask = mask & (d < HALF)
    if BLOCK_SIZE % (KEYS * WARPS) == 0:
        source = k_head + place * KV_STRIDE + (n * KV_STRIDE + d)
    else:
        source = k_head + _places(table, last, start, n, BLOCK_SIZE, KEYS * WARPS) * KV_STRIDE + d
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
    mask = n < end - start
    if WIDTH != BLOCK_W:
        mask = mask & (d < WIDTH)
    if BLOCK_SIZE % (KEYS * WARPS) == 0:
        source = v_head + place * KV_STRIDE + (n * KV_STRIDE + d)
    else:
        source = v_head + _places(table, last, start, n, BLOCK_SIZE, KEYS * WARPS) * KV_STRIDE + d
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
    pivot = _pivot(new_peak)
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
    pivot = _pivot(merged)
    return merged, norm * tl.exp2(peak - pivot) + other_norm * tl.exp2(other_peak - pivot)


@triton.jit
def _from_fragments(
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
    cos = _head(angle + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    sin = _head(angle + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    q_gamma_low = None
    q_gamma_high = None
    k_gamma_low = None
    k_gamma_high = None
    if q_weight is not None:
        q_gamma_low = _head(q_weight + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        q_gamma_high = _head(q_weight + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        k_gamma_low = _head(k_weight + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
        k_gamma_high = _head(k_weight + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)

    wait_for_previous(DEPENDENT)
    q_head = token + (kv_head * GROUP + g) * HEAD_DIM + d
    new_head = token + (HEADS + kv_head) * HEAD_DIM
    w_d = tl.arange(0, BLOCK_W)
    q_low = _head(q_head, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    q_high = _head(q_head + HALF, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_low = _head(new_head + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_high = _head(new_head + HALF + d, in_d, WARPS, BLOCK_G, BLOCK_HALF)
    new_v = tl.load(new_head + KV_STRIDE + half * WIDTH + w_d, mask=w_d < WIDTH, other=0.0)
    q_low, q_high = _rotated_halves(q_low, q_high, q_gamma_low, q_gamma_high, cos, sin, eps, HEAD_DIM)
    new_low, new_high = _rotated_halves(new_low, new_high, k_gamma_low, k_gamma_high, cos, sin, eps, HEAD_DIM)
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
        next_place = _places(table, last, start, 0, BLOCK_SIZE, BLOCK_N)
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
    pivot = _pivot(peak)[None, :]
    total = total * tl.exp2(warp_peak - pivot)[:, :, None]
    total += tl.exp2(new_score - pivot)[:, :, None] * new_v.to(tl.float32)[None, None, :]
    return tl.sum(total, axis=0), norm, peak


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
        places = _places(table, last, split * BLOCK_N, n, BLOCK_SIZE, BLOCK_N)  # waits for no position
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
        total, norm, peak = _from_fragments(
            token, q_weight, k_weight, angle, table, last, k_head, v_head, places, split * BLOCK_N, cached,
            SPLITS * BLOCK_N, new_place, newest, writes_new, kv_head, half, eps, scale_log2,
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DEPENDENT, BLOCK_G, BLOCK_N, BLOCK_D, BLOCK_W, HALVES, WARPS,
        )  # fmt: skip
    elif DOT:
        begin = split * piece
        total, norm, peak = _from_stream(
            token, q_weight, k_weight, angle, table, last, k_head, v_head, begin, tl.minimum(begin + piece, cached),
            new_place, newest, writes_new, kv_head, eps, scale_log2,
            HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DEPENDENT, BLOCK_G, BLOCK_N, BLOCK_D, STAGES, HELD,
        )  # fmt: skip
    else:
        total, norm, peak = _from_registers(
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


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _block_g(group: int) -> int:
    return 1 << (group - 1).bit_length()


def _keys_at_once(num_warps: int, head_dim: int, element_bytes: int) -> int:
    """Of how many keys the program's threads load a half at once, 16 bytes each."""
    return max(1, 32 * num_warps * 16 // (_block_d(head_dim) // 2 * element_bytes))


def _split_choices(rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, num_warps: int) -> list[int]:
    """Numbers of splits that the workspace, the merging program's registers and the longest context allow."""
    merged = _block_g(heads // kv_heads) * _block_d(head_dim)
    limit = min(MAX_SPLITS, PART_ROWS // rows, MERGED_ELEMENTS * 32 * num_warps // merged, max_context // SPLIT_TOKENS)
    return [splits for splits in (1, 2, 4, 8, 16, 32) if splits <= max(limit, 1)]


def default_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> Launch:
    """A launch that runs anywhere and should not be far off, from shapes alone."""
    many, group = rows * kv_heads >= FULL_PROGRAMS, heads // kv_heads
    num_warps = 1 if many and element_bytes == 2 else 4 if many or (group > 4 and element_bytes == 2) else 8
    wanted = max(1, FULL_PROGRAMS // (rows * kv_heads))
    choices = _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)
    splits = max(number for number in choices if number <= wanted)
    if element_bytes == 2 and (many or group > 4):
        block_n = (32 if many else 64) // (2 if _block_d(head_dim) > 128 else 1)
        return Launch(block_n, splits, SPLIT_TOKENS, num_warps, True, 5)
    block_n = 4 * _keys_at_once(num_warps, head_dim, element_bytes)
    apart = group > 4 or 2 * rows * heads <= FULL_PROGRAMS
    return Launch(block_n, splits, block_n, num_warps, False, heads=1 if apart else 0)


def candidates(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> list[Launch]:
    """Launches worth measuring, the default among them."""
    found = [default_launch(rows, heads, kv_heads, head_dim, max_context, element_bytes)]

    def splits(num_warps: int) -> list[int]:
        return _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)

    group = heads // kv_heads
    together = 1 < group <= 4 and 4 * rows * heads > FULL_PROGRAMS
    owns: tuple[int, ...] = (1, 0) if together else (1,)
    if rows > REGISTER_ROWS and element_bytes == 2:
        owns = ()
    for own in owns:
        programs = 2 * rows * (heads if own else kv_heads)
        for waves, num_warps, registers in ((8, 8, 0), (8, 8, 128), (8, 4, 0), (4, 8, 0)):
            block_n = waves * _keys_at_once(num_warps, head_dim, element_bytes)
            for number in splits(num_warps):
                # Enough of them for long contexts, few enough to run at the same time.
                if FULL_PROGRAMS // 2 <= programs * number <= FULL_PROGRAMS:
                    found.append(Launch(block_n, number, block_n, num_warps, False, heads=own, registers=registers))
    if element_bytes != 2:
        return list(dict.fromkeys(found))

    for block_n, num_warps, parts, registers in ((256, 8, 2, 128), (256, 8, 1, 168), (128, 4, 1, 168)):
        programs = rows * kv_heads * parts
        for number in splits(num_warps):
            few = 2 * programs * number < FULL_PROGRAMS // 2 and number < splits(num_warps)[-1]
            if head_dim >= 64 * parts and not few and (number == 1 or programs * number <= FULL_PROGRAMS * 2):
                found.append(Launch(block_n, number, block_n, num_warps, True, fragments=parts, registers=registers))
    programs = rows * kv_heads
    for block_n, num_warps, num_stages, held in STREAMS[:2] if rows <= REGISTER_ROWS else STREAMS:
        for number in splits(num_warps):
            few = programs * number < FULL_PROGRAMS // 2 and number < splits(num_warps)[-1]
            if few or (number > 1 and programs * number > FULL_PROGRAMS * 2):
                continue
            # Several programs share a short context, or only a longer one.
            for piece in sorted({SPLIT_TOKENS, max(block_n, SPLIT_TOKENS // number)}):
                found.append(Launch(block_n, number, piece, num_warps, True, num_stages, held=held))
    return list(dict.fromkeys(found))


def shape_key(rows: int, heads: int, kv_heads: int, head_dim: int) -> str:
    """Under which a measured choice is kept: rows to the next power of two, and the heads."""
    return f"{heads}/{kv_heads}x{head_dim} rows {1 << (rows - 1).bit_length()}"


def best_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int, device: torch.device
) -> Launch:
    """The launch measured fastest on this GPU, else the default."""
    choice = chosen("decode_attention", shape_key(rows, heads, kv_heads, head_dim), device)
    if choice is None or element_bytes != 2:
        return default_launch(rows, heads, kv_heads, head_dim, max_context, element_bytes)
    return launch_of(Launch, choice["launch"], device)


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
    o = torch.empty((rows, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
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
    slots = min(launch.block_n, _keys_at_once(launch.num_warps, head_dim, qkv.element_size()))
    decode_attention_kernel[(heads // own * parts, rows, launch.splits)](
        qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, o,
        workspace.parts, workspace.lse, workspace.counters, max_blocks, eps, scale * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        SPLITS=launch.splits, PIECE=launch.piece, DOT=launch.dot, DEPENDENT=depends, OWN=own,
        BLOCK_G=_block_g(own), BLOCK_N=launch.block_n, BLOCK_D=_block_d(head_dim), SLOTS=slots,
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
