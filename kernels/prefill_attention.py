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

What takes time is one load waiting for another. So angles, slots and gammas, which nothing before in the chain writes,
come before the wait; keys and values of the first tile are asked for behind it at once; a short step's are one tile. A
program writes those keys of its tiles to the cache that are its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels._checks import check_cache_write, check_qkv
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import HAVE_TRITON, INTERPRETED, power_of_two, runs_triton, tl, triton
from kernels.causal_attention import reference as causal_attention_reference
from kernels.qk_norm_rope_cache import reference as qk_norm_rope_cache_reference
from kernels.qk_norm_rope_cache import saved_bytes as rope_saved_bytes

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = 1.4426950408889634
PROGRAMS = 128
"""At most so many programs, about one for each multiprocessor, as long as MOST_ROWS rows (of tokens and heads) suffice
for it: each repeats the work on its keys, and holds so many of them that two rarely fit beside one another."""
MOST_ROWS = 64


@dataclass(frozen=True)
class Launch:
    """How it is launched; only time depends on it, and the order of sums.

    block_t: tokens of a program, for each of the query heads that share a kv head
    block_n: keys that it takes at a time
    """

    block_t: int
    block_n: int
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("block_t", "block_n"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}.")


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
def _gammas(weight, d, HALF: tl.constexpr):
    """Both halves of a norm's gammas, [1, columns], in float32."""
    gamma_a = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
    gamma_b = tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    return gamma_a[None, :], gamma_b[None, :]


@triton.jit
def _angles(cos_sin, position, d, mask, HALF: tl.constexpr):
    """Cosines and sines of the rows' positions, [rows, columns] each."""
    angle = cos_sin + position.to(tl.int32)[:, None] * (2 * HALF) + d[None, :]
    inside = mask[:, None] & (d < HALF)[None, :]
    return tl.load(angle, mask=inside, other=0.0), tl.load(angle + HALF, mask=inside, other=0.0)


@triton.jit
def _rotated(raw_a, raw_b, gamma_a, gamma_b, cos, sin, eps, HALF: tl.constexpr):
    """Both halves of heads, [rows, columns] each, normed and rotated, in the dtype that they have."""
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)
    if gamma_a is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        a = a * scale * gamma_a
        b = b * scale * gamma_b
    return (a * cos - b * sin).to(raw_a.dtype), (b * cos + a * sin).to(raw_a.dtype)


@triton.jit
def _tile(source, mask, n, d, wide_d, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """As they are: both halves of n keys from `source` on, and their values, whose columns are `wide_d`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    rows = source + n[:, None] * WIDTH
    in_half = mask[:, None] & (d < HALF)[None, :]
    k_a = tl.load(rows + d[None, :], mask=in_half, other=0.0)
    k_b = tl.load(rows + HALF + d[None, :], mask=in_half, other=0.0)
    in_head = mask[:, None] & (wide_d < HEAD_DIM)[None, :]
    return k_a, k_b, tl.load(rows + KV_HEADS * HEAD_DIM + wide_d[None, :], mask=in_head, other=0.0)


@triton.jit
def _arrived(x):
    """x, of which the compiler does not see that it is loaded: it would put it into shared memory right behind the
    load, where all else would wait for it."""
    if _INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )


@triton.jit(do_not_specialize=["tokens"])
def prefill_attention_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, o, tokens, eps, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, ONE_TILE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one kv head and its query heads, of which GROUP rows each are made (a power of two).

    ONE_TILE: all tokens of the step are keys of the first tile.
    """
    let_next_start(DEPENDENT)
    HALF: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    kv_head = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_T
    end = tl.minimum(first_row + BLOCK_T, tokens)
    d = tl.arange(0, BLOCK_HALF)
    wide_d = tl.arange(0, 2 * BLOCK_HALF)
    in_half = (d < HALF)[None, :]
    in_head = (wide_d < HEAD_DIM)[None, :]

    # Queries: the heads of one token side by side.
    m = tl.arange(0, GROUP * BLOCK_T)
    row = first_row + m // GROUP
    head = kv_head * (HEADS // KV_HEADS) + m % GROUP
    in_rows = row < tokens
    is_head = in_rows & (m % GROUP < HEADS // KV_HEADS)
    position = tl.load(positions + row, mask=in_rows, other=0).to(tl.int32)
    start = row - position
    first_key = tl.min(tl.where(in_rows, start, tokens), axis=0)
    # Where one tile holds all tokens, its positions are asked for without those of the rows.
    first_tile = 0 if ONE_TILE else first_key
    n = tl.arange(0, BLOCK_N)
    key = first_tile + n
    key_position = tl.load(positions + key, mask=key < end, other=0)
    if not ONE_TILE:
        next_position = tl.load(positions + key + BLOCK_N, mask=key + BLOCK_N < end, other=0)
    cos, sin = _angles(cos_sin, key_position, d, key < end, HALF)
    q_cos, q_sin = _angles(cos_sin, position, d, in_rows, HALF)
    # The program's own keys and values go to the cache.
    slot = tl.load(slot_mapping + key, mask=(key >= first_row) & (key < end), other=-1)
    q_gamma_a = None
    q_gamma_b = None
    k_gamma_a = None
    k_gamma_b = None
    if q_weight is not None:
        q_gamma_a, q_gamma_b = _gammas(q_weight, d, HALF)
        k_gamma_a, k_gamma_b = _gammas(k_weight, d, HALF)

    wait_for_previous(DEPENDENT)
    q_source = qkv + row.to(tl.int64)[:, None] * WIDTH + (head * HEAD_DIM)[:, None] + d[None, :]
    q_mask = is_head[:, None] & in_half
    q_a = tl.load(q_source, mask=q_mask, other=0.0)
    q_b = tl.load(q_source + HALF, mask=q_mask, other=0.0)
    source = qkv + (HEADS + kv_head) * HEAD_DIM
    if not ONE_TILE:
        source += first_key.to(tl.int64) * WIDTH
    loaded = (key >= first_key) & (key < end)
    k_a, k_b, v = _tile(source, loaded, n, d, wide_d, WIDTH, KV_HEADS, HEAD_DIM)
    q_a, q_b = _rotated(q_a, q_b, q_gamma_a, q_gamma_b, q_cos, q_sin, eps, HALF)

    top = tl.full([GROUP * BLOCK_T], -1e30, tl.float32)  # finite: a row may see nothing of a tile
    total = tl.zeros([GROUP * BLOCK_T], tl.float32)
    sums = tl.zeros([GROUP * BLOCK_T, 2 * BLOCK_HALF], tl.float32)
    for tile in tl.range(first_tile, end, BLOCK_N, num_stages=1):
        key = tile + n
        keys_a, keys_b = _rotated(k_a, k_b, k_gamma_a, k_gamma_b, cos, sin, eps, HALF)
        values = v
        place = ((slot.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM)[:, None]
        written = (slot >= 0)[:, None]
        tl.store(k_cache + place + d[None, :], keys_a, mask=written & in_half)
        tl.store(k_cache + place + HALF + d[None, :], keys_b, mask=written & in_half)
        if not ONE_TILE:  # the next tile, whose positions are there, comes while this one is multiplied
            following = key + BLOCK_N
            cos, sin = _angles(cos_sin, next_position, d, following < end, HALF)
            next_position = tl.load(positions + following + BLOCK_N, mask=following + BLOCK_N < end, other=0)
            slot = tl.load(slot_mapping + following, mask=(following >= first_row) & (following < end), other=-1)
            source += BLOCK_N * WIDTH
            k_a, k_b, v = _tile(source, following < end, n, d, wide_d, WIDTH, KV_HEADS, HEAD_DIM)
        scores = dot(q_a, tl.trans(keys_a), tl.zeros([GROUP * BLOCK_T, BLOCK_N], tl.float32))
        scores = dot(q_b, tl.trans(keys_b), scores) * scale
        values = _arrived(values)
        tl.store(v_cache + place + wide_d[None, :], values, mask=written & in_head)
        seen = (key[None, :] >= start[:, None]) & (key[None, :] <= row[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        sums = dot(weights.to(values.dtype), values, sums * shrink[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        top = new_top

    total = tl.where(total > 0, total, 1.0)[:, None]  # rows beyond the last
    to_o = o + row.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + (head * HEAD_DIM)[:, None] + wide_d[None, :]
    tl.store(to_o, (sums / total).to(o.dtype.element_ty), mask=is_head[:, None] & in_head)


def keys_of_a_tile(head_dim: int, element_bytes: int) -> tuple[int, int]:
    """The most that registers hold: where one tile has all keys of a step, and where the next is loaded beside it."""
    if element_bytes == 4:  # at full precision, on the ordinary cores
        return 32, 16
    return (128, 64) if head_dim <= 128 else (64, 32)


def default_launch(tokens: int, heads: int, kv_heads: int, head_dim: int, element_bytes: int) -> Launch:
    """From shapes alone."""
    group = power_of_two(heads // kv_heads)
    block_t = max(1, 16 // group)
    while block_t * group < MOST_ROWS and -(-tokens // block_t) * kv_heads > PROGRAMS:
        block_t *= 2
    alone, beside = keys_of_a_tile(head_dim, element_bytes)
    block_n = max(16, power_of_two(tokens)) if tokens <= alone else beside
    return Launch(block_t, block_n, 8 if block_n * head_dim * element_bytes > 32 * 128 * 2 else 4)


def prefill_attention(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, scale: float, dependent: bool = False, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Attention of whole sequences [tokens, heads * head_dim] from their joint projection; shapes as in this module's
    docstring.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for, but
    positions, slots and the table must have been written before it started. `launch` overrides the default. ValueError
    if the arguments do not fit; positions and slots, which lie on the device, are not checked against their tables.
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
    o = empty_rows(tokens, num_heads * head_dim, qkv)
    if tokens > 0:
        depends = dependent and can_depend(qkv.device)
        launch = launch or default_launch(tokens, num_heads, num_kv_heads, head_dim, qkv.element_size())
        if launch.block_t * power_of_two(num_heads // num_kv_heads) < 16:
            raise ValueError(f"{launch.block_t} tokens of a group of heads are less than 16 rows.")
        prefill_attention_kernel[(-(-tokens // launch.block_t), num_kv_heads)](
            qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, o, tokens, eps, scale * LOG2_E,
            HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, GROUP=power_of_two(num_heads // num_kv_heads),
            BLOCK_T=launch.block_t, BLOCK_N=launch.block_n, BLOCK_HALF=max(16, power_of_two(head_dim // 2)),
            ONE_TILE=tokens <= launch.block_n, DEPENDENT=depends, num_warps=launch.num_warps,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return o


def fits(num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, device: torch.device) -> bool:
    """Whether the largest program of a default launch has room in this GPU's shared memory: keys, values and twice its
    rows (queries, weights). Small GPUs have 64 or 99 KiB."""
    if device.type != "cuda" or not HAVE_TRITON:
        return True
    rows = max(MOST_ROWS, power_of_two(num_heads // num_kv_heads))
    wanted = power_of_two(head_dim) * element_bytes * 2 * (max(keys_of_a_tile(head_dim, element_bytes)) + rows)
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
