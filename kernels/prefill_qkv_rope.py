"""QKV projection of many rows whose end is head norms, rotation and the write to the paged cache.

    x             [rows, hidden]                                  normalised rows; float16, bfloat16 or float32
    weight        [(heads + 2 * kv_heads) * head_dim, hidden]     q's heads, k's, v's
    bias          [(heads + 2 * kv_heads) * head_dim]             optional
    q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache    as in kernels/qk_norm_rope_cache.py
    q             [rows, heads, head_dim]                         the result
    k, v          [rows, kv_heads, head_dim]                      wanted where attention does not read the cache

With h = x W^T + b, each q and k head: h = gamma * h / rms(h), then with its halves (a, b):
(a cos - b sin, b cos + a sin). Everything up to the store is float32; all that is returned or cached is rounded once.

Fused: projection, bias, both norms, rotation, cache write. Saved: the write and read of the projection's output
(2 * rows * (heads + 2 * kv_heads) * head_dim elements), and what `qk_norm_rope_cache` saves.

A tile holds whole heads of one kind, and a thread both halves of what it rotates: nothing but the sums of squares and
the result on its way out moves between threads. How tiles are made and launched: kernels/prefill_linear.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_cache_write, check_float, check_like, check_rotation
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton
from kernels.prefill_linear import (
    Launch,
    best_launch,
    can_describe,
    default_launch,
    described,
    described_rows,
    product_tile,
    programs,
    tile_at,
)
from kernels.qk_norm_rope_cache import reference as qk_norm_rope_cache_reference
from kernels.qk_norm_rope_cache import saved_bytes as saved_behind


def reference(
    x: Tensor, weight: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, bias: Tensor | None = None, return_kv: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in plain PyTorch, computed in float32."""
    qkv = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    wide_k, wide_v = k_cache.float(), v_cache.float()
    q, k, v = qk_norm_rope_cache_reference(
        qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, wide_k, wide_v, num_heads, num_kv_heads, head_dim,
        eps, return_kv=True,
    )  # fmt: skip
    k_cache.copy_(wide_k)
    v_cache.copy_(wide_v)
    return (q.to(x.dtype), k.to(x.dtype), v.to(x.dtype).contiguous()) if return_kv else q.to(x.dtype)


@triton.jit
def _qkv_tile(
    x, weight, bias, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q_out, k_out, v_out, eps,
    first_row, first_head, rows, K: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIBED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one kind for BLOCK_M rows.

    AHEAD: positions are loaded before the product, so that its end waits for one load, the rotary table's, and not for
    two in a row. Where the loop over tiles is one with the product's, they would be kept all through it, and registers
    would not suffice.
    """
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = D // 2
    DTYPE: tl.constexpr = q_out.dtype.element_ty
    is_q = first_head < HEADS
    is_v = first_head >= HEADS + KV_HEADS
    row = first_row + tl.arange(0, BLOCK_M)
    in_rows = row < rows
    turned = row < tl.where(is_v, 0, rows)  # a value's angle is 0
    if AHEAD:
        position = tl.load(positions + row, mask=turned, other=0).to(tl.int32)
    heads = product_tile(
        x, weight, first_row, first_head * D, rows, ALL * D, K, 1, BLOCK_M, BLOCK_H * D, BLOCK_K, DESCRIBED
    )
    if bias is not None:
        heads += tl.load(bias + first_head * D + tl.arange(0, BLOCK_H * D)).to(tl.float32)[None, :]
    a, b = tl.split(tl.permute(tl.reshape(heads, [BLOCK_M, BLOCK_H, 2, HALF]), [0, 1, 3, 2]))
    half = tl.arange(0, HALF)
    if q_weight is not None:
        gamma = tl.where(is_q, q_weight, k_weight) + half
        shown = half < tl.where(is_v, 0, HALF)
        gamma_a = tl.load(gamma, mask=shown, other=1.0).to(tl.float32)
        gamma_b = tl.load(gamma + HALF, mask=shown, other=1.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=2) / D + eps)
        scale = tl.where(is_v, 1.0, scale)[:, :, None]
        a = a * scale * gamma_a[None, None, :]
        b = b * scale * gamma_b[None, None, :]
    if not AHEAD:
        position = tl.load(positions + row, mask=turned, other=0).to(tl.int32)
    angle = cos_sin + position.to(tl.int64)[:, None] * D + half[None, :]
    cos = tl.load(angle, mask=turned[:, None], other=1.0)[:, None, :]
    sin = tl.load(angle + HALF, mask=turned[:, None], other=0.0)[:, None, :]
    rotated_a = (a * cos - b * sin).to(DTYPE)
    rotated_b = (b * cos + a * sin).to(DTYPE)
    result = tl.reshape(tl.permute(tl.join(rotated_a, rotated_b), [0, 1, 3, 2]), [BLOCK_M, BLOCK_H * D])

    # Heads of one kind lie side by side in all that is written; the place of a row is its own.
    slot = tl.load(slot_mapping + row, mask=in_rows, other=-1).to(tl.int64)
    column = tl.arange(0, BLOCK_H * D)
    kv_head = tl.where(is_v, first_head - HEADS - KV_HEADS, first_head - HEADS)
    cached = tl.where(is_q, q_out + first_head * D, tl.where(is_v, v_cache, k_cache) + kv_head * D)
    place = tl.where(is_q, row.to(tl.int64) * (HEADS * D), slot * (KV_HEADS * D))
    written = in_rows & (is_q | (slot >= 0))
    tl.store(cached + place[:, None] + column[None, :], result, mask=written[:, None])
    if k_out is not None:
        apart = tl.where(is_v, v_out, k_out) + kv_head * D + row.to(tl.int64)[:, None] * (KV_HEADS * D)
        tl.store(apart + column[None, :], result, mask=(row < tl.where(is_q, 0, rows))[:, None])


@triton.jit(do_not_specialize=["rows"])
def prefill_qkv_rope_kernel(
    x, weight, bias, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q_out, k_out, v_out, rows,
    eps, K: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DESCRIBED: tl.constexpr,
    PERSISTENT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile, or every so-many-th; x and weight are descriptors or pointers."""
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    head_blocks: tl.constexpr = (HEADS + 2 * KV_HEADS) // BLOCK_H
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), row_blocks * head_blocks, tl.num_programs(0), flatten=True):
            row, head = tile_at(index, row_blocks, head_blocks, GROUP_M)
            _qkv_tile(
                x, weight, bias, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q_out, k_out,
                v_out, eps, row * BLOCK_M, head * BLOCK_H, rows, K, HEADS, KV_HEADS, D, BLOCK_M, BLOCK_H, BLOCK_K,
                DESCRIBED, AHEAD=False,
            )  # fmt: skip
    else:
        row, head = tile_at(tl.program_id(0), row_blocks, head_blocks, GROUP_M)
        _qkv_tile(
            x, weight, bias, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q_out, k_out,
            v_out, eps, row * BLOCK_M, head * BLOCK_H, rows, K, HEADS, KV_HEADS, D, BLOCK_M, BLOCK_H, BLOCK_K,
            DESCRIBED, AHEAD=True,
        )  # fmt: skip


def takes(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel has tiles for such heads: their dimension is a power of two from 16 to 256."""
    return head_dim in (16, 32, 64, 128, 256) and num_heads > 0 and num_kv_heads > 0


def fits(launch: Launch, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the launch's tiles hold whole heads of one kind."""
    tile_heads = launch.block_n // head_dim
    return (
        tile_heads * head_dim == launch.block_n and tile_heads > 0 and num_heads % tile_heads == 0
        and num_kv_heads % tile_heads == 0 and launch.pieces == 1
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    bias: Tensor | None,
) -> None:  # fmt: skip
    check_float("x", x, 2)
    hidden = x.shape[1]
    if hidden == 0:
        raise ValueError("x must have at least one column.")
    if not takes(num_heads, num_kv_heads, head_dim):
        raise ValueError(f"head_dim must be a power of two from 16 to 256, not {head_dim}.")
    out = (num_heads + 2 * num_kv_heads) * head_dim
    check_like("weight", weight, (out, hidden), x)
    if bias is not None:
        check_like("bias", bias, (out,), x)
    check_rotation(q_weight, k_weight, cos_sin, positions, head_dim, x)
    check_cache_write(slot_mapping, k_cache, v_cache, num_kv_heads, head_dim, x)


def prefill_qkv_rope(
    x: Tensor, weight: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
    eps: float, bias: Tensor | None = None, return_kv: bool = False, launch: Launch | None = None,
    dependent: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Project, norm and rotate q and k, write k and v to their cache slots; shapes as in this module's docstring.

    Returns q, or (q, k, v) with `return_kv`. Positions and slots are not checked against their tables (they lie on the
    device). `launch`: how; else as measured, or as every GPU can. `dependent`: start while the kernel before it in the
    stream still runs, where the GPU can; it is waited for. ValueError if the other arguments do not fit.
    """
    _check(
        x, weight, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, num_kv_heads,
        head_dim, bias,
    )  # fmt: skip
    if not runs_triton(x):
        return reference(
            x, weight, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, num_kv_heads,
            head_dim, eps, bias, return_kv,
        )  # fmt: skip
    rows, hidden = x.shape
    launch = launch or best_launch("prefill_qkv_rope", weight.shape[0], hidden, rows, x.dtype, x.device)
    launch = launch or _default_launch(head_dim, x.element_size())
    if not fits(launch, num_heads, num_kv_heads, head_dim):
        raise ValueError(f"tiles of {launch.block_n} columns hold no whole heads of {head_dim} of one kind.")
    q = torch.empty((rows, num_heads, head_dim), dtype=x.dtype, device=x.device)
    k = v = None
    if return_kv:
        k = torch.empty((rows, num_kv_heads, head_dim), dtype=x.dtype, device=x.device)
        v = torch.empty((rows, num_kv_heads, head_dim), dtype=x.dtype, device=x.device)
    if rows > 0:
        operands = (x, weight)
        if describes := can_describe(*operands):
            operands = (
                described_rows(x, (launch.block_m, launch.block_k)),
                described(weight, (launch.block_n, launch.block_k), parts=1),
            )
        tiles = -(-rows // launch.block_m) * (weight.shape[0] // launch.block_n)
        depends = dependent and can_depend(x.device)
        prefill_qkv_rope_kernel[(programs(launch, tiles, x.device),)](
            *operands, bias, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache, q, k, v, rows, eps,
            K=hidden, HEADS=num_heads, KV_HEADS=num_kv_heads, D=head_dim, BLOCK_M=launch.block_m,
            BLOCK_H=launch.block_n // head_dim, BLOCK_K=launch.block_k, GROUP_M=launch.group_m, DESCRIBED=describes,
            PERSISTENT=launch.per_sm > 0, DEPENDENT=depends, num_warps=launch.num_warps, num_stages=launch.num_stages,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return q if k is None or v is None else (q, k, v)


def _default_launch(head_dim: int, element_bytes: int) -> Launch:
    """One head a tile."""
    default = default_launch(element_bytes)
    return replace(default, block_n=head_dim)


def saved_bytes(
    rows: int, num_heads: int, num_kv_heads: int, head_dim: int, element_bytes: int, norm: bool = True
) -> int:
    """Write and read of the projection's output, and what the kernel behind it saves."""
    projected = 2 * rows * (num_heads + 2 * num_kv_heads) * head_dim * element_bytes
    return projected + saved_behind(rows, num_heads, num_kv_heads, head_dim, element_bytes, norm)


FUSION = Fusion(
    "prefill_qkv_rope", ("qkv_proj+qk_norm+rope+kv_write", "qkv_proj+rope+kv_write"), prefill_qkv_rope, reference,
    saved_bytes,
)  # fmt: skip
