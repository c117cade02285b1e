"""Where a step's time goes, from the traced passes of committed runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from engines.base import NO_LAYER, OPS, WHOLE_LAYER
from scripts.tables.registry import InputError, markdown, table
from scripts.tables.sources import REFERENCE, Runs, floor_us, model, rows_of, run_of, runs

KEYS = ["phase", "batch_size", "new_tokens", "context_len"]
EVENTS, CUPTI = "cuda_event", "cupti"
"""What timed a row: events that are recorded between the kernels, or CUPTI, which watches the kernels themselves."""


@dataclass(frozen=True)
class Trace:
    """One shape as one source saw it: its rows of `layers`, and what `run.json` says of that pass."""

    rows: pd.DataFrame
    record: dict[str, Any]
    source: str


def keys_of(shape: dict[str, Any]) -> tuple[str, int, int, int]:
    """(phase, batch_size, new_tokens, context_len) of a shape in `run.json`, as the tables spell it."""
    batch, tokens = shape["batch_size"], shape["tokens"]
    return ("prefill", batch, batch * tokens, 0) if shape["phase"] == "prefill" else ("decode", batch, batch, tokens)


def of_shape(frame: pd.DataFrame, shape: dict[str, Any], source: str, mode: str = "") -> pd.DataFrame:
    """The rows of one shape from one source, in one mode or in all."""
    here = frame["source"] == source
    if mode:
        here &= frame["mode"] == mode
    for key, value in zip(KEYS, keys_of(shape), strict=True):
        here &= frame[key] == value
    return frame[here]


def trace_of(layers: pd.DataFrame, shape: dict[str, Any], mode: str) -> Trace | None:
    """The trace of a shape by CUPTI, of steps as they are timed, if there is one; else by events in `mode`."""
    for source, of_mode, name in ((CUPTI, "", "kernels"), (EVENTS, mode, mode)):
        rows = of_shape(layers, shape, source, of_mode)
        if len(rows):
            return Trace(rows, shape.get(name, {}), source)
    return None


def summed(rows: pd.DataFrame, keys: list[str]) -> pd.Series:
    """µs by `keys`: the sum in each iteration, then the median over iterations."""
    return rows.groupby([*keys, "iteration"])["latency_us"].sum().groupby(keys).median()


def op_medians(layers: pd.DataFrame) -> pd.Series:
    """µs per op in one layer: the median over iterations of each layer's op, then the mean over layers."""
    inside = layers[(layers["layer_index"] >= 0) & (layers["op"] != WHOLE_LAYER)]
    return summed(inside, ["op", "layer_index"]).groupby("op").mean()


def step_parts(layers: pd.DataFrame) -> dict[str, float]:
    """µs of all layers together, of embedding and head, and of sampling, in one step (medians over iterations)."""
    medians = summed(layers[layers["op"] == WHOLE_LAYER], ["layer_index"])
    outside = layers[layers["layer_index"] == NO_LAYER]
    parts = {"layers": float(medians.sum())}
    for name, blocks in (("head", ("embed", "head")), ("sample", ("sample",))):
        parts[name] = float(summed(outside[outside["block"].isin(blocks)], ["op"]).sum())
    return parts


def traced_decodes(found: Runs, engine: str) -> list[tuple[dict[str, Any], Trace]]:
    """The decode shapes of an engine's latency run that were traced as they are timed, with their traces."""
    run = run_of(found, engine)
    layers = rows_of(found.layers, run)
    both = [(s, trace_of(layers, s, "graph")) for s in run["shapes"] if s["phase"] == "decode"]
    return [(shape, trace) for shape, trace in both if trace is not None]


@table("decode-steps")
def decode_steps(folder: str = REFERENCE, engine: str = "nano") -> str:
    """Decode steps of one engine: layers, head and sampling as traced inside graphs, and what is left of the step.

    CUPTI's own cost is on the host, so what its kernels leave is a part of the untraced step; events lengthen the
    graph itself, and what they leave is a part of the traced one.
    """
    rows, sources = [], set()
    for shape, trace in traced_decodes(runs(folder), engine):
        parts, wall = step_parts(trace.rows), shape["timed"]["wall_us"]
        if trace.source == EVENTS:
            wall = trace.record["wall_us"]
        sources.add(trace.source)
        rest = wall - sum(parts.values())
        times = [
            shape["timed"]["wall_us"],
            trace.record["wall_us"],
            parts["layers"],
            parts["head"],
            parts["sample"],
            rest,
        ]
        size = [str(shape["batch_size"]), str(shape["tokens"])]
        rows.append([*size, *(f"{time / 1e3:.2f}" for time in times), f"{rest / wall:.0%}"])
    head = [
        "batch", "context", "step, ms", "traced step", "layers", "embedding, final norm, head", "sampling", "rest",
        "rest of step",
    ]  # fmt: skip
    said = {CUPTI: "Kernels by CUPTI; `rest` is of the untraced step.",
            EVENTS: "Events in the graph; `rest` is of the traced step."}  # fmt: skip
    return "\n\n".join([markdown(head, rows, left=0), " ".join(said[source] for source in sorted(sources))])


@table("layer-floors")
def layer_floors(folder: str = REFERENCE, engine: str = "nano") -> str:
    """A layer's time inside decode graphs against the time that reading its matrices and cache once would take."""
    found = runs(folder)
    config = model(run_of(found, engine)["model"])
    rows = []
    for shape, trace in traced_decodes(found, engine):
        batch, context = shape["batch_size"], shape["tokens"]
        layer = step_parts(trace.rows)["layers"] / config.num_layers
        cache = batch * context * config.layer_token_bytes
        floor = floor_us(config.layer_weight_bytes + cache, 0)
        numbers = [layer, config.layer_weight_bytes / 1e6, cache / 1e6, floor, layer / floor]
        rows.append([str(batch), str(context), *(f"{number:.1f}" for number in numbers)])
    head = ["batch", "context", "layer µs", "matrices MB", "cache MB", "floor µs", "time / floor"]
    return markdown(head, rows, left=0)


@table("op-shares")
def op_shares(shape: str, folder: str = REFERENCE) -> str:
    """µs and share of each op in a layer, per engine, of one shape, as `prefill:16x1024`: of kernels as they are timed
    where CUPTI saw them, else from eager traces."""
    found = runs(folder)
    columns: dict[str, pd.Series] = {}
    closing: dict[str, float] = {}
    sources: dict[str, str] = {}
    for engine in ("vllm", "nano", "fused"):
        run = run_of(found, engine)
        wanted = _find_shape(run, shape)
        trace = trace_of(rows_of(found.layers, run), wanted, "eager")
        if trace is None:
            raise InputError(f"The run of {engine} has no trace of {shape}.")
        columns[engine] = op_medians(trace.rows)
        closing[engine] = trace.record["wall_us"] / wanted["timed"]["wall_us"]
        sources[engine] = "kernels, CUPTI" if trace.source == CUPTI else "eager, events"
    order = {op: place for place, op in enumerate(OPS)}
    seen = {op for column in columns.values() for op in column.index}
    ops = sorted(seen, key=lambda op: [order[part] for part in op.split("+")])
    rows = [[f"`{op}`", *(_cell(column, op) for column in columns.values())] for op in ops]
    rows.append(["sum of ops", *(f"{column.sum():.0f}" for column in columns.values())])
    rows.append(["traced step / untraced step", *(f"{ratio:.2f}" for ratio in closing.values())])
    rows.append(["source", *sources.values()])
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
