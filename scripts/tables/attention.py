"""Attention's own bytes and operations, which grow with the context."""

from __future__ import annotations

from harness.roofline.costs import Cost, Load, cost
from scripts.tables.registry import markdown, table
from scripts.tables.sources import MODELS, Model, floor_us, model

CONTEXTS = (128, 1024, 4096)


def decode(config: Model, context: int) -> Cost:
    """One new token in one layer, the last of a sequence of `context` tokens."""
    return cost(config, "attention", Load(1, 1, context - 1))


def prefill(config: Model, tokens: int) -> Cost:
    """A prompt in one layer: token i attends to i + 1 keys."""
    return cost(config, "attention", Load(1, tokens, 0))


@table("attention")
def attention() -> str:
    """Attention of all layers in one decode step of one sequence, and in a prefill, per model and context. Models whose
    attention is equal share a row."""
    head = [
        "model", "heads : kv", "context", "decode MB", "MFLOP", "FLOP/B", "floor µs",
        "prefill MB", "GFLOP", "FLOP/B", "floor µs",
    ]  # fmt: skip
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in MODELS:
        alike.setdefault(_shape(model(name)), []).append(name)
    rows = []
    for names in alike.values():
        config = model(names[0])
        for context in CONTEXTS:
            cells = [", ".join(names), f"{config.num_heads} : {config.num_kv_heads}", f"{context:,}"]
            moved, flop = _all_layers(config, decode(config, context))
            cells += [f"{moved / 1e6:.1f}", f"{flop / 1e6:.1f}", f"{flop / moved:.2f}", f"{floor_us(moved, flop):.1f}"]
            moved, flop = _all_layers(config, prefill(config, context))
            cells += [f"{moved / 1e6:.1f}", f"{flop / 1e9:.1f}", f"{flop / moved:.0f}", f"{floor_us(moved, flop):.1f}"]
            rows.append(cells)
    return markdown(head, rows, left=2)


def _all_layers(config: Model, layer: Cost) -> tuple[int, int]:
    """(bytes, operations)."""
    return config.num_layers * layer.bytes, config.num_layers * layer.flop


def _shape(config: Model) -> tuple[int, ...]:
    """All that attention's cost depends on."""
    return config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim


@table("break-even")
def break_even() -> str:
    """Per model: how many cached tokens weigh as much as the layers' matrices."""
    rows = []
    for name in MODELS:
        config = model(name)
        weights, token = (config.num_layers * n for n in (config.layer_weight_bytes, config.layer_token_bytes))
        rows.append([name, f"{weights / 1e6:,.0f}", f"{token:,}", f"{weights // token:,}"])
    return markdown(["model", "layer weights MB", "cache bytes per token", "tokens of cache that weigh as much"], rows)
