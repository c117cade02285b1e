"""What a kernel fuses, in the shared vocabulary of layers, and the memory traffic that saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fusion:
    """One fused kernel.

    `ops` holds the names this kernel may stand for in results ("input_norm+qkv_proj"). `function` is the public entry,
    `reference` the plain PyTorch that computes the same from the same arguments. `saved_bytes` takes the shapes
    as keywords and returns the bytes of intermediate tensors that unfused kernels would write and read again.
    """

    name: str
    ops: tuple[str, ...]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    saved_bytes: Callable[..., int]
