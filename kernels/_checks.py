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


def _check_place(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments are on {like.device}.")
    _check_contiguous(name, tensor)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; its strides are {tensor.stride()}: call .contiguous() first.")
