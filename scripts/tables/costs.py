"""What a decode step is made of, on the host and on the GPU, engine beside engine; and how far its traces can be
believed."""

from __future__ import annotations

from typing import Any

import pandas as pd

from engines.base import WHOLE_LAYER
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, Runs, rows_of, runs
from scripts.tables.traces import CUPTI, EVENTS, of_shape

ENGINES = "vllm,nano,fused"
SHAPES = "1x128,32x128,256x128,256x1024"
HOST_PHASES = ("schedule", "prepare", "launch", "sample", "finish", "rest")
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OUTSIDE = {"embed": "embedding and head", "head": "embedding and head", "sample": "sampling", "step": "copies, inputs"}
IDLE = "step less its kernels"
DIFFERENCES = {
    "scheduler": ("host: schedule", "host: finish"),
    "memory: tables and slots": ("host: prepare",),
    "attention": ("GPU: attention",),
    "graphs": ("host: launch",),
    "sampling": ("GPU: sampling", "host: sample"),
    "host work, not hidden": (IDLE,),
}
"""Differences between engines, and the costs that they show in."""
GPU_GROUPS = ("attention", "projections", "norms and small ops", "embedding and head", "sampling", "copies, inputs")


def group_of(block: str, op: str) -> str:
    """The group of GPU work that an op belongs to; one that fuses a matrix product is a projection, else one that
    fuses attention is attention."""
    parts = op.split("+")
    if block in OUTSIDE:
        return OUTSIDE[block]
    if any(part in PROJECTIONS for part in parts):
        return "projections"
    return "attention" if "attention" in parts else "norms and small ops"


def gpu_groups(layers: pd.DataFrame) -> dict[str, float]:
    """µs per step in each of `GPU_GROUPS`: the sum in each iteration, then the median over iterations."""
    ops = layers[layers["op"] != WHOLE_LAYER]
    groups = [group_of(block, op) for block, op in zip(ops["block"], ops["op"], strict=True)]
    sums = ops.assign(group=groups).pivot_table("latency_us", "iteration", "group", aggfunc="sum", fill_value=0.0)
    return {group: float(sums[group].median()) if group in sums else 0.0 for group in GPU_GROUPS}


@table("step-costs")
def step_costs(folder: str = REFERENCE, workload: str = "latency", engines: str = ENGINES, shapes: str = SHAPES) -> str:
    """µs of decode steps per engine: phases of the host, groups of GPU kernels (CUPTI), gaps between kernels.

    Shapes are batch x context. Without a run that has such rows, a sentence that says so.
    """
    found = runs(folder)
    measured = _runs_by_engine(found, workload)
    columns = {e: _costs(found, measured[e]) for e in engines.split(",") if e in measured}
    columns = {engine: costs for engine, costs in columns.items() if costs}
    if not columns:
        return f"Not measured yet: no `{workload}` run in `{folder}` has host phases and kernels of its decode steps."
    names = ["step", *(f"host: {phase}" for phase in HOST_PHASES), *(f"GPU: {group}" for group in GPU_GROUPS),
             "GPU: no place known", "GPU: gaps", "GPU: first to last"]  # fmt: skip
    rows = []
    for shape in shapes.split(","):
        batch, _, context = shape.partition("x")
        for name in names:
            cells = [costs.get((int(batch), int(context)), {}).get(name) for costs in columns.values()]
            if any(cells):
                rows.append([batch, context, name, *("" if us is None else f"{us:,.0f}" for us in cells)])
    absent = [engine for engine in engines.split(",") if engine not in columns]
    note = (
        "µs, medians over steps. Steps are timed untraced; phases of the host and kernels come from passes of their "
        "own. `rest` is mostly waiting for the GPU."
    )
    missing = f" Not measured: {', '.join(absent)}." if absent else ""
    return "\n\n".join([markdown(["batch", "context", "", *columns], rows, left=3), note + missing])


def _runs_by_engine(found: Runs, workload: str) -> dict[str, dict[str, Any]]:
    return {run["engine"]: run for run in found.runs if run["workload"] == workload}


def _costs(found: Runs, run: dict[str, Any]) -> dict[tuple[int, int], dict[str, float]]:
    """µs by (batch, context) and name, of the decode shapes that have host phases or kernels."""
    layers, host, steps = (rows_of(frame, run) for frame in (found.layers, found.host, found.steps))
    costs: dict[tuple[int, int], dict[str, float]] = {}
    for shape in [shape for shape in run["shapes"] if shape["phase"] == "decode"]:
        here: dict[str, float] = {}
        phases = of_shape(host, shape, "host").groupby("host_phase")["latency_us"].median()
        here |= {f"host: {phase}": float(us) for phase, us in phases.items()}
        kernels = of_shape(layers, shape, CUPTI)
        if len(kernels):
            span_us = float(of_shape(steps, shape, CUPTI)["gpu_us"].median())
            gaps_us = shape["kernels"]["gaps"] * span_us
            here |= {f"GPU: {group}": us for group, us in gpu_groups(kernels).items()}
            unplaced = 1 - shape["kernels"]["attributed"]
            here |= {"GPU: no place known": unplaced * (span_us - gaps_us)} if unplaced else {}
            here |= {"GPU: gaps": gaps_us, "GPU: first to last": span_us}
        if here:
            costs[shape["batch_size"], shape["tokens"]] = {"step": shape["timed"]["wall_us"], **here}
    return costs


@table("difference-costs")
def difference_costs(folder: str = REFERENCE, workload: str = "latency", engines: str = "vllm,nano",
                     shapes: str = "1x128,256x128,256x1024") -> str:  # fmt: skip
    """µs per decode step that each of `DIFFERENCES` shows in, by engine and shape (batch x context)."""
    found = runs(folder)
    measured = _runs_by_engine(found, workload)
    costs = {engine: _costs(found, measured[engine]) for engine in engines.split(",") if engine in measured}
    asked = [(int(batch), int(context)) for batch, _, context in (shape.partition("x") for shape in shapes.split(","))]
    columns = [(engine, shape) for shape in asked for engine in costs]
    rows = []
    for difference, names in DIFFERENCES.items():
        for name in names:
            cells = [_with_idle(costs[engine].get(shape, {})).get(name) for engine, shape in columns]
            shown = ["" if us is None else f"{us:,.0f}" for us in cells]
            rows.append([difference, name, *shown])
    head = ["difference", "µs of a step", *(f"{engine}, {batch} × {context}" for engine, (batch, context) in columns)]
    return markdown(head, rows, left=2)


def _with_idle(costs: dict[str, float]) -> dict[str, float]:
    """`costs` with what the untraced step takes beyond its kernels: the GPU's time without work."""
    if "GPU: gaps" not in costs:
        return costs
    return costs | {IDLE: costs["step"] - (costs["GPU: first to last"] - costs["GPU: gaps"])}


@table("closure")
def closure(folder: str = REFERENCE, workload: str = "latency", engines: str = ENGINES) -> str:
    """Per engine and shape, of each traced pass: closure (layers and what lies outside them over the step), and the
    traced step over the untraced one; of CUPTI also the share of kernel time with a place and the share of gaps; and
    the sum of layers by events over that by CUPTI, where one arm was seen by both."""
    found = runs(folder)
    measured = _runs_by_engine(found, workload)
    head = ["engine", "phase", "batch", "tokens"]
    head += [f"{name}: {what}" for name in ("eager", "events") for what in ("closure", "overhead")]
    head += [f"CUPTI: {what}" for what in ("closure", "overhead", "attributed", "gaps")] + ["events / CUPTI"]
    rows = []
    for engine in [engine for engine in engines.split(",") if engine in measured]:
        run = measured[engine]
        layers = rows_of(found.layers, run)
        for shape in run["shapes"]:
            cells = [engine, shape["phase"], str(shape["batch_size"]), f"{shape['tokens']:,}"]
            for name, shown in (("eager", 2), ("graph", 2), ("kernels", 4)):
                record = shape.get(name, {})
                cells += [_number(record, "closure", ".3f"), _number(record, "overhead", ".2f")]
                cells += [_number(record, what, ".1%") for what in ("attributed", "gaps")][: shown - 2]
            rows.append([*cells, _agreement(layers, shape)])
    return markdown(head, rows, left=2)


def _number(record: dict[str, Any], name: str, shown: str) -> str:
    return f"{record[name]:{shown}}" if record.get(name) is not None else ""


def _agreement(layers: pd.DataFrame, shape: dict[str, Any]) -> str:
    """Sum of whole layers by events in graphs over the same by CUPTI; "" where not both saw the same arm."""
    if shape.get("graph", {}).get("arm", "") != shape.get("kernels", {}).get("arm"):
        return ""
    sums = []
    for rows in (of_shape(layers, shape, EVENTS, "graph"), of_shape(layers, shape, CUPTI)):
        whole = rows[rows["op"] == WHOLE_LAYER]
        sums.append(whole.groupby("layer_index")["latency_us"].median().sum())
    return f"{sums[0] / sums[1]:.3f}" if all(sums) else ""
