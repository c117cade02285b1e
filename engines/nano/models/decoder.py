"""The decoder that Qwen3, Qwen2 and Llama share. Modules are named as in their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engines.base import NO_LAYER, WHOLE_LAYER, Site
from engines.nano.layers.activation import SiluMul
from engines.nano.layers.attention import Backend, KVWrite, PagedAttention
from engines.nano.layers.embedding import OutputHead
from engines.nano.layers.linear import StackedLinear
from engines.nano.layers.norm import HeadNorm, RMSNorm
from engines.nano.layers.parallel import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from engines.nano.layers.rotary import RotaryEmbedding
from engines.nano.models.config import ModelConfig
from engines.nano.utils.context import StepContext


@dataclass(frozen=True)
class Family:
    """What sets a model family apart from the others."""

    qk_norm: bool
    qkv_bias: bool


class Attention(nn.Module):
    """hidden [tokens, hidden] → [tokens, hidden]."""

    def __init__(self, config: ModelConfig, family: Family, rotary: RotaryEmbedding, backend: Backend) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.qkv_proj = StackedLinear(
            config.hidden_size, (heads * dim, kv_heads * dim, kv_heads * dim), family.qkv_bias
        )
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if family.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if family.qk_norm else None
        self.qk_norm = HeadNorm(self.q_norm, self.k_norm) if self.q_norm and self.k_norm else None
        self.rotary = Rotation(rotary)
        self.kv_write = KVWrite()
        self.attention = PagedAttention(self.kv_write, dim, backend)
        self.o_proj = output_linear(heads * dim, config)

    def forward(self, hidden: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        return self.o_proj(self.attend(self.qkv_proj(hidden), positions, context))

    def attend(self, qkv: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        """[tokens, q + k + v] → [tokens, heads · dim]: all that lies between the projections."""
        q, k, v = qkv.split(self.qkv_proj.part_sizes, -1)
        q, k, v = q.unflatten(-1, (-1, self.dim)), k.unflatten(-1, (-1, self.dim)), v.unflatten(-1, (-1, self.dim))
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        q, k = self.rotary(positions, q, k)
        self.kv_write(k, v, context)
        return self.attention(q, k, v, context)


class Rotation(nn.Module):
    """One layer's use of the rotary table that all layers share: a module of its own, so that it can be timed."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self._rotary = (rotary,)

    @property
    def table(self) -> Tensor:
        """[max_position, dim] float32: cosines, then sines."""
        return self._rotary[0].cos_sin

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotary[0](positions, q, k)


class MLP(nn.Module):
    """hidden [tokens, hidden] → [tokens, hidden] through silu(gate) · up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = StackedLinear(config.hidden_size, (config.intermediate_size, config.intermediate_size))
        self.silu_mul = SiluMul()
        self.down_proj = output_linear(config.intermediate_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.silu_mul(self.gate_up_proj(hidden)))


def output_linear(in_features: int, config: ModelConfig) -> nn.Linear:
    """What ends a block: [tokens, in_features] → [tokens, hidden], summed over the ranks where there are several."""
    linear = nn.Linear if config.ranks == 1 else RowParallelLinear
    return linear(in_features, config.hidden_size, bias=False)


class DecoderLayer(nn.Module):
    """One layer. The residual stream travels beside the hidden states, so that each norm can add it on the way."""

    def __init__(self, config: ModelConfig, family: Family, rotary: RotaryEmbedding, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, family, rotary, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.normalise_input(hidden, residual)
        hidden = self.self_attn(hidden, positions, context)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def normalise_input(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised, new residual stream); the first layer's stream is the embedding itself."""
        return (self.input_layernorm(hidden), hidden) if residual is None else self.input_layernorm(hidden, residual)

    @property
    def cache(self) -> KVWrite:
        return self.self_attn.kv_write

    def sites(self) -> list[tuple[str, str, nn.Module | None]]:
        """(block, op, module) of what runs, in order."""
        a, m = self.self_attn, self.mlp
        return [
            ("attention", "input_norm", self.input_layernorm),
            ("attention", "qkv_proj", a.qkv_proj),
            ("attention", "qk_norm", a.qk_norm),
            ("attention", "rope", a.rotary),
            ("attention", "kv_write", a.kv_write),
            ("attention", "attention", a.attention),
            ("attention", "o_proj", a.o_proj),
            ("mlp", "post_norm", self.post_attention_layernorm),
            ("mlp", "gate_up_proj", m.gate_up_proj),
            ("mlp", "silu_mul", m.silu_mul),
            ("mlp", "down_proj", m.down_proj),
        ]


class Body(nn.Module):
    """What stands under `model.` in a checkpoint."""

    def __init__(self, config: ModelConfig, family: Family, rotary: RotaryEmbedding, backend: Backend) -> None:
        super().__init__()
        vocab = config.vocab_size
        self.embed_tokens = (
            nn.Embedding(vocab, config.hidden_size)
            if config.ranks == 1
            else VocabParallelEmbedding(vocab, config.hidden_size, config.rank)
        )
        self.layers = nn.ModuleList(DecoderLayer(config, family, rotary, backend) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        hidden, residual = self.embed_tokens(token_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, positions, context)
        return self.norm(hidden) if residual is None else self.norm(hidden, residual)[0]


class Decoder(nn.Module):
    """Token ids [tokens] to hidden states [tokens, hidden], and those to logits [rows, vocab]."""

    def __init__(self, config: ModelConfig, family: Family, max_model_len: int, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.rotary = RotaryEmbedding(config.head_dim, max_model_len, config.rope_theta, config.rope_scaling)
        self.model = Body(config, family, self.rotary, backend)
        embedding, tied = self.model.embed_tokens, config.tied_head
        self.lm_head = (
            OutputHead(embedding, tied)
            if config.ranks == 1
            else VocabParallelHead(embedding, tied, config.rank, config.ranks)
        )

    def forward(self, token_ids: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        return self.model(token_ids, positions, context)

    def logits(self, hidden: Tensor, context: StepContext) -> Tensor:
        """[sequences, vocab]: of each sequence's last new token."""
        return self.lm_head(hidden if context.last_tokens is None else hidden[context.last_tokens])

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, nano's or another engine's in their place."""
        return list(self.model.layers)

    def caches(self) -> list[KVWrite]:
        """Where each layer keeps its cache, in layer order."""
        return [layer.cache for layer in self.layers]

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Every place that can be timed, in the order in which they run; a layer comes before its ops."""
        sites: list[tuple[Site, nn.Module]] = [(Site(NO_LAYER, "embed", "embed"), self.model.embed_tokens)]
        for index, layer in enumerate(self.layers):
            sites.append((Site(index, WHOLE_LAYER, WHOLE_LAYER), layer))
            sites += [(Site(index, block, op), module) for block, op, module in layer.sites() if module is not None]
        sites.append((Site(NO_LAYER, "head", "final_norm"), self.model.norm))
        sites.append((Site(NO_LAYER, "head", "lm_head"), self.lm_head))
        return sites
