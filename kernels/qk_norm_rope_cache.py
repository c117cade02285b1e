"""QK-norm, rotary embedding and the write of keys and values into the paged cache, in one kernel.

    qkv           [tokens, (heads + 2 * kv_heads) * head_dim]   q heads, k heads, v heads; float32, float16, bfloat16
    q_weight      [head_dim] or None                            gamma of the norm of each q head; None: no norm
    k_weight      [head_dim] or None                            the same for k; both or neither
    cos_sin       [max_pos, head_dim] float32                   cosines of head_dim / 2 angles, then their sines
    positions     [tokens] int64 (or int32)                     each token's position, below max_pos
    slot_mapping  [tokens] int32 (or int64)                     block * block_size + offset; -1: do not write
    k_cache, v_cache  [num_blocks, block_size, kv_heads, head_dim]   written in place, each slot at most once
    q             [tokens, heads, head_dim]                     the result

Each q and k head: h = gamma * h / rms(h), then with its halves (a, b): (a cos - b sin, b cos + a sin), as in GPT-NeoX.
Everything between load and store is float32.

Fused: split, both norms, rotation, cache write. Saved: writes and reads of the normalised q and k, and the write and
read of the rotated k before it goes to the cache. A program takes one token and a few of its heads of any kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._checks import check_cache_write, check_qkv
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._triton import power_of_two, runs_triton, tl, triton

LAUNCHES = ((64, 2, 1), (1024, 4, 1), (1 << 62, 8, 2))
"""(up to so many tokens, heads of one program, its warps): few tokens need many small programs to fill the GPU."""


def reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, return_kv: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, computed in float32."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float()
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qkv.dtype)

    q, k = rotated(q, q_weight), rotated(k, k_weight)
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    k_cache.view(-1, num_kv_heads, head_dim)[slots] = k[written]
    v_cache.view(-1, num_kv_heads, head_dim)[slots] = v[written]
    return (q, k, v) if return_kv else q


@triton.jit
def qk_norm_rope_cache_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q_out, k_out, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_H of its query, key and value heads; programs go through memory in its order."""
    let_next_start(DEPENDENT)
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    head_blocks: tl.constexpr = (ALL + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // head_blocks).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    kv_head = tl.where(head < HEADS + KV_HEADS, head - HEADS, head - HEADS - KV_HEADS)
    d = tl.arange(0, BLOCK_HALF)
    in_half = d < HALF
    is_q = (head < HEADS)[:, None] & in_half[None, :]
    is_k = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & in_half[None, :]
    is_v = ((head >= HEADS + KV_HEADS) & (head < ALL))[:, None] & in_half[None, :]
    mask = is_q | is_k | is_v
    # Positions, slots, gammas and the rotary table: no kernel of a step writes them. All tiles have the heads' shape,
    # so that each thread loads what it needs of them and nothing moves between threads.
    angles = tl.zeros_like(head)[:, None] + tl.load(positions + token).to(tl.int32) * HEAD_DIM + d[None, :]
    cos = tl.load(cos_sin + angles, mask=mask, other=0.0)
    sin = tl.load(cos_sin + angles + HALF, mask=mask, other=0.0)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if q_weight is not None:
        gamma = tl.where(head < HEADS, q_weight, k_weight)[:, None] + d[None, :]
        gamma_a = tl.load(gamma, mask=mask, other=0.0).to(tl.float32)
        gamma_b = tl.load(gamma + HALF, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT)
    source = qkv + token * (ALL * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    raw_a = tl.load(source, mask=mask, other=0.0)
    raw_b = tl.load(source + HALF, mask=mask, other=0.0)
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)
    if q_weight is not None:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD_DIM + eps)
        a = a * scale[:, None] * gamma_a
        b = b * scale[:, None] * gamma_b
    rotated_a = (a * cos - b * sin).to(raw_a.dtype)
    rotated_b = (b * cos + a * sin).to(raw_a.dtype)

    to_q = q_out + token * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    tl.store(to_q, rotated_a, mask=is_q)
    tl.store(to_q + HALF, rotated_b, mask=is_q)
    inside = kv_head[:, None] * HEAD_DIM + d[None, :]
    if k_out is not None:
        to_k = k_out + token * (KV_HEADS * HEAD_DIM) + inside
        tl.store(to_k, rotated_a, mask=is_k)
        tl.store(to_k + HALF, rotated_b, mask=is_k)
    written = (kv_head < tl.where(slot >= 0, KV_HEADS, 0))[:, None]
    cached = slot * (KV_HEADS * HEAD_DIM) + inside
    tl.store(k_cache + cached, rotated_a, mask=is_k & written)
    tl.store(k_cache + cached + HALF, rotated_b, mask=is_k & written)
    tl.store(v_cache + cached, raw_a, mask=is_v & written)
    tl.store(v_cache + cached + HALF, raw_b, mask=is_v & written)


def qk_norm_rope_cache(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, return_kv: bool = False, dependent: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Norm and rotate q and k, write k and v to their cache slots; shapes as in this module's docstring.

    Returns q, or (q, k [tokens, kv_heads, head_dim], v, a view into qkv) with `return_kv`. Positions and slots are
    not checked against their tables (they lie on the device). ValueError if the other arguments do not fit.

    `dependent`: start while the kernel before it in the stream still runs, where the GPU can; it is waited for, but
    positions, slots and the table must have been written before it started.
    """
    check_qkv(qkv, q_weight, k_weight, cos_sin, positions, num_heads, num_kv_heads, head_dim)
    check_cache_write(slot_mapping, k_cache, v_cache, num_kv_heads, head_dim, qkv)
    if not runs_triton(qkv):
        return reference(
            qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, num_kv_heads,
            head_dim, eps, return_kv,
        )  # fmt: skip
    tokens = qkv.shape[0]
    q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((tokens, num_kv_heads, head_dim), dtype=qkv.dtype, device=qkv.device) if return_kv else None
    if tokens > 0:
        heads = num_heads + 2 * num_kv_heads
        block_h, warps = next((block, warps) for limit, block, warps in LAUNCHES if tokens <= limit)
        depends = dependent and can_depend(qkv.device)
        qk_norm_rope_cache_kernel[(tokens * -(-heads // block_h),)](
            qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q, k, eps,
            HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            BLOCK_H=block_h, BLOCK_HALF=power_of_two(head_dim // 2), DEPENDENT=depends, num_warps=warps,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    if k is None:
        return q
    return q, k, qkv.view(tokens, -1, head_dim)[:, num_heads + num_kv_heads :]


def saved_bytes(
    tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, norm: bool = True
) -> int:
    """Write and read of q and k between norm and rotation, and of k between rotation and cache."""
    between = (num_heads + num_kv_heads if norm else 0) + num_kv_heads
    return 2 * tokens * between * head_dim * element_bytes


FUSION = Fusion(
    "qk_norm_rope_cache", ("qk_norm+rope+kv_write", "rope+kv_write"), qk_norm_rope_cache, reference, saved_bytes
)
