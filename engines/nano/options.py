"""What can be set on this engine beyond what all engines share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

from engines.base import InputError


@dataclass(frozen=True)
class Options:
    """`engine.options` of nano; every engine built on it adds its own.

    tensor_parallel_size: GPUs that share the model, one process each
    attention_backend: auto, flash_attn, flash_attn_3, triton or torch
    enforce_eager: no CUDA graphs
    compile: compile small elementwise operations (GPU only)
    block_size: tokens per cache block
    """

    tensor_parallel_size: int = 1
    attention_backend: str = "auto"
    enforce_eager: bool = False
    compile: bool = True
    block_size: int = 256

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise InputError(f"tensor_parallel_size must be at least 1, not {self.tensor_parallel_size}.")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise InputError(f"block_size must be a power of two, not {self.block_size}.")

    @classmethod
    def parse(cls, given: Mapping[str, Any], engine: str) -> Self:
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}."
                raise InputError(f"Engine {engine} has no option {name!r}{hint}")
        return cls(**given)
