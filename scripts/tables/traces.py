"""Where a step's time goes, from the traced passes of committed runs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from engines.base import OPS, WHOLE_LAYER
from scripts.tables.registry import InputError, markdown, table
from scripts.tables.sources import REFERENCE, Runs, floor_us, model, rows_of, run_of, runs

KEYS = ["phase", "batch_size", "new_tokens", "context_len"]
SOURCE = "cuda_event"
"""What timed the rows that these tables show: a run may hold the same interval from other sources too."""


def keys_of(shape: dict[str, Any]) -> tuple[str, int, int, int]:
    """(phase, batch_size, new_tokens, context_len) of a shape in `run.json`, as the tables spell it."""
    batch, tokens = shape["batch_size"], shape["tokens"]
    return ("prefill", batch, batch * tokens, 0) if shape["phase"] == "prefill" else ("decode", batch, batch, tokens)


def of_shape(frame: pd.DataFrame, shape: dict[str, Any], mode: str) -> pd.DataFrame:
    """The traced rows of one shape."""
    here = (frame["mode"] == mode) & (frame["source"] == SOURCE)
    for key, value in zip(KEYS, keys_of(shape), strict=True):
        here &= frame[key] == value
    return frame[here]


def op_medians(layers: pd.DataFrame) -> pd.Series:
    """µs per op in one layer: the median over iterations of each layer's op, then the mean over layers."""
    inside = layers[(layers["layer_index"] >= 0) & (layers["op"] != WHOLE_LAYER)]
    each = inside.groupby(["op", "layer_index"])["latency_us"].median()
    return each.groupby("op").mean()


def graph_parts(layers: pd.DataFrame) -> dict[str, float]:
    """µs of all layers together, of head and sampling, in one graph step (medians over iterations)."""
    medians = layers.groupby(["op", "layer_index"])["latency_us"].median()
    parts = {"layers": float(medians[WHOLE_LAYER].sum())}
    for name, ops in (("head", ("embed", "final_norm", "lm_head")), ("sample", ("sample",))):
        parts[name] = float(sum(medians[op].sum() for op in ops if op in medians.index.get_level_values("op")))
    return parts


def traced_decodes(found: Runs, engine: str) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """The decode shapes of an engine's latency run that were traced inside graphs, with their rows."""
    run = run_of(found, engine)
    layers = rows_of(found.layers, run)
    both = [(shape, of_shape(layers, shape, "graph")) for shape in run["shapes"] if shape["phase"] == "decode"]
    return [(shape, rows) for shape, rows in both if len(rows)]


@table("decode-steps")
def decode_steps(folder: str = REFERENCE, engine: str = "nano") -> str:
    """Decode steps of one engine: layers, head and sampling as traced inside graphs, and what is left of the step."""
    rows = []
    for shape, layers in traced_decodes(runs(folder), engine):
        parts, wall = graph_parts(layers), shape["graph"]["wall_us"]
        rest = wall - sum(parts.values())
        times = [shape["timed"]["wall_us"], wall, parts["layers"], parts["head"], parts["sample"], rest]
        size = [str(shape["batch_size"]), str(shape["tokens"])]
        rows.append([*size, *(f"{time / 1e3:.2f}" for time in times), f"{rest / wall:.0%}"])
    head = [
        "batch", "context", "step, ms", "traced step", "layers", "embedding, final norm, head", "sampling", "rest",
        "rest of step",
    ]  # fmt: skip
    return markdown(head, rows, left=0)


@table("layer-floors")
def layer_floors(folder: str = REFERENCE, engine: str = "nano") -> str:
    """A layer's time inside decode graphs against the time that reading its matrices and cache once would take."""
    found = runs(folder)
    config = model(run_of(found, engine)["model"])
    rows = []
    for shape, layers in traced_decodes(found, engine):
        batch, context = shape["batch_size"], shape["tokens"]
        layer = graph_parts(layers)["layers"] / config.num_layers
        cache = batch * context * config.layer_token_bytes
        floor = floor_us(config.layer_weight_bytes + cache, 0)
        numbers = [layer, config.layer_weight_bytes / 1e6, cache / 1e6, floor, layer / floor]
        rows.append([str(batch), str(context), *(f"{number:.1f}" for number in numbers)])
    head = ["batch", "context", "layer µs", "matrices MB", "cache MB", "floor µs", "time / floor"]
    return markdown(head, rows, left=0)


@table("op-shares")
def op_shares(shape: str, folder: str = REFERENCE) -> str:
    """µs and share of each op in a layer, per engine, from eager traces of one shape, as `prefill:16x1024`."""
    found = runs(folder)
    columns: dict[str, pd.Series] = {}
    closing: dict[str, float] = {}
    for engine in ("vllm", "nano", "fused"):
        run = run_of(found, engine)
        wanted = _find_shape(run, shape)
        layers = of_shape(rows_of(found.layers, run), wanted, "eager")
        columns[engine] = op_medians(layers)
        closing[engine] = wanted["eager"]["wall_us"] / wanted["timed"]["wall_us"]
    order = {op: place for place, op in enumerate(OPS)}
    seen = {op for column in columns.values() for op in column.index}
    ops = sorted(seen, key=lambda op: [order[part] for part in op.split("+")])
    rows = [[f"`{op}`", *(_cell(column, op) for column in columns.values())] for op in ops]
    rows.append(["sum of ops", *(f"{column.sum():.0f}" for column in columns.values())])
    rows.append(["traced step / untraced step", *(f"{ratio:.2f}" for ratio in closing.values())])
    return markdown([f"{shape.replace('x', ' × ').replace(':', ' ')}, µs per layer", *columns], rows)


def _cell(column: pd.Series, op: str) -> str:
    return f"{column[op]:.0f} ({column[op] / column.sum():.0%})" if op in column.index else ""


def _find_shape(run: dict[str, Any], wanted: str) -> dict[str, Any]:
    phase, _, size = wanted.partition(":")
    batch, _, tokens = size.partition("x")
    for shape in run["shapes"]:
        if (shape["phase"], str(shape["batch_size"]), str(shape["tokens"])) == (phase, batch, tokens):
            return shape
    raise InputError(f"The run of {run['engine']} has no shape {wanted}; shapes are written as decode:256x1024.")
