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
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither.")
    if q_weight is not None and k_weight is not None:
        check_like("q_weight", q_weight, (head_dim,), qkv)
        check_like("k_weight", k_weight, (head_dim,), qkv)
    check_like("cos_sin", cos_sin, (cos_sin.shape[0], head_dim), qkv, torch.float32)
    check_integers("positions", positions, (qkv.shape[0],), qkv)


def _check_place(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {like.device}.")
    _check_contiguous(name, tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}: call .contiguous() first.")
