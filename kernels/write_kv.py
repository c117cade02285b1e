"""Write keys and values to the paged cache, in one launch instead of two scatters.

    k, v              [tokens, kv_heads, head_dim]   float32, float16 or bfloat16; rows may be strided, heads not
    slot_mapping      [tokens] int32 (or int64)      block * block_size + offset; -1: do not write
    k_cache, v_cache  [num_blocks, block_size, kv_heads, head_dim]   written in place, each slot at most once

Nothing is fused: this is what an engine without `qk_norm_rope_cache` uses. A program copies one token.
"""

from __future__ import annotations

from torch import Tensor

from kernels._checks import check_integers, check_like
from kernels._triton import runs_triton, tl, triton


def reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The same in plain PyTorch."""
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    k_cache.flatten(0, 1)[slots] = k[written]
    v_cache.flatten(0, 1)[slots] = v[written]


@triton.jit
def write_kv_kernel(k, v, k_cache, v_cache, slots, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One token's key and value, unless its slot is negative."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < tl.where(slot >= 0, WIDTH, 0)
    tl.store(k_cache + slot * WIDTH + at, tl.load(k + token * k_stride + at, mask=mask), mask=mask)
    tl.store(v_cache + slot * WIDTH + at, tl.load(v + token * v_stride + at, mask=mask), mask=mask)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot] = k and v_cache[slot] = v for each token's slot; shapes as in this module's docstring.

    Slots are not checked against the cache (they lie on the device). ValueError if the other arguments do not fit.
    """
    if k.dim() != 3 or v.shape != k.shape or k_cache.dim() != 4:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache of {tuple(k_cache.shape)}.")
    tokens, heads, dim = k.shape
    shape = (k_cache.shape[0], k_cache.shape[1], heads, dim)
    check_like("k_cache", k_cache, shape, k)
    check_like("v_cache", v_cache, shape, v)
    check_integers("slot_mapping", slot_mapping, (tokens,), k)
    if not runs_triton(k):
        reference(k, v, k_cache, v_cache, slot_mapping)
        return
    if k.stride()[1:] != (dim, 1) or v.stride()[1:] != (dim, 1):
        raise ValueError(
            f"the heads of k and v must lie side by side; their strides are {k.stride()} and {v.stride()}."
        )
    width = heads * dim
    if tokens > 0:
        write_kv_kernel[(tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            k.stride(0),
            v.stride(0),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
        )
