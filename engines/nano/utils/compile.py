"""Compilation of small elementwise functions, where there is a GPU to gain from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

import kernels

enabled = True
"""Set to False before a model runs to keep its small operations as PyTorch's own kernels."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method through torch.compile when its first tensor is on a GPU and Triton is there, else as it is.

    Torch compiles for the first number of rows it meets, once more for any number at the second, and for one row: the
    model runner's warm-up meets all three, so that no step waits for the compiler.
    """
    fast: Callable[..., Any] | None = None

    @wraps(function)
    def call(self: Any, x: torch.Tensor, *args: Any) -> Any:
        nonlocal fast
        if not (enabled and x.is_cuda and kernels.HAVE_TRITON):
            return function(self, x, *args)
        if fast is None:
            fast = torch.compile(function)  # not sooner: it imports the compiler, which takes seconds
        return fast(self, x, *args)

    return call
