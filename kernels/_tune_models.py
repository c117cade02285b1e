"""The models whose products and attention `python -m kernels.tune` measures, as the shapes of their layers."""

from __future__ import annotations

from dataclasses import dataclass

from kernels._tune_attention import Heads


@dataclass(frozen=True)
class Op:
    """One product of a layer: `out` columns of output from `k` of input."""

    name: str
    out: int
    k: int
    norm: bool = False
    gated: bool = False
    residual: bool = False

    @property
    def weight_rows(self) -> int:
        return self.out * 2 if self.gated else self.out

    @property
    def weight_bytes(self) -> int:
        return self.weight_rows * self.k * 2


@dataclass(frozen=True)
class Model:
    """What of a model's shape its products depend on."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def attention(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.head_dim)

    def ops(self) -> list[Op]:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Op("qkv", wide + 2 * narrow, self.hidden, norm=True),
            Op("o", self.hidden, wide, residual=True),
            Op("gate_up", self.inter, self.hidden, norm=True, gated=True),
            Op("down", self.hidden, self.inter, residual=True),
        ]


MODELS = {
    "qwen3-0.6b": Model(28, 1024, 3072, 16, 8, 128, 151936),
    "qwen3-1.7b": Model(28, 2048, 6144, 16, 8, 128, 151936),
    "qwen3-4b": Model(36, 2560, 9728, 32, 8, 128, 151936),
    "qwen3-8b": Model(36, 4096, 12288, 32, 8, 128, 151936),
    "qwen2.5-0.5b": Model(24, 896, 4864, 14, 2, 64, 151936),
    "llama-3.2-1b": Model(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.1-8b": Model(32, 4096, 14336, 32, 8, 128, 128256),
}
