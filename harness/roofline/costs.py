"""The bytes that each operation must move and the operations that it must do, from the model's shapes.

Counted is what must pass between a kernel and memory if it reads each input and writes each output once. What several
operations do in one kernel (`input_norm+qkv_proj`) moves less: a tensor that is made and used up inside is neither
written nor read. A whole layer and a whole step are counted in the same way, as if each were one kernel, so their bytes
are those of the weights, of the cache, and of what goes in and comes out.

Operations are those of matrix products and of attention; a norm's few per element are left out. So are the bytes of
norm weights, biases, rotary tables, positions and block tables: some kilobytes per layer. Attention is causal, and
sequences of a step count as equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.base import OPS

ID_BYTES = 8
"""A token id."""
BEFORE_LAYERS = ("prepare", "embed")
LAYER = OPS[OPS.index("input_norm") : OPS.index("down_proj") + 1]
AFTER_LAYERS = ("final_norm", "lm_head", "sample", "read_back")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model, named as in conf/model, and the bytes of an element of its weights and cache."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    element_bytes: int = 2

    @classmethod
    def of(cls, conf: Mapping[str, Any], element_bytes: int = 2) -> Shapes:
        """From a mapping with the keys of conf/model."""
        names = [name for name in cls.__dataclass_fields__ if name != "element_bytes"]
        return cls(**{name: conf[name] for name in names}, element_bytes=element_bytes)

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, or values."""
        return self.num_kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrix of each operation that has one."""
        return {
            "qkv_proj": (self.q_size + 2 * self.kv_size, self.hidden_size),
            "o_proj": (self.hidden_size, self.q_size),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }

    @property
    def layer_weight_bytes(self) -> int:
        """Bytes of one layer's matrices; its norms and biases, some kilobytes, are left out."""
        return sum(out * inside for op, (out, inside) in self.matrices.items() if op in LAYER) * self.element_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers' matrices and the head's, which is the embedding's too where they are tied."""
        return self.num_layers * self.layer_weight_bytes + self.vocab_size * self.hidden_size * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes that all layers' caches hold per token."""
        return self.num_layers * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Bytes that one layer's cache holds per token: a key and a value of each key/value head."""
        return 2 * self.kv_size * self.element_bytes


@dataclass(frozen=True)
class Load:
    """How much a step computes: `new_tokens` of `batch_size` sequences, each with `context_len` tokens in the cache."""

    batch_size: int
    new_tokens: int
    context_len: int

    @property
    def scores(self) -> int:
        """Pairs of a new token and a token that it sees: its own context, the new ones before it, and itself."""
        each = self.new_tokens // self.batch_size
        return self.new_tokens * self.context_len + self.batch_size * (each * (each + 1) // 2)


@dataclass(frozen=True)
class Cost:
    """What must be moved, by kind, and done (`flop`)."""

    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    flop: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.activation_bytes + other.activation_bytes,
            self.flop + other.flop,
        )

    def floor_us(self, bytes_per_s: float, flop_per_s: float) -> float:
        """The least time that moving these bytes, or these operations, takes."""
        return max(self.bytes / bytes_per_s, self.flop / flop_per_s) * 1e6


@dataclass(frozen=True)
class Flow:
    """The activations that an operation reads and writes, by name."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


FLOWS = {
    "prepare": Flow((), ("token_ids",)),
    "embed": Flow(("token_ids",), ("hidden",)),
    "input_norm": Flow(("hidden", "residual"), ("residual", "normed")),
    "qkv_proj": Flow(("normed",), ("q", "k", "v")),
    "qk_norm": Flow(("q", "k"), ("q", "k")),
    "rope": Flow(("q", "k"), ("q", "k")),
    "kv_write": Flow(("k", "v"), ()),  # the cache is counted by itself
    "attention": Flow(("q",), ("attended",)),
    "o_proj": Flow(("attended",), ("hidden",)),
    "post_norm": Flow(("hidden", "residual"), ("residual", "normed")),
    "gate_up_proj": Flow(("normed",), ("gate_up",)),
    "silu_mul": Flow(("gate_up",), ("gated",)),
    "down_proj": Flow(("gated",), ("hidden",)),
    "final_norm": Flow(("hidden", "residual"), ("residual", "normed")),
    "lm_head": Flow(("normed",), ("logits",)),
    "sample": Flow(("logits",), ("tokens",)),
    "read_back": Flow(("tokens",), ()),
}
"""Layer 0's first norm, which has no residual to add, counts like the others, unless the embedding is in its kernel."""

_ALL = (*BEFORE_LAYERS, *LAYER, *LAYER, *AFTER_LAYERS)
"""Operations in the order of a model of two layers: enough to tell who uses a tensor next."""
_KERNELS_GIVE = "residual"
"""A norm's kernel writes the sum that it normalised, even the last one's, which nobody reads."""


def cost(shapes: Shapes, op: str, load: Load, products_add: bool = False) -> Cost:
    """What `op`, a name of OPS or several joined with "+", costs in one layer (or, outside the layers, once).

    The final norm and the head count one row per sequence: no more are needed. `products_add`: not the norms but o_proj
    and down_proj add to the residual stream, in place. ValueError: an op not in OPS.
    """
    ops = op.split("+")
    if unknown := [name for name in ops if name not in FLOWS]:
        raise ValueError(f"no such op: {unknown[0]}")
    return Cost(
        sum(_weight_bytes(shapes, name, load) for name in ops),
        _cache_bytes(shapes, ops, load),
        _activation_bytes(shapes, ops, load) + products_add * _moved_sum_bytes(shapes, ops, load),
        sum(_flop(shapes, name, load) for name in ops),
    )


def layer_cost(shapes: Shapes, load: Load) -> Cost:
    """What one whole layer costs as one kernel."""
    return cost(shapes, "+".join(LAYER), load)


def step_cost(shapes: Shapes, load: Load) -> Cost:
    """What a whole step, from token ids to drawn tokens, costs as one kernel: the floor of any engine.

    Every layer's weights and cache, the head and the tokens' rows of the embedding, once each.
    """
    layer = layer_cost(shapes, load)
    after = ("final_norm", "lm_head", "sample")
    once = sum((cost(shapes, op, load) for op in ("embed", *after)), Cost())
    return Cost(
        shapes.num_layers * layer.weight_bytes + once.weight_bytes,
        shapes.num_layers * layer.cache_bytes,
        _activation_bytes(shapes, ("embed", *LAYER, *after), load),
        shapes.num_layers * layer.flop + once.flop,
    )


def _rows(op: str, load: Load) -> int:
    return load.batch_size if op in AFTER_LAYERS else load.new_tokens


def _weight_bytes(shapes: Shapes, op: str, load: Load) -> int:
    if op == "embed":
        return min(load.new_tokens, shapes.vocab_size) * shapes.hidden_size * shapes.element_bytes
    out, inside = shapes.matrices.get(op, (0, 0))
    return out * inside * shapes.element_bytes


def _flop(shapes: Shapes, op: str, load: Load) -> int:
    """Two operations, a multiplication and an addition, per weight and row; per score and element, and again for the
    weighted sum."""
    if op == "attention":
        return 4 * shapes.q_size * load.scores
    out, inside = shapes.matrices.get(op, (0, 0))
    return 2 * _rows(op, load) * out * inside


def _cache_bytes(shapes: Shapes, ops: Sequence[str], load: Load) -> int:
    """Attention reads the cached tokens. The new ones are written by `kv_write` and read by `attention`; a kernel that
    does both need not read what it has just made."""
    tokens = load.batch_size * load.context_len if "attention" in ops else 0
    if "kv_write" in ops or "attention" in ops:
        tokens += load.new_tokens
    return tokens * shapes.layer_token_bytes


def _activation_bytes(shapes: Shapes, ops: Sequence[str], load: Load) -> int:
    """What `ops`, in this order and in one kernel, read of what others made, and write of what others need."""
    size = _sizes(shapes)
    made: dict[str, int] = {"residual": 0} if "embed" in ops else {}  # the residual stream begins as the embedding
    total = 0
    for op in ops:
        rows = _rows(op, load)
        for name in FLOWS[op].reads:
            if name not in made:
                total += rows * size(name)
                made[name] = 0  # read once, kept
        for name in FLOWS[op].writes:
            made[name] = rows
    return total + sum(rows * size(name) for name, rows in made.items() if name == _KERNELS_GIVE or _needed(name, ops))


def _moved_sum_bytes(shapes: Shapes, ops: Sequence[str], load: Load) -> int:
    """What changes where products add to the stream: a norm then reads one tensor instead of two and writes no sum, a
    product reads the stream that it writes."""
    tensors = {"input_norm": -2, "post_norm": -2, "final_norm": -2, "o_proj": 1, "down_proj": 1}
    row_bytes = shapes.hidden_size * shapes.element_bytes
    return sum(tensors.get(op, 0) * _rows(op, load) * row_bytes for op in ops)


def _needed(tensor: str, ops: Sequence[str]) -> bool:
    """Whether an operation behind `ops` reads `tensor` before it is made anew."""
    for op in _ALL[_ALL.index(ops[-1]) + 1 :]:
        if tensor in FLOWS[op].reads:
            return True
        if tensor in FLOWS[op].writes:
            return False
    return False


def _sizes(shapes: Shapes) -> Callable[[str], int]:
    """Bytes of one row of a tensor, by the tensor's name."""
    elements = {
        "q": shapes.q_size,
        "k": shapes.kv_size,
        "v": shapes.kv_size,
        "attended": shapes.q_size,
        "gate_up": 2 * shapes.intermediate_size,
        "gated": shapes.intermediate_size,
        "logits": shapes.vocab_size,
    } | dict.fromkeys(("hidden", "residual", "normed"), shapes.hidden_size)
    return lambda name: elements[name] * shapes.element_bytes if name in elements else ID_BYTES
