"""nano's decoder layer with its operations fused. Weights are nano's own tensors; nothing is copied.

The residual stream is `hidden` itself, changed in place; nano's second tensor for it stays None here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from engines.fused.context import DecodeContext, PrefillContext, as_in_decode, depends
from engines.nano.layers.attention import KVWrite
from engines.nano.layers.linear import StackedLinear
from engines.nano.layers.norm import RMSNorm
from engines.nano.models.decoder import Attention, DecoderLayer
from engines.nano.utils.context import StepContext
from kernels.causal_attention import best_launch as best_causal_launch
from kernels.decode_linear import Launch as DecodeLaunch
from kernels.decode_linear import best_launch, best_prefill_gate_up, decode_linear_half_norm
from kernels.prefill_attention import fits
from kernels.prefill_linear import best_launch as best_prefill_launch
from kernels.prefill_qkv_rope import fits as holds_heads
from kernels.prefill_qkv_rope import takes as takes_heads

Rotated = tuple[Tensor, Tensor | None, Tensor | None]
"""q, k and v as attention takes them."""
MAX_PREFILL_ATTENTION = 256
"""Tokens of a step up to which one kernel is faster than rotation and attention apart."""


def shape_of(rows: int, weight: Tensor, gated: bool) -> tuple[int, int, int, bool, int, torch.device]:
    """Of a product, as the choice of its kernel wants it."""
    out, k = weight.shape
    return rows, out // 2 if gated else out, k, gated, weight.element_size(), weight.device


def decode_launch(x: Tensor, weight: Tensor, gated: bool) -> DecodeLaunch | None:
    """How `decode_linear` is the fastest way for x [rows, in] in a decode step here; None: it is not."""
    return best_launch(*shape_of(x.shape[0], weight, gated))


def prefill_launch(kernel: str, x: Tensor, weight: Tensor, context: StepContext) -> Any:
    """How the product of x [rows, in] and what follows it are best one kernel in prefill here; None: they are not."""
    if context.is_decode:
        return None
    return best_prefill_launch(kernel, weight.shape[0], weight.shape[1], x.shape[0], x.dtype, x.device)


class Norm(nn.Module):
    """A norm that stands alone."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self._norm = (norm,)

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        (norm,) = self._norm
        return kernels.rms_norm(hidden, norm.weight, norm.eps, dependent=depends(context))


class SiluMul(nn.Module):
    """silu(gate) · up that stands alone."""

    def forward(self, gate_up: Tensor, context: StepContext) -> Tensor:
        return kernels.silu_mul(gate_up, dependent=depends(context))


class NormLinear(nn.Module):
    """Norm and linear layer in one kernel (with silu(gate) · up if `gated`): a module of its own, to be timed."""

    def __init__(self, norm: RMSNorm, linear: StackedLinear, gated: bool) -> None:
        super().__init__()
        self._parts = (norm, linear)
        self.gated = gated

    def takes(self, hidden: Tensor, context: StepContext, max_prefill_rows: int) -> bool:
        """Whether one kernel is the faster way for so many rows."""
        if not as_in_decode(context):
            return hidden.shape[0] <= max_prefill_rows
        return decode_launch(hidden, self._parts[1].weight, self.gated) is not None

    @property
    def norm_weight(self) -> Tensor:
        """Of the norm, [hidden]."""
        return self._parts[0].weight

    def takes_half(self, x: Tensor) -> bool:
        """Whether for as many rows as x has the product can take a norm that the product before began."""
        launch = None if x.dtype == torch.float16 else decode_launch(x, self._parts[1].weight, self.gated)
        return launch is not None and launch.kernel == "tiled"

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        """[tokens, out] from the residual stream [tokens, hidden]."""
        norm, linear = self._parts
        if as_in_decode(context):
            half_normed, context.half_normed = context.half_normed, None
            return kernels.decode_linear(
                half_normed or hidden, linear.weight, norm_weight=None if half_normed else norm.weight, eps=norm.eps,
                bias=linear.bias, gated=self.gated, dependent=context.dependent,
            )  # fmt: skip
        result: Any
        if self.gated:
            result = kernels.rms_norm_gate_up_silu(hidden, norm.weight, linear.weight, norm.eps)
        else:
            result = kernels.rms_norm_linear(hidden, norm.weight, linear.weight, norm.eps, linear.bias)
        return result


class AddedLinear(nn.Module):
    """A linear layer that adds its output to the residual stream [tokens, hidden], in place.

    Before a norm and linear layer of which the tiled kernel is the faster way too, it makes half of that norm, if its
    own launch says so.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)
        self._next: tuple[NormLinear, ...] = ()

    def lead_to(self, following: NormLinear) -> None:
        """Nothing but `following` reads the residual stream before it is added to again."""
        self._next = (following,)

    def forward(self, x: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        (linear,) = self._linear
        if not as_in_decode(context) or (launch := decode_launch(x, linear.weight, False)) is None:
            return hidden.addmm_(x, linear.weight.t())
        following, dependent = self._next, context.dependent
        if following and launch.kernel == "tiled" and launch.halves and following[0].takes_half(x):
            context.half_normed = decode_linear_half_norm(
                x, linear.weight, hidden, following[0].norm_weight, dependent=dependent, launch=launch
            )
            return hidden
        return kernels.decode_linear(x, linear.weight, residual=hidden, dependent=dependent, launch=launch)


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
            dependent=depends(context),
        )  # fmt: skip
        return result if wants_kv else (result, None, None)


class QkvRope(nn.Module):
    """Projection, head norms, rotation and cache write in one kernel, for prefill of many rows."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)

    def takes(self, hidden: Tensor, context: StepContext) -> bool:
        """Whether one kernel is the faster way, and possible."""
        (a,) = self._attention
        launch = prefill_launch("prefill_qkv_rope", hidden, a.qkv_proj.weight, context)
        heads = a.heads, a.kv_heads, a.dim
        return launch is not None and takes_heads(*heads) and holds_heads(launch, *heads)

    def forward(self, normed: Tensor, positions: Tensor, context: StepContext) -> Rotated:
        """q [tokens, heads, dim]; and k, v [tokens, kv_heads, dim] where attention may use them without the cache."""
        (a,) = self._attention
        wants_kv = context.cu_seqlens_k is not None
        result: Any = kernels.prefill_qkv_rope(
            normed, a.qkv_proj.weight, a.q_norm.weight if a.q_norm else None, a.k_norm.weight if a.k_norm else None,
            a.rotary.table, positions, context.slot_mapping, a.kv_write.k_cache, a.kv_write.v_cache,
            a.heads, a.kv_heads, a.dim, a.q_norm.eps if a.q_norm else 0.0, bias=a.qkv_proj.bias, return_kv=wants_kv,
            launch=prefill_launch("prefill_qkv_rope", normed, a.qkv_proj.weight, context), dependent=depends(context),
        )  # fmt: skip
        return result if wants_kv else (result, None, None)


class GateUp(nn.Module):
    """Gate and up projection and silu(gate) · up in one kernel, for prefill and decode of many rows."""

    def __init__(self, linear: StackedLinear) -> None:
        super().__init__()
        self._linear = (linear,)

    def launch(self, x: Tensor, context: StepContext) -> Any:
        """How one kernel is the faster way; None where it is not."""
        (linear,) = self._linear
        if as_in_decode(context):
            return best_prefill_gate_up(*shape_of(x.shape[0], linear.weight, True))
        return prefill_launch("prefill_gate_up", x, linear.weight, context)

    def forward(self, normed: Tensor, context: StepContext) -> Tensor:
        """[tokens, inter]."""
        launch = self.launch(normed, context)
        return kernels.prefill_gate_up(normed, self._linear[0].weight, launch, dependent=depends(context))


class PrefillAttention(nn.Module):
    """All between qkv_proj and o_proj in one kernel, for short prompts: [tokens, q + k + v] → [tokens, heads · dim]."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)

    def takes(self, qkv: Tensor, context: StepContext) -> bool:
        """Whether one kernel is the faster way, and possible: nothing of the prompts may be in the cache before."""
        if context.cu_seqlens_k is None or context.is_decode or qkv.shape[0] > MAX_PREFILL_ATTENTION:
            return False
        (a,) = self._attention
        return fits(a.heads, a.kv_heads, a.dim, qkv.element_size(), qkv.device)

    def forward(self, qkv: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        (a,) = self._attention
        return kernels.prefill_attention(
            qkv, a.q_norm.weight if a.q_norm else None, a.k_norm.weight if a.k_norm else None, a.rotary.table,
            positions, context.slot_mapping, a.kv_write.k_cache, a.kv_write.v_cache,
            a.heads, a.kv_heads, a.dim, a.q_norm.eps if a.q_norm else 0.0, a.attention.scale,
            dependent=depends(context),
        )  # fmt: skip


class CausalAttention(nn.Module):
    """Attention of prompts of which nothing was in the cache before, from q, k and v [tokens, heads, dim]."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = (attention,)

    def launch(self, q: Tensor, context: StepContext) -> Any:
        """How its kernel is the faster way; None where it is not, or keys are to come from the cache."""
        if context.is_decode or context.cu_seqlens_k is None:
            return None
        (a,) = self._attention
        longest = min(context.max_seqlen_q, len(q), context.block_tables.shape[1] * a.kv_write.k_cache.shape[1])
        return best_causal_launch(a.heads, a.kv_heads, a.dim, len(q), longest, q.dtype, q.device)

    def forward(self, rotated: Rotated, positions: Tensor, context: StepContext) -> Tensor:
        """[tokens, heads · dim]."""
        (a,) = self._attention
        q, k, v = rotated
        assert k is not None and v is not None
        return kernels.causal_attention(
            q, k, v, positions, a.attention.scale, dependent=depends(context), launch=self.launch(q, context)
        ).flatten(1)


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
        elif self._rotates_at_once(hidden, context):
            qkv = self.qkv_rope(self.input_norm(hidden, context), positions, context)
        else:
            qkv = attention.qkv_proj(self.input_norm(hidden, context))
        if self.last and isinstance(context, PrefillContext):
            hidden, attended, context = self._attend_last(hidden, qkv, positions, context)
        else:
            attended = self._attend(qkv, positions, context)
        hidden = self._added(self.added_o, attention.o_proj, attended, hidden, context)
        if "norm_gate_up" in self.features and self.norm_gate_up.takes(hidden, context, self.max_prefill_rows):
            gated = self.norm_gate_up(hidden, context)
        elif "prefill_epilogues" in self.features and self.gate_up.launch(hidden, context) is not None:
            gated = self.gate_up(self.post_norm(hidden, context), context)
        else:
            gated = self.silu_mul(mlp.gate_up_proj(self.post_norm(hidden, context)), context)
        return self._added(self.added_down, mlp.down_proj, gated, hidden, context), None

    def _rotates_at_once(self, hidden: Tensor, context: StepContext) -> bool:
        """Whether the projection's kernel rotates and writes the cache; short prompts' attention would do that too."""
        wanted = "prefill_epilogues" in self.features and not self._attends_at_once(hidden, context)
        return wanted and self.qkv_rope.takes(hidden, context)

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
        if at_hand and self.causal_attention.launch(q, context) is not None:
            return self.causal_attention(rotated, positions, context)
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
