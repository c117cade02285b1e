"""nano's decoder layer with its operations fused. Weights are nano's own tensors; nothing is copied.

The residual stream is `hidden` itself, changed in place; nano's second tensor for it stays None here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import kernels
from engines.nano.layers.attention import KVWrite
from engines.nano.layers.linear import StackedLinear
from engines.nano.layers.norm import RMSNorm
from engines.nano.models.decoder import Attention, DecoderLayer
from engines.nano.utils.context import StepContext
from kernels.decode_linear import best_launch


@dataclass(slots=True)
class DecodeContext(StepContext):
    """Of a step on the device's own state, where positions are -1 in rows that hold no sequence."""

    dependent: bool = False


def product_is_fused(x: Tensor, weight: Tensor, gated: bool) -> bool:
    """Whether our kernel is faster than cuBLAS and separate kernels for x [rows, in] in a decode step here."""
    out = weight.shape[0] // 2 if gated else weight.shape[0]
    return best_launch(x.shape[0], out, weight.shape[1], gated, x.element_size(), x.device) is not None


class NormLinear(nn.Module):
    """Norm and linear layer in one kernel (with silu(gate) · up if `gated`): a module of its own, to be timed."""

    def __init__(self, norm: RMSNorm, linear: StackedLinear, gated: bool) -> None:
        super().__init__()
        self._parts = (norm, linear)
        self.gated = gated

    def takes(self, hidden: Tensor, context: StepContext, max_prefill_rows: int) -> bool:
        """Whether one kernel is the faster way for so many rows."""
        if not isinstance(context, DecodeContext):
            return hidden.shape[0] <= max_prefill_rows
        return product_is_fused(hidden, self._parts[1].weight, self.gated)

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        """[tokens, out] from the residual stream [tokens, hidden]."""
        norm, linear = self._parts
        if isinstance(context, DecodeContext):
            return kernels.decode_linear(
                hidden, linear.weight, norm_weight=norm.weight, eps=norm.eps, bias=linear.bias, gated=self.gated,
                dependent=context.dependent,
            )  # fmt: skip
        result: Any
        if self.gated:
            result = kernels.rms_norm_gate_up_silu(hidden, norm.weight, linear.weight, norm.eps)
        else:
            result = kernels.rms_norm_linear(hidden, norm.weight, linear.weight, norm.eps, linear.bias)
        return result


class AddedLinear(nn.Module):
    """A linear layer that adds its output to the residual stream [tokens, hidden], in place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)

    def forward(self, x: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        (linear,) = self._linear
        if isinstance(context, DecodeContext) and product_is_fused(x, linear.weight, False):
            return kernels.decode_linear(x, linear.weight, residual=hidden, dependent=context.dependent)
        return hidden.addmm_(x, linear.weight.t())


class RopeCache(nn.Module):
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


class DecodeAttention(nn.Module):
    """All between qkv_proj and o_proj in one kernel: [rows, q + k + v] → [rows, heads · dim]."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)

    def forward(self, qkv: Tensor, positions: Tensor, context: DecodeContext, workspace: Any) -> Tensor:
        (a,) = self._attention
        return kernels.decode_attention(
            qkv, a.q_norm.weight if a.q_norm else None, a.k_norm.weight if a.k_norm else None, a.rotary.table,
            positions, context.block_tables, a.kv_write.k_cache, a.kv_write.v_cache,
            a.heads, a.kv_heads, a.dim, a.q_norm.eps if a.q_norm else 0.0, a.attention.scale,
            workspace=workspace, dependent=context.dependent, max_context=context.max_seqlen_k,
        )  # fmt: skip


class FusedLayer(nn.Module):
    """One decoder layer. What is not fused, by choice, for its number of rows or for want of a kernel, runs as nano's.

    `features` are those that are on; in prefill up to `max_prefill_rows` rows of norm and linear are one kernel.
    """

    def __init__(self, layer: DecoderLayer, features: frozenset[str], max_prefill_rows: int) -> None:
        super().__init__()
        self.plain = layer
        self.features = features
        self.max_prefill_rows = max_prefill_rows
        self.workspace: Any = None  # of decode attention, shared by all layers; the runner makes it
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_qkv = NormLinear(layer.input_layernorm, attention.qkv_proj, gated=False)
        self.decode_attention = DecodeAttention(attention)
        self.rope_cache = RopeCache(attention)
        self.added_o = AddedLinear(attention.o_proj)
        self.norm_gate_up = NormLinear(layer.post_attention_layernorm, mlp.gate_up_proj, gated=True)
        self.added_down = AddedLinear(mlp.down_proj)

    @property
    def cache(self) -> KVWrite:
        return self.plain.cache

    def forward(self, hidden: Tensor, residual: None, positions: Tensor, context: StepContext) -> tuple[Tensor, None]:
        attention, mlp = self.plain.self_attn, self.plain.mlp
        if "norm_qkv" in self.features and self.norm_qkv.takes(hidden, context, self.max_prefill_rows):
            qkv = self.norm_qkv(hidden, context)
        else:
            qkv = attention.qkv_proj(self.plain.input_layernorm(hidden))
        hidden = self._added(self.added_o, attention.o_proj, self._attend(qkv, positions, context), hidden, context)
        if "norm_gate_up" in self.features and self.norm_gate_up.takes(hidden, context, self.max_prefill_rows):
            gated = self.norm_gate_up(hidden, context)
        else:
            gated = mlp.silu_mul(mlp.gate_up_proj(self.plain.post_attention_layernorm(hidden)))
        return self._added(self.added_down, mlp.down_proj, gated, hidden, context), None

    def _attend(self, qkv: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        attention = self.plain.self_attn
        if isinstance(context, DecodeContext) and "attention" in self.features:
            return self.decode_attention(qkv, positions, context, self.workspace)
        if "rope_cache" in self.features:
            return attention.attention(*self.rope_cache(qkv, positions, context), context)
        return attention.attend(qkv, positions, context)

    def _added(self, added: AddedLinear, linear: nn.Linear, x: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        """The residual stream with the output of `linear` added."""
        return added(x, hidden, context) if "residual" in self.features else hidden.add_(linear(x))

    def sites(self) -> list[tuple[str, str, nn.Module | None]]:
        """Fused and plain modules both: only what is called reports."""
        rope = "qk_norm+rope+kv_write" if self.plain.self_attn.q_norm else "rope+kv_write"
        return [
            ("attention", "input_norm+qkv_proj", self.norm_qkv),
            ("attention", rope, self.rope_cache),
            ("attention", f"{rope}+attention", self.decode_attention),
            ("attention", "o_proj", self.added_o),
            ("mlp", "post_norm+gate_up_proj+silu_mul", self.norm_gate_up),
            ("mlp", "down_proj", self.added_down),
            *self.plain.sites(),
        ]
