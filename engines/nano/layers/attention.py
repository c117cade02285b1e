"""Attention over the paged cache, behind one small interface.

A backend is a function of queries, the step's own keys and values, the layer's cache and the step's context; the cache
already holds the step's keys and values when it is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernels
from engines.base import InputError
from engines.nano.utils.context import StepContext
from kernels.paged_attention import reference as paged_attention_reference

Backend = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, StepContext, float], Tensor]


class KVWrite(nn.Module):
    """Writes a step's keys and values, [tokens, kv_heads, dim] each, to their slots of the cache.

    The cache tensors [blocks, block_size, kv_heads, dim] are set by the model runner once it knows how many fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(self, k: Tensor, v: Tensor, context: StepContext) -> None:
        kernels.write_kv(k, v, self.k_cache, self.v_cache, context.slot_mapping)


class PagedAttention(nn.Module):
    """Causal attention of q [tokens, heads, dim] over each sequence's cache; output [tokens, heads · dim]."""

    def __init__(self, cache: KVWrite, head_dim: int, backend: Backend) -> None:
        super().__init__()
        self._cache = (cache,)
        self.scale = head_dim**-0.5
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor | None, v: Tensor | None, context: StepContext) -> Tensor:
        (cache,) = self._cache
        return self.backend(q, k, v, cache.k_cache, cache.v_cache, context, self.scale).flatten(1)


def torch_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, context: StepContext, scale: float
) -> Tensor:
    """Plain PyTorch, one sequence at a time: for machines without a GPU."""
    return paged_attention_reference(
        q, k_cache, v_cache, context.block_tables, context.cu_seqlens_q, context.seqlens_k, context.max_seqlen_q, scale
    )


def triton_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, context: StepContext, scale: float
) -> Tensor:
    """Our own kernels: need nothing but Triton."""
    return kernels.paged_attention(
        q, k_cache, v_cache, context.block_tables, context.cu_seqlens_q, context.seqlens_k, context.max_seqlen_q, scale
    )


def flash_attention_2() -> Backend:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    def attend(
        q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, ctx: StepContext, scale: float
    ) -> Tensor:
        if ctx.is_decode:
            return flash_attn_with_kvcache(
                q.unsqueeze(1), k_cache, v_cache, cache_seqlens=ctx.seqlens_k, block_table=ctx.block_tables,
                softmax_scale=scale, causal=True,
            ).squeeze(1)  # fmt: skip
        if k is not None and ctx.cu_seqlens_k is not None:
            return flash_attn_varlen_func(
                q, k, v, ctx.cu_seqlens_q, ctx.cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k,
                softmax_scale=scale, causal=True,
            )  # fmt: skip
        cu_seqlens_k = torch.nn.functional.pad(ctx.seqlens_k.cumsum(0, dtype=torch.int32), (1, 0))
        return flash_attn_varlen_func(
            q, k_cache, v_cache, ctx.cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k,
            softmax_scale=scale, causal=True, block_table=ctx.block_tables,
        )  # fmt: skip

    return attend


def flash_attention_3() -> Backend:
    """FlashAttention 3 as vLLM bundles it (Hopper)."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def attend(
        q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor, ctx: StepContext, scale: float
    ) -> Tensor:
        if k is not None and ctx.cu_seqlens_k is not None and not ctx.is_decode:
            return flash_attn_varlen_func(
                q, k, v, max_seqlen_q=ctx.max_seqlen_q, cu_seqlens_q=ctx.cu_seqlens_q, max_seqlen_k=ctx.max_seqlen_k,
                cu_seqlens_k=ctx.cu_seqlens_k, softmax_scale=scale, causal=True, fa_version=3,
            )  # fmt: skip
        return flash_attn_varlen_func(
            q, k_cache, v_cache, max_seqlen_q=ctx.max_seqlen_q, cu_seqlens_q=ctx.cu_seqlens_q,
            max_seqlen_k=ctx.max_seqlen_k, seqused_k=ctx.seqlens_k, block_table=ctx.block_tables,
            softmax_scale=scale, causal=True, fa_version=3,
        )  # fmt: skip

    return attend


BACKENDS: dict[str, Callable[[], Backend]] = {
    "flash_attn": flash_attention_2,
    "flash_attn_3": flash_attention_3,
    "triton": lambda: triton_attention,
    "torch": lambda: torch_attention,
}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Backend]:
    """The named backend, or for `auto` the fastest this machine has: (its name, the function)."""
    if name == "auto":
        name = _fastest(device, dtype)
    if name not in BACKENDS:
        raise InputError(f"Attention backend {name!r} is not known; known are auto, {', '.join(BACKENDS)}.")
    try:
        return name, BACKENDS[name]()
    except ImportError as error:
        raise InputError(f"Attention backend {name!r} cannot be used here: {error}.") from None


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "torch"
    ours = "triton" if kernels.HAVE_TRITON else "torch"
    if dtype is torch.float32:
        return ours  # FlashAttention takes half precision only
    if torch.cuda.get_device_capability(device) == (9, 0) and _importable("vllm.vllm_flash_attn"):
        return "flash_attn_3"
    return "flash_attn" if _importable("flash_attn") else ours


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
