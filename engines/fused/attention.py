"""What lies between the QKV and the output projection of a fused layer, in one kernel or a few."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import kernels
from engines.fused.context import DecodeContext, depends
from engines.fused.products import prefill_launch
from engines.nano.models.decoder import Attention
from engines.nano.utils.context import StepContext
from kernels.causal_attention import best_launch as best_causal_launch
from kernels.prefill_attention import fits
from kernels.prefill_qkv_rope import fits as holds_heads
from kernels.prefill_qkv_rope import takes as takes_heads

Rotated = tuple[Tensor, Tensor | None, Tensor | None]
"""q, k and v as attention takes them."""
Behind = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, float]
"""Both norms' gammas, the rotary table, positions, slots or blocks of the cache, keys and values in it, query heads,
key/value heads, their dimension and the norms' epsilon: what kernels that norm and rotate take behind their input."""
MAX_PREFILL_ATTENTION = 256
"""Tokens of a step up to which one kernel is faster than rotation and attention apart."""


class _OfAttention(nn.Module):
    """Part of one attention, whose weights and cache it reads."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple, since its weights are not this module's

    def _behind(self, positions: Tensor, places: Tensor) -> Behind:
        (a,) = self._attention
        gammas = (a.q_norm.weight, a.k_norm.weight) if a.q_norm and a.k_norm else (None, None)
        return (
            *gammas, a.rotary.table, positions, places, a.kv_write.k_cache, a.kv_write.v_cache,
            a.heads, a.kv_heads, a.dim, a.q_norm.eps if a.q_norm else 0.0,
        )  # fmt: skip


class RopeCache(_OfAttention):
    """Head norms, rotation and cache write in one kernel, from the joint projection [tokens, q + k + v]."""

    def forward(
        self, qkv: Tensor, positions: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [tokens, heads, dim]; and k, v [tokens, kv_heads, dim] where attention may use them without the cache."""
        wants_kv = context.cu_seqlens_k is not None and not context.is_decode
        result: Any = kernels.qk_norm_rope_cache(
            qkv, *self._behind(positions, context.slot_mapping), return_kv=wants_kv, dependent=depends(context)
        )
        return result if wants_kv else (result, None, None)


class QkvRope(_OfAttention):
    """Projection, head norms, rotation and cache write in one kernel, for prefill of many rows."""

    def launch(self, hidden: Tensor, context: StepContext) -> Any:
        """How one kernel is the faster way; None where it is not, or not possible."""
        (a,) = self._attention
        launch = prefill_launch("prefill_qkv_rope", hidden, a.qkv_proj.weight, context)
        heads = a.heads, a.kv_heads, a.dim
        possible = launch is not None and takes_heads(*heads) and holds_heads(launch, *heads)
        return launch if possible else None

    def forward(self, normed: Tensor, positions: Tensor, context: StepContext, launch: Any) -> Rotated:
        """q [tokens, heads, dim]; and k, v [tokens, kv_heads, dim] where attention may use them without the cache."""
        (a,) = self._attention
        wants_kv = context.cu_seqlens_k is not None
        result: Any = kernels.prefill_qkv_rope(
            normed, a.qkv_proj.weight, *self._behind(positions, context.slot_mapping), bias=a.qkv_proj.bias,
            return_kv=wants_kv, launch=launch, dependent=depends(context),
        )  # fmt: skip
        return result if wants_kv else (result, None, None)


class PrefillAttention(_OfAttention):
    """All between qkv_proj and o_proj in one kernel, for short prompts: [tokens, q + k + v] → [tokens, heads · dim]."""

    def takes(self, qkv: Tensor, context: StepContext) -> bool:
        """Whether one kernel is the faster way, and possible: nothing of the prompts may be in the cache before."""
        if context.cu_seqlens_k is None or context.is_decode or qkv.shape[0] > MAX_PREFILL_ATTENTION:
            return False
        (a,) = self._attention
        return fits(a.heads, a.kv_heads, a.dim, qkv.element_size(), qkv.device)

    def forward(self, qkv: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        (a,) = self._attention
        return kernels.prefill_attention(
            qkv, *self._behind(positions, context.slot_mapping), a.attention.scale, dependent=depends(context)
        )


class CausalAttention(_OfAttention):
    """Attention of prompts of which nothing was in the cache before, from q, k and v [tokens, heads, dim]."""

    def launch(self, q: Tensor, context: StepContext) -> Any:
        """How its kernel is the faster way; None where it is not, or keys are to come from the cache."""
        if context.is_decode or context.cu_seqlens_k is None:
            return None
        (a,) = self._attention
        longest = min(context.max_seqlen_q, len(q), context.block_tables.shape[1] * a.kv_write.k_cache.shape[1])
        return best_causal_launch(a.heads, a.kv_heads, a.dim, len(q), longest, q.dtype, q.device)

    def forward(self, rotated: Rotated, positions: Tensor, context: StepContext, launch: Any) -> Tensor:
        """[tokens, heads · dim], in the way that `launch` says."""
        (a,) = self._attention
        q, k, v = rotated
        assert k is not None and v is not None
        return kernels.causal_attention(
            q, k, v, positions, a.attention.scale, dependent=depends(context), launch=launch
        ).flatten(1)


class DecodeAttention(_OfAttention):
    """All between qkv_proj and o_proj in one kernel: [rows, q + k + v] → [rows, heads · dim]."""

    def forward(self, qkv: Tensor, positions: Tensor, context: DecodeContext, workspace: Any) -> Tensor:
        (a,) = self._attention
        return kernels.decode_attention(
            qkv, *self._behind(positions, context.block_tables), a.attention.scale, workspace=workspace,
            dependent=context.dependent, max_context=context.max_seqlen_k,
        )  # fmt: skip
