"""What is fused, each idea with a switch, and why one cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from engines.base import InputError
from engines.nano.models import ModelConfig
from engines.nano.options import Options

FEATURES = {
    "norm_qkv": "input_norm+qkv_proj in one kernel",
    "rope_cache": "qk_norm+rope+kv_write in one kernel",
    "norm_gate_up": "post_norm+gate_up_proj+silu_mul in one kernel",
}
DECODE_ROWS = 2
"""Decode replays a graph, so kernel time alone counts: up to here one kernel beats the norm and cuBLAS (H200)."""
PREFILL_ROWS = 1024
"""Prefill is launched op by op, and the host is the slower part: up to here fewer launches are worth more than the
faster product of cuBLAS (H200)."""


@dataclass(frozen=True)
class FusedOptions(Options):
    """nano's options, and:

    features: which fusions are on; all by default
    max_fused_decode_rows, max_fused_prefill_rows: norm and linear are one kernel for steps of up to so many tokens
    """

    features: tuple[str, ...] = tuple(FEATURES)
    max_fused_decode_rows: int = DECODE_ROWS
    max_fused_prefill_rows: int = PREFILL_ROWS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensor_parallel_size != 1:
            raise InputError("Engine fused runs on one GPU: tensor_parallel_size must be 1 (engine nano takes more).")
        object.__setattr__(self, "features", tuple(self.features))
        unknown = [feature for feature in self.features if feature not in FEATURES]
        if unknown:
            raise InputError(f"Feature {unknown[0]!r} of engine fused is not known; known are {', '.join(FEATURES)}.")


def fallbacks(config: ModelConfig, device: torch.device) -> dict[str, str]:
    """Features that this model cannot have on this machine: feature → reason."""
    reasons = {}
    if device.type == "cuda" and not kernels.HAVE_TRITON:
        reasons = dict.fromkeys(FEATURES, "the package triton is not installed")
    elif config.head_dim % 2:
        reasons["rope_cache"] = f"heads of {config.head_dim} have no two halves to rotate"
    return reasons
