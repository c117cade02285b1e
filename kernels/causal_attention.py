"""Causal attention of whole prompts whose keys and values are still at hand: o = softmax(scale q K^T + mask) V.

    q          [tokens, heads, head_dim]      float32, float16 or bfloat16, normed and rotated
    k, v       [tokens, kv_heads, head_dim]   the same dtype; tokens may lie apart, as in a joint projection
    positions  [tokens] int32 (or int64)      each token's position in its sequence
    o          [tokens, heads, head_dim]

The tokens are whole sequences end to end, nothing of them in the cache before: a row's sequence starts as many rows
before it as its position says, and its keys are the rows from there to itself. Rows of padding have position 0, so that
each sees itself and gives finite values. Sums are kept in float32.

Fused: both products and the softmax (online, as in FlashAttention). Saved: the scores' and probabilities' writes and
reads.

Why it stands beside FlashAttention: a prompt of some hundred tokens gives few programs, and the last rows' see the most
keys, so the time is that of the longest program. Here a tile is some tokens of all query heads that share a key/value
head, which makes it a half or a quarter as many tokens high; the longest begin first, and short ones fill up beside
them. Starts, which FlashAttention has a kernel to prepare for, come from the positions; and it is launched dependently.
Keys and values come by the tensor memory accelerator from sm_90 on, else by ordinary loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels._checks import check_float, check_integers, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import power_of_two, runs_triton, tl, triton
from kernels.choices import chosen, launch_of
from kernels.prefill_linear import can_describe, described

LOG2_E = 1.4426950408889634
MIN_SCALE = 1e-30
"""What float32 takes for zero would make 0 · ∞ of a key that a row does not see."""


@dataclass(frozen=True)
class Launch:
    """How it is launched; only time depends on it, and the order of sums.

    block_t: tokens of a program, for each of the query heads that share a key/value head
    block_n: keys of a tile
    """

    block_t: int
    block_n: int
    num_warps: int
    num_stages: int


def reference(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    wide_q, wide_k, wide_v = (x.float().transpose(0, 1) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (wide_k, wide_v))
    row = torch.arange(len(positions), device=q.device)
    seen = (row >= (row - positions)[:, None]) & (row <= row[:, None])
    scores = (wide_q @ wide_k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ wide_v).transpose(0, 1).contiguous().to(q.dtype)


@triton.jit
def _tile(
    source, stride, first, head, tokens, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_D] of keys or values from token `first` on, zeros outside."""
    if DESCRIBED:
        return source.load([first, head * HEAD_DIM])
    else:
        n = first + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        place = n.to(tl.int64)[:, None] * stride + head * HEAD_DIM + d[None, :]
        return tl.load(source + place, mask=(n < tokens)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _scores(q, keys, first, masked_from, row, start, BLOCK_N: tl.constexpr):
    """Scores of a tile of keys, not yet times scale; of what a row does not see, -inf."""
    scores = dot(q, tl.trans(keys), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    # Not in a loop of its own: that would begin with nothing loaded ahead.
    if first >= masked_from:
        key = first + tl.arange(0, BLOCK_N)
        scores = tl.where((key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None]), scores, -float("inf"))
    return scores


@triton.jit
def _add(scores, scale, values, top, total, sums):
    """The running softmax (greatest score times scale, sum of weights, weighted values) with a tile more, in base 2."""
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])  # one instruction before the power
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    return new_top, total, dot(weights.to(values.dtype), values, sums * shrink[:, None])


@triton.jit(do_not_specialize=["tokens"])
def causal_attention_kernel(
    q, k, v, k_stride, v_stride, positions, o, tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one key/value head's query heads, of which GROUP rows each are made (a power of two)."""
    let_next_start(DEPENDENT)
    kv_head = tl.program_id(0)
    # The last see the most keys, so they begin.
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    m = tl.arange(0, GROUP * BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    row = first_row + m // GROUP
    in_rows = row < tokens
    position = tl.load(positions + row, mask=in_rows, other=0).to(tl.int32)
    start = row - position
    first_key = tl.min(tl.where(in_rows, start, tokens), axis=0)
    end = tl.minimum(first_row + BLOCK_T, tokens)
    # Keys before the program's rows need no mask where all rows are of one sequence.
    alone = tl.max(tl.where(in_rows, start, 0), axis=0) == first_key
    masked_from = first_key + tl.where(alone, tl.maximum(first_row - first_key, 0) // BLOCK_N * BLOCK_N, 0)
    of_head = kv_head * (HEADS // KV_HEADS) + m % GROUP
    mask = (in_rows & (m % GROUP < HEADS // KV_HEADS))[:, None] & (d < HEAD_DIM)[None, :]
    place = (row.to(tl.int64) * HEADS + of_head)[:, None] * HEAD_DIM + d[None, :]
    # Not in a loop: its loads are moved ahead of it.
    wait_for_previous(DEPENDENT)

    queries = tl.load(q + place, mask=mask, other=0.0)
    top = tl.full([GROUP * BLOCK_T], -1e30, tl.float32)  # finite: a row may see nothing of a tile
    total = tl.zeros([GROUP * BLOCK_T], tl.float32)
    sums = tl.zeros([GROUP * BLOCK_T, BLOCK_D], tl.float32)
    for tile in range(first_key, end, BLOCK_N):
        keys = _tile(k, k_stride, tile, kv_head, tokens, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIBED)
        values = _tile(v, v_stride, tile, kv_head, tokens, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIBED)
        scores = _scores(queries, keys, tile, masked_from, row, start, BLOCK_N)
        top, total, sums = _add(scores, scale, values, top, total, sums)

    share = 1.0 / tl.where(total > 0, total, 1.0)  # rows beyond the last have nothing
    tl.store(o + place, (sums * share[:, None]).to(o.dtype.element_ty), mask=mask)


def default_launch(head_dim: int, group: int, element_bytes: int) -> Launch:
    """A launch that every GPU can run: under 96 KiB of shared memory."""
    if element_bytes == 4:  # at full precision, on the ordinary cores
        return Launch(max(1, 16 // group), 32 if head_dim <= 64 else 16, 4, 1)
    return Launch(max(1, 64 // group), 64 if head_dim <= 128 else 32, 4, 2)


def shape_key(heads: int, kv_heads: int, head_dim: int, tokens: int, longest: int) -> str:
    """Under which a measured choice is kept: the heads, all tokens and the longest prompt's, to powers of two."""
    tokens, longest = (power_of_two(number) for number in (tokens, longest))
    return f"{heads}/{kv_heads}x{head_dim} tokens {tokens} of at most {longest}"


def best_launch(
    heads: int, kv_heads: int, head_dim: int, tokens: int, longest: int, dtype: torch.dtype, device: torch.device
) -> Launch | None:
    """What was measured faster than FlashAttention for such steps, of prompts of `longest` at most; None: nothing."""
    if dtype not in (torch.bfloat16, torch.float16) or not 0 < longest <= tokens:
        return None
    entry = chosen("causal_attention", shape_key(heads, kv_heads, head_dim, tokens, longest), device)
    return None if entry is None or "launch" not in entry else launch_of(Launch, entry["launch"], device)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    *,
    dependent: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """Attention of whole prompts [tokens, heads, head_dim]; shapes as in this module's docstring, scale above zero.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for, but
    positions must have been written before it started. `launch` overrides the default. ValueError if the arguments do
    not fit.
    """
    check_float("q", q, 3)
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1] if k.dim() == 3 else 0
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{kv_heads} kv heads cannot be shared evenly by {heads} query heads.")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (tokens, kv_heads, head_dim):
            raise ValueError(f"{name} must have shape {(tokens, kv_heads, head_dim)}, not {tuple(x.shape)}.")
        check_like(name, x[:1], (min(tokens, 1), kv_heads, head_dim), q)  # whatever lies between its tokens
    check_integers("positions", positions, (tokens,), q)
    if not MIN_SCALE <= scale < math.inf:
        raise ValueError(f"scale must be a number above zero, not {scale}.")
    if not runs_triton(q):
        return reference(q, k, v, positions, scale)
    o = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    group = power_of_two(heads // kv_heads)
    block_d = max(16, power_of_two(head_dim))
    launch = launch or default_launch(head_dim, group, q.element_size())
    operands: tuple[Any, ...] = (k, v)
    describes = block_d == head_dim and can_describe(k, v) and (k.stride(0) | v.stride(0)) * k.element_size() % 16 == 0
    if describes:
        operands = tuple(described(x.flatten(1), (launch.block_n, head_dim)) for x in (k, v))
    depends = dependent and can_depend(q.device)
    causal_attention_kernel[(kv_heads, -(-tokens // launch.block_t))](
        q, *operands, k.stride(0), v.stride(0), positions, o, tokens, scale * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, GROUP=group, BLOCK_T=launch.block_t,
        BLOCK_N=launch.block_n, BLOCK_D=block_d, DESCRIBED=describes, DEPENDENT=depends,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **({"launch_pdl": True} if depends else {}),
    )  # fmt: skip
    return o


def saved_bytes(tokens: int, num_heads: int, element_bytes: int) -> int:
    """Write and read of the scores of a prompt, and of the probabilities made of them."""
    return 4 * num_heads * (tokens * (tokens + 1) // 2) * element_bytes


FUSION = Fusion("causal_attention", ("attention",), causal_attention, reference, saved_bytes)
