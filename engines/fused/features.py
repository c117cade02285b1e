"""What is fused, each idea with a switch, and why one cannot be had."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from engines.base import InputError
from engines.nano.graphs import why_no_graphs
from engines.nano.models import ModelConfig
from engines.nano.options import Options

FEATURES = {
    "device_loop": "decode state stays on the device, and a step is launched before the one before it was read",
    "dependent": "decode kernels start while the kernel before them ends (compute capability 9.0 on)",
    "norm_qkv": "input_norm+qkv_proj in one kernel",
    "attention": "decode: qk_norm+rope+kv_write+attention in one kernel",
    "prefill_attention": "short prompts: the same in one kernel; longer ones: attention by a dependent kernel",
    "rope_cache": "elsewhere: qk_norm+rope+kv_write in one kernel",
    "residual": "decode: the residual is added by the kernels of o_proj and down_proj",
    "norm_gate_up": "post_norm+gate_up_proj+silu_mul in one kernel",
    "prefill_epilogues": "many rows: gate_up_proj+silu_mul in one kernel; prefill: qkv_proj+qk_norm+rope+kv_write too",
    "half_norm": "decode, many rows: o_proj and down_proj also make half of the norm that comes next",
    "prefill_products": "captured prefill steps of few tokens: products as decode makes them",
    "head": "decode, captured prefill steps: final_norm+lm_head, and the sampler's sums in its end",
    "last_rows": "prefill: after its keys, the last layer goes on with the rows to draw from alone",
    "prefill_graphs": "prefill steps are captured graphs too, as long as the host would take longer",
}

SMALLEST_BLOCK = 16
"""Tokens of a cache block that `kernels.decode_attention` takes."""


@dataclass(frozen=True)
class FusedOptions(Options):
    """nano's options, and:

    features: which ideas are on; all by default, and all but some where those are written with a minus (`-head`)
    max_fused_prefill_rows: in prefill, norm and linear are one kernel for steps of up to so many tokens
    """

    features: tuple[str, ...] = tuple(FEATURES)
    max_fused_prefill_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensor_parallel_size != 1:
            raise InputError("Engine fused runs on one GPU: tensor_parallel_size must be 1 (engine nano takes more).")
        unknown = [name for name in self.features if name.removeprefix("-") not in FEATURES]
        if unknown:
            raise InputError(f"Feature {unknown[0]!r} of engine fused is not known; known are {', '.join(FEATURES)}.")
        off = [name[1:] for name in self.features if name.startswith("-")]
        if 0 < len(off) < len(self.features):
            raise InputError("features of engine fused names what is on or, with a minus, what is off; not both.")
        on = [name for name in FEATURES if name not in off] if off else self.features
        object.__setattr__(self, "features", tuple(on))


def fallbacks(config: ModelConfig, device: torch.device, block_size: int) -> dict[str, str]:
    """Features that this model cannot have on this machine: feature → reason."""
    reasons = {}
    if device.type == "cuda" and not kernels.HAVE_TRITON:
        reasons = dict.fromkeys(FEATURES, "the package triton is not installed")
        del reasons["device_loop"]
    elif config.head_dim % 2:
        reasons = dict.fromkeys(
            ("attention", "prefill_attention", "rope_cache"), f"heads of {config.head_dim} have no two halves to rotate"
        )
    elif (device.type == "cuda" or kernels.INTERPRETED) and block_size < SMALLEST_BLOCK:
        reasons["attention"] = f"its kernel takes cache blocks of {SMALLEST_BLOCK} tokens or more"
    if not kernels.can_depend(device):
        reasons["dependent"] = "it needs a GPU of compute capability 9.0 or later"
    if no_graphs := why_no_graphs(device):
        reasons["prefill_graphs"] = no_graphs
        reasons["prefill_products"] = f"it is of captured steps, and {no_graphs}"
    return reasons
