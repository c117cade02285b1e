"""nano's decoder layer with its operations fused (`products`, `attention`). Weights are nano's own tensors.

The residual stream is `hidden` itself, changed in place; nano's second tensor for it stays None here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engines.fused.attention import (
    CausalAttention,
    DecodeAttention,
    PrefillAttention,
    QkvRope,
    RopeCache,
    Rotated,
)
from engines.fused.context import DecodeContext, PrefillContext
from engines.fused.products import AddedLinear, GateUp, Norm, NormLinear, SiluMul
from engines.nano.layers.attention import KVWrite
from engines.nano.models.decoder import DecoderLayer
from engines.nano.utils.context import StepContext


class FusedLayer(nn.Module):
    """One decoder layer. What is not fused, by choice, for its number of rows or for want of a kernel, runs as nano's.

    `features` are those that are on; in prefill up to `max_prefill_rows` rows of norm and linear are one kernel. The
    `last` layer of a prefill returns the rows to draw from alone.
    """

    def __init__(self, layer: DecoderLayer, features: frozenset[str], max_prefill_rows: int, last: bool) -> None:
        super().__init__()
        self.plain = layer
        self.features = features
        self.max_prefill_rows = max_prefill_rows
        self.last = last
        self.workspace: Any = None  # of decode attention, shared by all layers; the runner makes it
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.silu_mul = SiluMul()
        self.norm_qkv = NormLinear(layer.input_layernorm, attention.qkv_proj, gated=False)
        self.decode_attention = DecodeAttention(attention)
        self.prefill_attention = PrefillAttention(attention)
        self.causal_attention = CausalAttention(attention)
        self.rope_cache = RopeCache(attention)
        self.qkv_rope = QkvRope(attention)
        self.added_o = AddedLinear(attention.o_proj)
        self.norm_gate_up = NormLinear(layer.post_attention_layernorm, mlp.gate_up_proj, gated=True)
        self.gate_up = GateUp(mlp.gate_up_proj)
        self.added_down = AddedLinear(mlp.down_proj)
        if {"half_norm", "norm_gate_up"} <= features:
            self.added_o.lead_to(self.norm_gate_up)

    def followed_by(self, layer: FusedLayer) -> None:
        """`layer` comes next."""
        if {"half_norm", "norm_qkv"} <= self.features:
            self.added_down.lead_to(layer.norm_qkv)

    @property
    def cache(self) -> KVWrite:
        return self.plain.cache

    def forward(self, hidden: Tensor, residual: None, positions: Tensor, context: StepContext) -> tuple[Tensor, None]:
        attention, mlp = self.plain.self_attn, self.plain.mlp
        qkv: Tensor | Rotated
        if "norm_qkv" in self.features and self.norm_qkv.takes(hidden, context, self.max_prefill_rows):
            qkv = self.norm_qkv(hidden, context)
        elif (launch := self._qkv_rope_launch(hidden, context)) is not None:
            qkv = self.qkv_rope(self.input_norm(hidden, context), positions, context, launch)
        else:
            qkv = attention.qkv_proj(self.input_norm(hidden, context))
        if self.last and isinstance(context, PrefillContext):
            hidden, attended, context = self._attend_last(hidden, qkv, positions, context)
        else:
            attended = self._attend(qkv, positions, context)
        hidden = self._added(self.added_o, attention.o_proj, attended, hidden, context)
        if "norm_gate_up" in self.features and self.norm_gate_up.takes(hidden, context, self.max_prefill_rows):
            gated = self.norm_gate_up(hidden, context)
        elif "prefill_epilogues" in self.features and (launch := self.gate_up.launch(hidden, context)) is not None:
            gated = self.gate_up(self.post_norm(hidden, context), context, launch)
        else:
            gated = self.silu_mul(mlp.gate_up_proj(self.post_norm(hidden, context)), context)
        return self._added(self.added_down, mlp.down_proj, gated, hidden, context), None

    def _qkv_rope_launch(self, hidden: Tensor, context: StepContext) -> Any:
        """How the projection's kernel rotates and writes the cache; None: it does not.

        Where one kernel attends to short prompts, that one rotates.
        """
        wanted = "prefill_epilogues" in self.features and not self._attends_at_once(hidden, context)
        return self.qkv_rope.launch(hidden, context) if wanted else None

    def _attends_at_once(self, rows: Tensor, context: StepContext) -> bool:
        """Whether all between the projections is one kernel in this prefill."""
        return "prefill_attention" in self.features and self.prefill_attention.takes(rows, context)

    def _attend(self, qkv: Tensor | Rotated, positions: Tensor, context: StepContext) -> Tensor:
        """From the joint projection, or from q, k and v, whose keys and values are in the cache."""
        attention = self.plain.self_attn
        if isinstance(qkv, tuple):
            return self._attend_rotated(qkv, positions, context)
        if isinstance(context, DecodeContext) and "attention" in self.features:
            return self.decode_attention(qkv, positions, context, self.workspace)
        if self._attends_at_once(qkv, context):
            return self.prefill_attention(qkv, positions, context)
        if "rope_cache" in self.features:
            return self._attend_rotated(self.rope_cache(qkv, positions, context), positions, context)
        return attention.attend(qkv, positions, context)

    def _attend_rotated(self, rotated: Rotated, positions: Tensor, context: StepContext) -> Tensor:
        """From q, k and v, where k and v are at hand, or in the cache."""
        q, k, v = rotated
        at_hand = k is not None and v is not None and "prefill_attention" in self.features
        if at_hand and (launch := self.causal_attention.launch(q, context)) is not None:
            return self.causal_attention(rotated, positions, context, launch)
        return self.plain.self_attn.attention(q, k, v, context)

    def _attend_last(
        self, hidden: Tensor, qkv: Tensor | Rotated, positions: Tensor, context: PrefillContext
    ) -> tuple[Tensor, Tensor, StepContext]:
        """(residual stream, attention's output, context) of the rows to draw from, once all keys are in the cache."""
        assert context.tail is not None and context.last_tokens is not None
        q = None
        if isinstance(qkv, tuple):
            q = qkv[0] if "last_rows" in self.features else None
        elif {"last_rows", "rope_cache"} <= self.features and not self._attends_at_once(qkv, context):
            q, *_ = self.rope_cache(qkv, positions, context.tail)
        if q is not None:
            q = q.index_select(0, context.last_tokens)
            attended = self.plain.self_attn.attention(q, None, None, context.tail)
        else:
            attended = self._attend(qkv, positions, context).index_select(0, context.last_tokens)
        rows = torch.index_select(hidden, 0, context.last_tokens, out=context.stream)
        return rows, attended, context.tail

    def _added(self, added: AddedLinear, linear: nn.Linear, x: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        """The residual stream with the output of `linear` added."""
        return added(x, hidden, context) if "residual" in self.features else hidden.add_(linear(x))

    def sites(self) -> list[tuple[str, str, nn.Module | None]]:
        """Fused and plain modules both: only what is called reports."""
        rope = "qk_norm+rope+kv_write" if self.plain.self_attn.q_norm else "rope+kv_write"
        return [
            ("attention", "input_norm", self.input_norm),
            ("attention", "input_norm+qkv_proj", self.norm_qkv),
            ("attention", rope, self.rope_cache),
            ("attention", f"qkv_proj+{rope}", self.qkv_rope),
            ("attention", f"{rope}+attention", self.decode_attention),
            ("attention", f"{rope}+attention", self.prefill_attention),
            ("attention", "attention", self.causal_attention),
            ("attention", "o_proj", self.added_o),
            ("mlp", "post_norm", self.post_norm),
            ("mlp", "silu_mul", self.silu_mul),
            ("mlp", "post_norm+gate_up_proj+silu_mul", self.norm_gate_up),
            ("mlp", "gate_up_proj+silu_mul", self.gate_up),
            ("mlp", "down_proj", self.added_down),
            *self.plain.sites(),
        ]
