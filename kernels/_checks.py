"""Argument checks that the public functions share. They cost about a microsecond per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check_float(name: str, tensor: Tensor, dims: int) -> None:
    """`tensor` must be contiguous, of a float type the kernels know, with `dims` dimensions; else ValueError."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, not shape {tuple(tensor.shape)}.")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {tensor.dtype}.")
    _check_contiguous(name, tensor)


def check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`tensor` must be contiguous, of `shape`, on the device of `like` and of its dtype (or of `dtype`)."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}.")
    if tensor.dtype != (dtype or like.dtype):
        raise ValueError(f"{name} must be {dtype or like.dtype}, not {tensor.dtype}.")
    _check_place(name, tensor, like)


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """`tensor` must be contiguous int32 or int64, of `shape`, on the device of `like`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}.")
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int32 or int64, not {tensor.dtype}.")
    _check_place(name, tensor, like)


def check_qkv(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor, heads: int,
    kv_heads: int, head_dim: int,
) -> None:  # fmt: skip
    """The joint projection [tokens, (heads + 2 * kv_heads) * head_dim], the norms of heads, rotary table, positions."""
    check_float("qkv", qkv, 2)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even, since its halves are rotated against each other, not {head_dim}.")
    if qkv.shape[1] != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"qkv must have ({heads} + 2 * {kv_heads}) * {head_dim} columns for its heads, not {qkv.shape[1]}."
        )
    check_rotation(q_weight, k_weight, cos_sin, positions, head_dim, qkv)


def check_rotation(
    q_weight: Tensor | None, k_weight: Tensor | None, cos_sin: Tensor, positions: Tensor, head_dim: int, like: Tensor
) -> None:
    """Norms of heads, rotary table and positions, one for each row of `like`."""
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither.")
    if q_weight is not None and k_weight is not None:
        check_like("q_weight", q_weight, (head_dim,), like)
        check_like("k_weight", k_weight, (head_dim,), like)
    check_like("cos_sin", cos_sin, (cos_sin.shape[0], head_dim), like, torch.float32)
    check_integers("positions", positions, (like.shape[0],), like)


def check_cache_write(
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, kv_heads: int, head_dim: int, like: Tensor
) -> None:
    """A slot for each row of `like`, and the caches [num_blocks, block_size, kv_heads, head_dim]."""
    check_integers("slot_mapping", slot_mapping, (like.shape[0],), like)
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache must have 4 dimensions, not shape {tuple(k_cache.shape)}.")
    shape = (k_cache.shape[0], k_cache.shape[1], kv_heads, head_dim)
    check_like("k_cache", k_cache, shape, like)
    check_like("v_cache", v_cache, shape, like)


def _check_place(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {like.device}.")
    _check_contiguous(name, tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}: call .contiguous() first.")
