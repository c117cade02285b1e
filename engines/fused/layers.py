"""nano's decoder layer with its operations fused. Weights are nano's own tensors; nothing is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import kernels
from engines.nano.layers.attention import KVWrite
from engines.nano.layers.linear import StackedLinear
from engines.nano.layers.norm import RMSNorm
from engines.nano.models.decoder import MLP, Attention, DecoderLayer
from engines.nano.utils.context import StepContext


class NormLinearKernel(nn.Module):
    """Residual add, norm and linear layer in one kernel: a module of its own, so that it can be timed."""

    def __init__(self, norm: RMSNorm, linear: StackedLinear, gated: bool) -> None:
        super().__init__()
        self._parts = (norm, linear)
        self.gated = gated

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output [tokens, out], residual stream [tokens, hidden])."""
        norm, linear = self._parts
        result: Any
        if self.gated:
            result = kernels.rms_norm_gate_up_silu(hidden, norm.weight, linear.weight, norm.eps, residual)
        else:
            result = kernels.rms_norm_linear(hidden, norm.weight, linear.weight, norm.eps, linear.bias, residual)
        return (result, hidden) if residual is None else result


class RopeCacheKernel(nn.Module):
    """Head norms, rotation and cache write in one kernel, from the joint projection [tokens, q + k + v]."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)

    def forward(
        self, qkv: Tensor, positions: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [tokens, heads, dim]; and k, v [tokens, kv_heads, dim] where attention may use them without the cache."""
        (a,) = self._attention
        wants_kv = context.cu_seqlens_k is not None and not context.is_decode
        result: Any = kernels.qk_norm_rope_cache(
            qkv, a.q_norm.weight if a.q_norm else None, a.k_norm.weight if a.k_norm else None, a.rotary.table,
            positions, context.slot_mapping, a.kv_write.k_cache, a.kv_write.v_cache,
            a.heads, a.kv_heads, a.dim, a.q_norm.eps if a.q_norm else 0.0, return_kv=wants_kv,
        )  # fmt: skip
        return result if wants_kv else (result, None, None)


class FusedLayer(nn.Module):
    """One decoder layer. What is not fused, by choice, for its number of rows or for want of a kernel, runs as nano's.

    `features` are those that are on; up to `max_rows` rows of (decode, prefill) norm and linear are one kernel.
    """

    def __init__(self, layer: DecoderLayer, features: frozenset[str], max_rows: tuple[int, int]) -> None:
        super().__init__()
        self.plain = layer
        self.features = features
        self.max_decode_rows, self.max_prefill_rows = max_rows
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_qkv = NormLinearKernel(layer.input_layernorm, attention.qkv_proj, gated=False)
        self.rope_cache = RopeCacheKernel(attention)
        self.norm_gate_up = NormLinearKernel(layer.post_attention_layernorm, mlp.gate_up_proj, gated=True)

    @property
    def cache(self) -> KVWrite:
        return self.plain.cache

    def forward(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        few = hidden.shape[0] <= (self.max_decode_rows if context.is_decode else self.max_prefill_rows)
        attention = self.plain.self_attn
        if few and "norm_qkv" in self.features:
            qkv, residual = self.norm_qkv(hidden, residual)
        else:
            hidden, residual = self.plain.normalise_input(hidden, residual)
            qkv = attention.qkv_proj(hidden)
        if "rope_cache" in self.features:
            hidden = attention.o_proj(attention.attention(*self.rope_cache(qkv, positions, context), context))
        else:
            hidden = attention.attend(qkv, positions, context)
        return self._mlp(hidden, residual, few)

    def _mlp(self, hidden: Tensor, residual: Tensor, few: bool) -> tuple[Tensor, Tensor]:
        mlp: MLP = self.plain.mlp
        if few and "norm_gate_up" in self.features:
            hidden, residual = self.norm_gate_up(hidden, residual)
            return mlp.down_proj(hidden), residual
        hidden, residual = self.plain.post_attention_layernorm(hidden, residual)
        return mlp(hidden), residual

    def sites(self) -> list[tuple[str, str, nn.Module | None]]:
        """Fused and plain modules both: only what is called reports."""
        rope = "qk_norm+rope+kv_write" if self.plain.self_attn.q_norm else "rope+kv_write"
        return [
            ("attention", "input_norm+qkv_proj", self.norm_qkv),
            ("attention", rope, self.rope_cache),
            ("mlp", "post_norm+gate_up_proj+silu_mul", self.norm_gate_up),
            *self.plain.sites(),
        ]
