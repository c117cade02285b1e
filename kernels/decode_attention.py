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

A program takes one row, one key/value head with all its query heads, and one split of the context. A captured graph is
bound to the longest context, most contexts are far shorter; so the number of splits follows from shapes, and each row's
own length is parted on the device: in as few pieces of at least `Launch.piece` keys as fit, the other splits return at
once. A context of one piece is written straight to the output; of several, the program that comes last merges them.

The tile's products come from the tensor cores (`Launch.dot`), whose tiles have 16 rows however few the query heads are,
or from multiplications and sums in float32, which need no exchange between threads but that of the scores. There keys
are spread over SLOTS groups of threads; each slot has a softmax of its own, merged with the others' at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._checks import check_float, check_integers, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton
from kernels.choices import chosen
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
MERGED_ELEMENTS = 64
"""Elements of all parts that a thread of the merging program holds in registers at most."""


@dataclass(frozen=True)
class Launch:
    """A launch configuration.

    block_n: keys of a tile, a power of two
    splits: programs that share a row's context, a power of two, up to MAX_SPLITS
    piece: least keys of a split, a multiple of block_n
    dot: products on tensor cores
    num_stages: of the dot's software pipeline, where the look-up of the block takes half: 5 keep two tiles under way
    """

    block_n: int
    splits: int
    piece: int
    num_warps: int
    dot: bool
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name in ("block_n", "splits"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}.")
        if self.splits > MAX_SPLITS:
            raise ValueError(f"splits must be at most {MAX_SPLITS}, not {self.splits}.")
        if self.piece < 1 or self.piece % self.block_n:
            raise ValueError(f"piece must be a multiple of block_n, {self.block_n}, not {self.piece}.")


@dataclass(frozen=True)
class Workspace:
    """Where the splits of one launch leave their parts. Launches that share it must run one after the other.

    parts: [rows * splits, heads, head_dim] float32, each split's own result; lse: [rows * splits, heads], log2 of its
    sum of exponentials; counters: [rows * heads] int32, splits that are done. They are zero between launches.
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
        torch.zeros(min(rows, PART_ROWS) * heads, dtype=torch.int32, device=device),
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
def _rows(source, mask, ROWS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [ROWS * SLOTS, WIDTH] as [ROWS, SLOTS, WIDTH].

    Triton (3.6 and 3.7 differ) spreads the dimensions of a load over threads by its own rules; of two, as one wants it:
    16 bytes of a row for each thread, then whole rows, and rows that lie SLOTS apart in the same thread.
    """
    return tl.reshape(tl.load(source, mask=mask, other=0.0), [ROWS, SLOTS, WIDTH])


@triton.jit
def _rotated(x, partner, gamma, gamma_partner, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads [n, SLOTS, D]; float32, rounded as the cache stores it.

    An element of one half of a head turns with its `partner` in the other; `sin` bears the sign.
    """
    turned_x = x.to(tl.float32)
    turned_y = partner.to(tl.float32)
    if gamma is not None:
        scale = tl.expand_dims(tl.rsqrt(tl.sum(turned_x * turned_x, axis=2) / HEAD_DIM + eps), 2)
        turned_x = turned_x * scale * gamma.to(tl.float32)
        turned_y = turned_y * scale * gamma_partner.to(tl.float32)
    return (turned_x * cos + turned_y * sin).to(x.dtype).to(tl.float32)


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
def _attend(total, norm, peak, q, k, v, seen, scale_log2, DOT: tl.constexpr):
    """Add one tile of keys to the running softmax.

    DOT: q [D, M], k [BLOCK_N, D], v [D, BLOCK_N], seen [BLOCK_N, 1]; total [D, M], norm and peak [M]. The query heads
    are the columns of both products: the instruction takes columns by 8, but rows by 16.
    Else: q [BLOCK_G, 1, 1, D], k and v [1, BLOCK_N / SLOTS, SLOTS, D], seen [1, BLOCK_N / SLOTS, SLOTS];
    total [BLOCK_G, SLOTS, D], norm and peak [BLOCK_G, SLOTS].
    """
    KEYS: tl.constexpr = 0 if DOT else 1
    if DOT:
        score = dot(k, q, tl.zeros([k.shape[0], q.shape[1]], tl.float32))
    else:
        score = tl.sum(q * k.to(tl.float32), axis=3)
    score = tl.where(seen, score * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=KEYS))
    pivot = _pivot(new_peak)
    weight = tl.exp2(score - tl.expand_dims(pivot, KEYS))
    fade = tl.exp2(peak - pivot)
    norm = norm * fade + tl.sum(weight, axis=KEYS)
    if DOT:
        total = dot(v, weight.to(v.dtype), total * fade[None, :])
    else:
        total = total * fade[:, :, None] + tl.sum(weight[:, :, :, None] * v.to(tl.float32), axis=1)
    return total, norm, new_peak


@triton.jit(do_not_specialize=["max_blocks"])
def decode_attention_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, o, parts, part_lse, counters,
    max_blocks, eps, scale_log2,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, PIECE: tl.constexpr, DOT: tl.constexpr, DEPENDENT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row, key/value head and split; grid (kv_heads, rows, SPLITS)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    let_next_start(DEPENDENT)
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)

    # Written before this graph's chain began, and so read before the wait: positions, tables, and the earlier cache.
    position = tl.load(positions + row).to(tl.int32)
    cached = tl.maximum(position, 0)
    piece = tl.maximum(tl.cdiv(tl.cdiv(cached, SPLITS), BLOCK_N) * BLOCK_N, PIECE)
    active = tl.maximum(tl.cdiv(cached, piece), 1)
    if split >= active:
        return
    begin = split * piece
    end = tl.minimum(begin + piece, cached)
    newest = split == active - 1  # the shortest piece; its program adds the new token

    table = block_tables + row * max_blocks
    k_head = k_cache + kv_head * HEAD_DIM
    v_head = v_cache + kv_head * HEAD_DIM
    last = max_blocks - 1
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    in_d = d < HEAD_DIM
    within = n * KV_STRIDE + d if BLOCK_SIZE % BLOCK_N == 0 else d
    if not DOT:
        places = _places(table, last, begin, n, BLOCK_SIZE, BLOCK_N)
        next_places = _places(table, last, begin + BLOCK_N, n, BLOCK_SIZE, BLOCK_N)
        mask = (n < end - begin) & in_d
        k = tl.load(k_head + places * KV_STRIDE + within, mask=mask, other=0.0)
        v = tl.load(v_head + places * KV_STRIDE + within, mask=mask, other=0.0)

    # Each slot of keys has a softmax of its own, and holds what all of them need (the query, the new key) itself: no
    # thread waits for another one until the slots are merged. The dot has one slot.
    of_slots = tl.zeros([SLOTS, 1], tl.int32) + d
    in_slots = of_slots < HEAD_DIM
    partner = tl.where(of_slots < HALF, of_slots + HALF, of_slots - HALF)
    angle = cos_sin + cached.to(tl.int64) * HEAD_DIM + tl.where(of_slots < HALF, of_slots, of_slots - HALF)
    cos = _rows(angle, in_slots, 1, SLOTS, BLOCK_D)
    sin = _rows(angle + HALF, in_slots, 1, SLOTS, BLOCK_D)
    sin = tl.where(tl.arange(0, BLOCK_D)[None, None, :] < HALF, -sin, sin)
    q_gamma = None
    q_gamma_partner = None
    k_gamma = None
    k_gamma_partner = None
    if q_weight is not None:
        q_gamma = _rows(q_weight + of_slots, in_slots, 1, SLOTS, BLOCK_D)
        q_gamma_partner = _rows(q_weight + partner, in_slots, 1, SLOTS, BLOCK_D)
        k_gamma = _rows(k_weight + of_slots, in_slots, 1, SLOTS, BLOCK_D)
        k_gamma_partner = _rows(k_weight + partner, in_slots, 1, SLOTS, BLOCK_D)
    new_block = tl.load(table + cached // BLOCK_SIZE).to(tl.int64)

    wait_for_previous(DEPENDENT)
    token = qkv + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    g = tl.arange(0, BLOCK_G * SLOTS)[:, None] // SLOTS
    q_head = token + (kv_head * GROUP + g) * HEAD_DIM
    in_q = (g < GROUP) & in_d
    new_head = token + (HEADS + kv_head) * HEAD_DIM
    q = _rows(q_head + d, in_q, BLOCK_G, SLOTS, BLOCK_D)
    q_partner = _rows(q_head + tl.where(d < HALF, d + HALF, d - HALF), in_q, BLOCK_G, SLOTS, BLOCK_D)
    new_k = _rows(new_head + of_slots, in_slots, 1, SLOTS, BLOCK_D)
    k_partner = _rows(new_head + partner, in_slots, 1, SLOTS, BLOCK_D)
    new_v = _rows(new_head + KV_HEADS * HEAD_DIM + of_slots, in_slots, 1, SLOTS, BLOCK_D)
    q = _rotated(q, q_partner, q_gamma, q_gamma_partner, cos, sin, eps, HEAD_DIM)
    new_k = _rotated(new_k, k_partner, k_gamma, k_gamma_partner, cos, sin, eps, HEAD_DIM)

    slot = tl.arange(0, SLOTS)
    written = (slot == 0)[:, None] & in_slots & newest & (position >= 0)
    new_place = (new_block * BLOCK_SIZE + cached % BLOCK_SIZE) * KV_STRIDE + of_slots
    tl.store(k_head + new_place, tl.reshape(new_k.to(new_v.dtype), [SLOTS, BLOCK_D]), mask=written)
    tl.store(v_head + new_place, tl.reshape(new_v, [SLOTS, BLOCK_D]), mask=written)
    adds_new = newest & (slot == 0)[None, :]

    # The softmax starts with the new token, from registers: nobody waits for its write to the cache.
    peak = tl.where(adds_new, tl.sum(q * new_k, axis=2) * scale_log2, float("-inf"))
    norm = tl.where(adds_new, 1.0, tl.zeros_like(peak))
    total = norm[:, :, None] * new_v.to(tl.float32)
    if DOT:
        COLUMNS: tl.constexpr = BLOCK_G if BLOCK_G > 8 else 8  # fewer heads are repeated
        REPEAT: tl.constexpr = COLUMNS // BLOCK_G
        q = tl.reshape(tl.broadcast_to(tl.trans(q, 1, 0, 2), [REPEAT, BLOCK_G, BLOCK_D]), [COLUMNS, BLOCK_D])
        q = tl.trans(q.to(new_v.dtype))
        total = tl.broadcast_to(tl.trans(total, 1, 0, 2), [REPEAT, BLOCK_G, BLOCK_D])
        total = tl.trans(tl.reshape(total, [COLUMNS, BLOCK_D]))
        norm = tl.reshape(tl.broadcast_to(tl.trans(norm), [REPEAT, BLOCK_G]), [COLUMNS])
        peak = tl.reshape(tl.broadcast_to(tl.trans(peak), [REPEAT, BLOCK_G]), [COLUMNS])
        # Values are loaded as columns, for the second product.
        v_n = tl.arange(0, BLOCK_N)[None, :]
        v_d = tl.arange(0, BLOCK_D)[:, None]
        v_within = v_n * KV_STRIDE + v_d if BLOCK_SIZE % BLOCK_N == 0 else v_d
        for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            places = _places(table, last, start, n, BLOCK_SIZE, BLOCK_N)
            v_places = _places(table, last, start, v_n, BLOCK_SIZE, BLOCK_N)
            k = tl.load(k_head + places * KV_STRIDE + within, mask=(n < end - start) & in_d, other=0.0)
            v = tl.load(
                v_head + v_places * KV_STRIDE + v_within, mask=(v_n < end - start) & (v_d < HEAD_DIM), other=0.0
            )
            total, norm, peak = _attend(total, norm, peak, q, k, v, n < end - start, scale_log2, DOT)
        total = tl.trans(total)
    else:
        WAVES: tl.constexpr = BLOCK_N // SLOTS
        q = tl.expand_dims(q, 1)
        wave_n = tl.arange(0, WAVES)[None, :, None] * SLOTS + tl.arange(0, SLOTS)[None, None, :]
        for start in tl.range(begin, end, BLOCK_N, num_stages=1):
            this_k = tl.reshape(k, [1, WAVES, SLOTS, BLOCK_D])
            this_v = tl.reshape(v, [1, WAVES, SLOTS, BLOCK_D])
            mask = (n < end - start - BLOCK_N) & in_d
            k = tl.load(k_head + next_places * KV_STRIDE + within, mask=mask, other=0.0)
            v = tl.load(v_head + next_places * KV_STRIDE + within, mask=mask, other=0.0)
            next_places = _places(table, last, start + 2 * BLOCK_N, n, BLOCK_SIZE, BLOCK_N)
            total, norm, peak = _attend(total, norm, peak, q, this_k, this_v, wave_n < end - start, scale_log2, DOT)
        slot_peak = peak
        peak = tl.max(slot_peak, axis=1)
        weight = tl.exp2(slot_peak - _pivot(peak)[:, None])
        norm = tl.sum(norm * weight, axis=1)
        total = tl.sum(total * weight[:, :, None], axis=1)
    result = tl.where(position >= 0, total / norm[:, None], 0.0)

    out_g = tl.arange(0, result.shape[0])[:, None]
    in_heads = (out_g < GROUP) & in_d
    first = o + row * (HEADS * HEAD_DIM) + kv_head * GROUP * HEAD_DIM
    if SPLITS == 1:  # noqa: SIM114 (known to the compiler, as `active` is not)
        tl.store(first + out_g * HEAD_DIM + d, result.to(o.dtype.element_ty), mask=in_heads)
    elif active == 1:
        tl.store(first + out_g * HEAD_DIM + d, result.to(o.dtype.element_ty), mask=in_heads)
    else:
        first_part = row * (SPLITS * HEADS) + kv_head * GROUP
        own_part = first_part + split * HEADS + out_g
        tl.store(parts + own_part * HEAD_DIM + d, result, mask=in_heads)
        tl.store(part_lse + own_part, (peak + tl.log2(norm))[:, None], mask=out_g < GROUP)
        # All threads' stores come before the barrier, the barrier before the one thread's addition. That releases them,
        # since release is cumulative; the program that comes last acquires them by its own addition, whose result all
        # of its threads wait for. The loads go to L2 (.cg), where the parts are, past older lines of an L1.
        tl.debug_barrier()
        counter = counters + row * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == active - 1:
            # Nobody else counts in this launch any more, and the next one that does waits for this one's end.
            tl.store(counter, 0)
            part_split = tl.arange(0, SPLITS)[:, None, None]
            part_g = tl.arange(0, BLOCK_G)[None, :, None]
            part_d = tl.arange(0, BLOCK_D)[None, None, :]
            part = first_part + part_split * HEADS + part_g
            in_parts = (part_split < active) & (part_g < GROUP)
            lse = tl.load(part_lse + part, mask=in_parts, other=0.0, cache_modifier=".cg")
            lse = tl.where(part_split < active, lse, float("-inf"))
            values = tl.load(
                parts + part * HEAD_DIM + part_d, mask=in_parts & (part_d < HEAD_DIM), other=0.0, cache_modifier=".cg"
            )
            share = tl.exp2(lse - tl.max(lse, axis=0)[None, :, :])
            merged = tl.sum(values * share, axis=0) / tl.sum(share, axis=0)
            to_g = tl.arange(0, BLOCK_G)[:, None]
            tl.store(first + to_g * HEAD_DIM + d, merged.to(o.dtype.element_ty), mask=(to_g < GROUP) & in_d)


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _block_g(group: int) -> int:
    return 1 << (group - 1).bit_length()


def _keys_at_once(num_warps: int, head_dim: int, element_bytes: int) -> int:
    """How many keys the program's threads load at once, 16 bytes each."""
    return max(1, 32 * num_warps * 16 // (_block_d(head_dim) * element_bytes))


def _split_choices(rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, num_warps: int) -> list[int]:
    """Numbers of splits that the workspace, the merging program's registers and the longest context allow."""
    merged = _block_g(heads // kv_heads) * _block_d(head_dim)
    limit = min(MAX_SPLITS, PART_ROWS // rows, MERGED_ELEMENTS * 32 * num_warps // merged, max_context // SPLIT_TOKENS)
    return [splits for splits in (1, 2, 4, 8, 16, 32) if splits <= max(limit, 1)]


def default_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> Launch:
    """A launch that runs anywhere and should not be far off, from shapes alone."""
    many = rows * kv_heads >= FULL_PROGRAMS
    if element_bytes == 2 and (many or heads // kv_heads > 4):
        num_warps, block_n, num_stages, dot = (1, 32, 5, True) if many else (4, 64, 5, True)
    else:
        num_warps = 4 if many else 8
        block_n, num_stages, dot = 4 * _keys_at_once(num_warps, head_dim, element_bytes), 1, False
    if _block_d(head_dim) > 128 and dot:
        block_n //= 2
    wanted = max(1, FULL_PROGRAMS // (rows * kv_heads))
    choices = _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)
    splits = max(number for number in choices if number <= wanted)
    return Launch(block_n, splits, max(block_n, SPLIT_TOKENS), num_warps, dot, num_stages)


def candidates(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> list[Launch]:
    """Launches worth measuring, the default among them."""
    programs = rows * kv_heads
    tiles = []  # (block_n, num_warps, dot, num_stages)
    if heads // kv_heads <= 4:
        for waves, num_warps in ((4, 4), (2, 8), (4, 8), (8, 8), (4, 16)):
            tiles.append((waves * _keys_at_once(num_warps, head_dim, element_bytes), num_warps, False, 1))
    if element_bytes == 2:
        dots = ((16, 1, 7), (32, 1, 3), (32, 1, 5), (32, 1, 7), (32, 2, 5), (64, 2, 5), (64, 4, 5), (128, 4, 5))
        tiles += [(block_n, num_warps, True, num_stages) for block_n, num_warps, num_stages in dots]
    found = [default_launch(rows, heads, kv_heads, head_dim, max_context, element_bytes)]
    for block_n, num_warps, on_tensor_cores, num_stages in tiles:
        numbers = _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)
        for splits in numbers:
            few, many = programs * splits < FULL_PROGRAMS // 4, programs * splits > FULL_PROGRAMS * 4
            if (few and splits < numbers[-1]) or (many and splits > 1):
                continue
            for piece in (64, 256) if splits > 1 else (SPLIT_TOKENS,):
                found.append(Launch(block_n, splits, max(block_n, piece), num_warps, on_tensor_cores, num_stages))
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
    return Launch(**choice["launch"])


def _check(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    block_tables: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, kv_heads: int, head_dim: int,
) -> None:  # fmt: skip
    check_float("qkv", qkv, 2)
    rows = qkv.shape[0]
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even, since its halves are rotated against each other, not {head_dim}.")
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, {kv_heads}, not {heads}.")
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"qkv must have ({heads} + 2 * {kv_heads}) * {head_dim} columns for its heads, not {qkv.shape[1]}."
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither.")
    if q_weight is not None and k_weight is not None:
        check_like("q_weight", q_weight, (head_dim,), qkv)
        check_like("k_weight", k_weight, (head_dim,), qkv)
    check_like("cos_sin", cos_sin, (cos_sin.shape[0], head_dim), qkv, torch.float32)
    check_integers("positions", positions, (rows,), qkv)
    if k_cache.dim() != 4 or block_tables.dim() != 2:
        raise ValueError(
            "k_cache must be [num_blocks, block_size, kv_heads, head_dim] and block_tables [rows, max_blocks], "
            f"not {tuple(k_cache.shape)} and {tuple(block_tables.shape)}."
        )
    blocks, block_size = k_cache.shape[:2]
    if block_size < 16 or block_size & (block_size - 1):
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
    at_once = _keys_at_once(launch.num_warps, head_dim, qkv.element_size())
    depends = dependent and can_depend(qkv.device)
    decode_attention_kernel[(kv_heads, rows, launch.splits)](
        qkv, q_weight, k_weight, cos_sin, positions, block_tables, k_cache, v_cache, o,
        workspace.parts, workspace.lse, workspace.counters, max_blocks, eps, scale * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        SPLITS=launch.splits, PIECE=launch.piece, DOT=launch.dot, DEPENDENT=depends,
        BLOCK_G=_block_g(heads // kv_heads), BLOCK_N=launch.block_n, BLOCK_D=_block_d(head_dim),
        SLOTS=1 if launch.dot else min(launch.block_n, at_once), STAGES=launch.num_stages,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **({"launch_pdl": True} if depends else {}),
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
