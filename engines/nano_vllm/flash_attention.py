"""The attention that nano-vLLM gets: the flash-attn package, or where there is a faster one, that in its place.

nano-vLLM imports two functions of `flash_attn`. On Hopper, FlashAttention 3 as vLLM bundles it is what vLLM and `nano`
run, so nano-vLLM is given the same: a baseline must not be slower for its installation.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from engines.base import InputError

CHOICES = ("auto", "flash_attn", "flash_attn_3")


def choose(wanted: str) -> str:
    """flash_attn or flash_attn_3. InputError: unknown, or not there."""
    if wanted not in CHOICES:
        raise InputError(f"engine=nano_vllm has no attention {wanted!r}; it has {', '.join(CHOICES)}.")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if wanted != "flash_attn" and hopper and importlib.util.find_spec("vllm") is not None:
        return "flash_attn_3"
    if wanted == "flash_attn_3":
        raise InputError("attention=flash_attn_3 needs a Hopper GPU and the package vllm, which bundles it.")
    if importlib.util.find_spec("flash_attn") is None:
        raise InputError("nano-vLLM needs the package flash-attn: pip install flash-attn")
    return "flash_attn"


@contextmanager
def provided(choice: str) -> Iterator[None]:
    """Inside, `import flash_attn` gives what was chosen. Outside nobody else may take it for the package."""
    if choice == "flash_attn":
        yield
        return
    module = _flash_attention_3()
    before = sys.modules.pop(module.__name__, None)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before


def _flash_attention_3() -> ModuleType:
    """A module with flash-attn's two functions, as far as nano-vLLM calls them, on vLLM's FlashAttention 3."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func as attend

    starts: dict[int, Tensor] = {}

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
        cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, block_table: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if block_table is None:
            keys: dict[str, Tensor | None] = {"cu_seqlens_k": cu_seqlens_k}
        else:
            keys = {"seqused_k": cu_seqlens_k.diff(), "block_table": block_table}
        return attend(
            q, k, v, max_seqlen_q=max_seqlen_q, cu_seqlens_q=cu_seqlens_q, max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale, causal=causal, fa_version=3, **keys,
        )  # fmt: skip

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float, causal: bool,
    ) -> Tensor:  # fmt: skip
        rows = q.shape[0]
        if rows not in starts:  # made once, outside of the graphs, which are captured after a warm-up
            starts[rows] = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
        out = attend(
            q.squeeze(1), k_cache, v_cache, max_seqlen_q=1, cu_seqlens_q=starts[rows],
            max_seqlen_k=block_table.shape[1] * k_cache.shape[1], seqused_k=cache_seqlens, block_table=block_table,
            softmax_scale=softmax_scale, causal=causal, fa_version=3,
        )  # fmt: skip
        return out.unsqueeze(1)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module
