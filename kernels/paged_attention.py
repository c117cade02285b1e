"""Causal attention over a paged key/value cache: o = softmax(scale q K^T + mask) V, for decode and prefill.

    q             [tokens, heads, head_dim]                        float32, float16 or bfloat16, sequence after sequence
    k_cache, v_cache  [num_blocks, block_size, kv_heads, head_dim] the same dtype; block_size a power of two >= 16
    block_tables  [seqs, max_blocks] int32                         blocks of each sequence, in order
    cu_seqlens_q  [seqs + 1] int32                                 where each sequence's queries start in q
    seqlens_k     [seqs] int32                                     tokens in the cache, the new ones included
    o             [tokens, heads, head_dim]

Masks are aligned to the end: query i of n sees keys up to position seqlens_k - n + i; one that sees none gives zeros.
Sums are kept in float32.

Fused: the gather of the pages, both products and the softmax (online, as in FlashAttention). Saved: the scores' and
probabilities' writes and reads, and a contiguous copy of the sequence's keys and values.

The query heads that share a key/value head are rows of one tile, so each key is read once for all of them: decode is
the case of one query token, where the tile's rows are the group's heads. Where few programs would run, several share
a context and `paged_attention_combine_kernel` merges their parts. The number of parts depends on shapes alone, never on
lengths that lie on the device, so a captured graph stays right when the sequences grow. The kernel is compiled for its
tile and for whether there are parts, not for how many: an engine can run all there are before it is ready
(`tile_tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels._checks import check_float, check_integers, check_like
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import power_of_two, runs_triton, tl, triton

LOG2_E = 1.4426950408889634
SPLIT_TOKENS = 256
"""Part the longest context that the block table can hold into pieces of at least this many tokens."""
MAX_SPLITS = 32
DECODE_PROGRAMS_PER_SM = 2
"""Split until about so many programs run on each multiprocessor; prefill, whose parts are costlier to merge, to one."""


@dataclass(frozen=True)
class Tile:
    """A launch shape, used up to `max_rows` rows (query tokens times heads of a group) per sequence."""

    max_rows: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


MANY = 1 << 62
# By element size; block_n is halved for heads wider than 128, so that shared memory stays under sm_80's 163 KiB. The
# look-up of the block takes half of the stages: 5 keep two tiles of keys and values under way, 3 keep one.
TILES = {
    2: (Tile(16, 16, 64, 4, 5), Tile(32, 32, 64, 4, 5), Tile(256, 64, 64, 4, 3), Tile(MANY, 128, 64, 8, 3)),
    # float32 at full precision does not use tensor cores; larger tiles only take longer to compile.
    4: (Tile(MANY, 16, 32, 4, 2),),
}


def reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor,
    max_seqlen_q: int, scale: float,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, computed in float32, one sequence after the other."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    tokens, heads, _ = q.shape
    o = torch.zeros_like(q)
    starts = _starts(cu_seqlens_q, tokens, max_seqlen_q)
    for sequence, length in enumerate(seqlens_k.tolist()):
        first, last = starts[sequence], starts[sequence + 1]
        if last == first or length == 0:
            continue
        blocks = block_tables[sequence, : -(-length // block_size)].long()
        k = k_cache[blocks].view(-1, kv_heads, head_dim)[:length].float().transpose(0, 1)
        v = v_cache[blocks].view(-1, kv_heads, head_dim)[:length].float().transpose(0, 1)
        # [kv_heads, queries * group, head_dim]: each group of query heads against its one key/value head
        queries = q[first:last].float().view(last - first, kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
        scores = (queries @ k.transpose(1, 2)) * scale
        limit = torch.arange(length - (last - first), length, device=q.device)
        hidden = torch.arange(length, device=q.device) > limit.repeat_interleave(heads // kv_heads).unsqueeze(1)
        # The second mask turns the NaN of a query that sees no key into zeros.
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1).masked_fill(hidden, 0.0)
        out = (weights @ v).view(kv_heads, last - first, -1, head_dim).transpose(0, 1)
        o[first:last] = out.reshape(last - first, heads, head_dim).to(q.dtype)
    return o


def _starts(cu_seqlens_q: Tensor, tokens: int, max_seqlen_q: int) -> list[int]:
    """Where each sequence's queries start; with one query each, row i is sequence i."""
    sequences = cu_seqlens_q.shape[0] - 1
    if max_seqlen_q == 1 and tokens == sequences:
        return list(range(sequences + 1))
    return cu_seqlens_q.tolist()


@triton.jit
def _attend(
    total, norm, peak, q, k_cache, v_cache, table, begin, end, length, limit, scale_log2,
    KV_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go through keys [begin, end) in steps of BLOCK_N. Without MASKED every row sees each of them."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        exists = position < length
        if BLOCK_SIZE % BLOCK_N == 0:  # all of these keys lie in one block
            slot = tl.load(table + start // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + n
        elif MASKED:
            slot = tl.load(table + position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64) * BLOCK_SIZE
            slot += position % BLOCK_SIZE
        else:
            slot = tl.load(table + position // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        to_k = k_cache + slot[None, :] * KV_STRIDE + d[:, None]
        to_v = v_cache + slot[:, None] * KV_STRIDE + d[None, :]
        if MASKED:
            k = tl.load(to_k, mask=(d < HEAD_DIM)[:, None] & exists[None, :], other=0.0)
            v = tl.load(to_v, mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            k = tl.load(to_k)
            v = tl.load(to_v)
        else:
            k = tl.load(to_k, mask=(d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(to_v, mask=(d < HEAD_DIM)[None, :], other=0.0)
        score = dot(q, k, tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * scale_log2
        if MASKED:
            score = tl.where(position[None, :] <= limit[:, None], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        # A row that has seen no key yet has peak -inf; subtracting 0 instead keeps exp2 at 0, not NaN.
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - pivot[:, None])
        fade = tl.exp2(peak - pivot)
        norm = norm * fade + tl.sum(weight, axis=1)
        total = dot(weight.to(v.dtype), v, total * fade[:, None])
        peak = new_peak
    return total, norm, peak


@triton.jit(do_not_specialize=["tokens", "max_blocks", "splits"])
def paged_attention_kernel(
    q, k_cache, v_cache, block_tables, cu_seqlens_q, seqlens_k, o, part_o, part_lse, tokens, max_blocks, splits,
    scale_log2, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ONE_QUERY: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M query rows of one key/value head over one split of a sequence's context."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    kv_head = tl.program_id(1)
    # Later queries see more keys: their programs start first, so that the long ones do not end last.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    length = tl.load(seqlens_k + sequence)
    if ONE_QUERY:
        first_token = sequence
        queries = 1
    else:
        first_token = tl.load(cu_seqlens_q + sequence)
        queries = tl.load(cu_seqlens_q + sequence + 1) - first_token
    if first_row >= queries * GROUP:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    query = row // GROUP
    in_rows = query < queries
    limit = length - queries + query
    d = tl.arange(0, BLOCK_D)
    head = (first_token + query).to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP
    offset = head[:, None] * HEAD_DIM + d[None, :]
    mask = in_rows[:, None] & (d < HEAD_DIM)[None, :]
    q_tile = tl.load(q + offset, mask=mask, other=0.0)

    first_limit = length - queries + first_row // GROUP
    last_limit = length - queries + tl.minimum((first_row + BLOCK_M - 1) // GROUP, queries - 1)
    end = tl.maximum(last_limit + 1, 0)
    piece = tl.cdiv(tl.cdiv(end, splits), BLOCK_N) * BLOCK_N
    begin = split * piece
    end = tl.minimum(begin + piece, end)
    # Keys before `whole` are seen by every row; from there on the diagonal or the context's end cuts the tile.
    whole = tl.maximum(first_limit + 1, 0) // BLOCK_N * BLOCK_N
    whole = tl.maximum(tl.minimum(whole, end), begin)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_tables + sequence.to(tl.int64) * max_blocks
    k_head = k_cache + kv_head * HEAD_DIM
    v_head = v_cache + kv_head * HEAD_DIM
    total, norm, peak = _attend(
        total, norm, peak, q_tile, k_head, v_head, table, begin, whole, length, limit, scale_log2,
        KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    total, norm, peak = _attend(
        total, norm, peak, q_tile, k_head, v_head, table, whole, end, length, limit, scale_log2,
        KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    # Rows that saw no key (an empty sequence, an idle split) give zeros.
    result = total / tl.where(norm > 0.0, norm, 1.0)[:, None]
    if not PARTS:
        tl.store(o + offset, result.to(o.dtype.element_ty), mask=mask)
    else:
        base = split.to(tl.int64) * tokens * HEADS
        tl.store(part_o + base * HEAD_DIM + offset, result, mask=mask)
        lse = tl.where(norm > 0.0, peak + tl.log2(tl.where(norm > 0.0, norm, 1.0)), float("-inf"))
        tl.store(part_lse + base + head, lse, mask=in_rows)


@triton.jit(do_not_specialize=["heads", "splits"])
def paged_attention_combine_kernel(
    part_o, part_lse, o, heads, splits, HEAD_DIM: tl.constexpr, MOST: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Merge the splits' parts of one head, MOST at most: a mean weighted by each part's sum of exponentials."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MOST)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(part_lse + split.to(tl.int64) * heads + head, mask=split < splits, other=float("-inf"))
    peak = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    to_part = part_o + (split.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    part = tl.load(to_part, mask=(weight > 0.0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    norm = tl.sum(weight, axis=0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(norm > 0.0, norm, 1.0)
    tl.store(o + head * HEAD_DIM + d, result.to(o.dtype.element_ty), mask=d < HEAD_DIM)


def tile_tokens(group: int, element_bytes: int) -> list[int]:
    """The fewest new tokens of a sequence, 2 at least, that each tile is used for, where `group` query heads share a
    key/value head."""
    found, before = [], 0
    for tile in TILES[element_bytes]:
        tokens = max(2, before // group + 1)
        if tokens * group <= tile.max_rows:
            found.append(tokens)
        before = tile.max_rows
    return found


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(programs: int, max_context: int, decode: bool, device: torch.device) -> int:
    """How many programs share one context: a power of two, from shapes alone."""
    target = _multiprocessors(device) * (DECODE_PROGRAMS_PER_SM if decode else 1)
    wanted = min(target // programs, max_context // SPLIT_TOKENS, MAX_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor
) -> None:
    check_float("q", q, 3)
    if k_cache.dim() != 4 or block_tables.dim() != 2:
        raise ValueError(
            "k_cache must be [num_blocks, block_size, kv_heads, head_dim] and block_tables [seqs, max_blocks], "
            f"not {tuple(k_cache.shape)} and {tuple(block_tables.shape)}."
        )
    blocks, block_size, kv_heads, head_dim = k_cache.shape
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"the cache's block size must be a power of two of at least 16, not {block_size}.")
    if q.shape[1] % kv_heads or q.shape[2] != head_dim:
        raise ValueError(
            f"q of shape {tuple(q.shape)} does not fit a cache with {kv_heads} heads of {head_dim}: "
            "its heads must be a multiple of the cache's and equally wide."
        )
    check_like("k_cache", k_cache, (blocks, block_size, kv_heads, head_dim), q)
    check_like("v_cache", v_cache, (blocks, block_size, kv_heads, head_dim), q)
    sequences = block_tables.shape[0]
    check_integers("block_tables", block_tables, (sequences, block_tables.shape[1]), q)
    check_integers("cu_seqlens_q", cu_seqlens_q, (sequences + 1,), q)
    check_integers("seqlens_k", seqlens_k, (sequences,), q)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor,
    max_seqlen_q: int, scale: float, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's queries over its cached keys and values; shapes as in this module's docstring.

    `max_seqlen_q` bounds every sequence's queries. With max_seqlen_q 1 and as many tokens as sequences, row i is
    sequence i, `cu_seqlens_q` is not read, and a sequence of length 0 (a padding row) gives zeros. Rows of q that
    belong to no sequence are left unwritten. `num_splits`, MAX_SPLITS at most, overrides how many programs share a
    context. ValueError if shapes, dtypes, devices or layouts do not fit; lengths and blocks, which lie on the device,
    are not checked.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q, seqlens_k)
    if max_seqlen_q < 1:
        raise ValueError(f"max_seqlen_q must be at least 1, not {max_seqlen_q}.")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be from 1 to {MAX_SPLITS}, not {num_splits}.")
    if not runs_triton(q):
        return reference(q, k_cache, v_cache, block_tables, cu_seqlens_q, seqlens_k, max_seqlen_q, scale)
    tokens, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    sequences, max_blocks = block_tables.shape
    o = torch.empty_like(q)
    if tokens == 0 or sequences == 0:
        return o
    rows = max_seqlen_q * (heads // kv_heads)
    tile = next(tile for tile in TILES[q.element_size()] if rows <= tile.max_rows)
    row_blocks = -(-rows // tile.block_m)
    programs = row_blocks * kv_heads * sequences
    splits = num_splits or _splits(programs, max_blocks * block_size, max_seqlen_q == 1, q.device)
    part_o = part_lse = None
    if splits > 1:
        part_o = torch.empty((splits, tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q.device)
    block_d = max(16, power_of_two(head_dim))
    paged_attention_kernel[(row_blocks, kv_heads, sequences * splits)](
        q, k_cache, v_cache, block_tables, cu_seqlens_q, seqlens_k, o, part_o, part_lse, tokens, max_blocks,
        splits, scale * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ONE_QUERY=max_seqlen_q == 1 and tokens == sequences, PARTS=splits > 1,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n if block_d <= 128 else tile.block_n // 2, BLOCK_D=block_d,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        paged_attention_combine_kernel[(tokens * heads,)](
            part_o, part_lse, o, tokens * heads, splits, HEAD_DIM=head_dim, MOST=MAX_SPLITS, BLOCK_D=block_d,
            num_warps=4,
        )  # fmt: skip
    return o


def saved_bytes(
    queries: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int
) -> int:
    """Write and read of scores and probabilities, and of a contiguous copy of keys and values, for one sequence."""
    return (4 * queries * context * num_heads + 4 * context * num_kv_heads * head_dim) * element_bytes


FUSION = Fusion("paged_attention", ("attention",), paged_attention, reference, saved_bytes)
