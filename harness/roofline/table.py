"""Times of a run beside what the hardware allows: per op, per layer and per step of each shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.table import Table

from engines.base import OPS, WHOLE_LAYER, InputError
from harness.results import Runs
from harness.roofline.ceilings import Ceilings
from harness.roofline.costs import Cost, Load, Shapes, cost, layer_cost, step_cost

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
STEP = "step"
KEYS = ["phase", "batch_size", "new_tokens", "context_len"]
_DRAWS = "sample+embed"
_SUMS = "tile_stats"
"""In the name of the kernel that reads all logits to draw from. Where the head has made its sums, the kernel that draws
reads a tile of each row."""


@dataclass(frozen=True)
class Line:
    """One op in one layer (the mean over layers), one whole layer, or the step: its time and its floor."""

    op: str
    source: str
    time_us: float
    cost: Cost
    floor_us: float
    bound: str  # "bytes" or "operations": what the floor comes from

    @property
    def fraction(self) -> float:
        """Of what the hardware allows; above 1 where data came from a cache that the floor does not know."""
        return self.floor_us / self.time_us


@dataclass(frozen=True)
class ShapeLines:
    """The lines of one shape of a run, in the order of the model, then `layer`, then `step`."""

    phase: str
    batch_size: int
    tokens: int
    lines: list[Line]

    def __str__(self) -> str:
        what = "tokens" if self.phase == "prefill" else "context"
        return f"{self.phase}, batch {self.batch_size}, {what} {self.tokens}"


def load_of(shape: Mapping[str, Any]) -> Load:
    """What a shape of `run.json` computes."""
    batch, tokens = shape["batch_size"], shape["tokens"]
    return Load(batch, batch * tokens, 0) if shape["phase"] == "prefill" else Load(batch, batch, tokens)


def lines(runs: Runs, run: Mapping[str, Any], ceilings: Ceilings) -> list[ShapeLines]:
    """Every shape of `run`, one of `runs`, that has times. InputError: a run whose work cannot be counted."""
    options = run["config"]["engine"]["options"]
    if options.get("tensor_parallel_size", 1) > 1:
        raise InputError("A run on several GPUs cannot be compared with the ceilings of one.")
    shapes = Shapes.of(run["config"]["model"], ELEMENT_BYTES[run["dtype"]])
    layers = runs.layers[runs.layers["run_id"] == run["run_id"]]
    features = run.get("notes", {}).get("features", ())
    found = []
    for shape in run.get("shapes", []):
        whole = layers
        if shape["phase"] == "prefill" and "last_rows" in features:
            # The last layer goes on with the rows that are drawn from; its times are not those of all tokens.
            whole = layers[layers["layer_index"] != shapes.num_layers - 1]
        here = list(_lines(shapes, shape, whole, ceilings, "residual" in features))
        if here:
            found.append(ShapeLines(shape["phase"], shape["batch_size"], shape["tokens"], here))
    return found


def _lines(
    shapes: Shapes, shape: Mapping[str, Any], layers: pd.DataFrame, ceilings: Ceilings, products_add: bool
) -> Iterator[Line]:
    load = load_of(shape)
    key = (shape["phase"], load.batch_size, load.new_tokens, load.context_len)
    here = layers[(layers[KEYS] == list(key)).all(axis=1)]
    times = op_times(here)
    drawing = here.loc[(here["op"] == _DRAWS) & (here["source"] == "cupti"), "kernels"]
    few_logits = len(drawing) > 0 and not drawing.str.contains(_SUMS).any()
    order = {op: place for place, op in enumerate(OPS)}
    inside = [op for op in times.index if op != WHOLE_LAYER]
    ops = sorted(inside, key=lambda op: [order[part] for part in op.split("+")])
    for op in [*ops, WHOLE_LAYER]:
        if op in times.index:
            counted = "embed" if op == _DRAWS and few_logits else op
            of_op = layer_cost(shapes, load) if op == WHOLE_LAYER else cost(shapes, counted, load, products_add)
            yield _line(op, times.at[op, "source"], times.at[op, "time_us"], of_op, ceilings)
    timed = shape.get("timed", {})
    if timed.get("status") == "ok":
        yield _line(STEP, f"host, {timed['mode']}", timed["wall_us"], step_cost(shapes, load), ceilings)


def _line(op: str, source: str, time_us: float, of_op: Cost, ceilings: Ceilings) -> Line:
    floor_us = of_op.floor_us(ceilings.read_bytes_per_s, ceilings.matrix_flop_per_s)
    bound = "bytes" if of_op.bytes / ceilings.read_bytes_per_s * 1e6 == floor_us else "operations"
    return Line(op, source, float(time_us), of_op, floor_us, bound)


def op_times(layers: pd.DataFrame) -> pd.DataFrame:
    """`time_us` and `source` by op, from the rows of one shape: per layer the median over iterations, then the mean
    over layers. An op that runs in several pieces is their sum.

    Kernels (cupti) say it of the step as it is timed. Without them, events inside graphs do for whole layers and what
    lies outside, and the eager trace for the ops of a layer; that one includes waits for the host.
    """
    from_kernels = layers["source"] == "cupti"
    if from_kernels.any():
        chosen = layers[from_kernels]
    else:
        in_graph = layers[layers["mode"] == "graph"]
        chosen = pd.concat([in_graph, layers[(layers["mode"] == "eager") & ~layers["op"].isin(in_graph["op"])]])
    by = ["source", "mode", "op", "layer_index"]
    each = chosen.groupby([*by, "iteration"])["latency_us"].sum().groupby(by).median()
    mean = each.groupby(["source", "mode", "op"]).mean().reset_index(name="time_us")
    return mean.assign(source=mean["source"] + ", " + mean["mode"]).set_index("op")[["time_us", "source"]]


def table(shape: ShapeLines, title: str) -> Table:
    """The lines of one shape for people."""
    made = Table(title=f"{title}: {shape}", title_justify="left")
    for name in ("", "timed by", "time µs", "MB", "GFLOP", "floor µs", "bound by", "achieved"):
        made.add_column(name, justify="left" if name in ("", "timed by", "bound by") else "right")
    for line in shape.lines:
        if line.op in (WHOLE_LAYER, STEP):
            made.add_section()
        made.add_row(
            line.op, line.source, f"{line.time_us:,.1f}", f"{line.cost.bytes / 1e6:,.3f}",
            f"{line.cost.flop / 1e9:,.3f}", f"{line.floor_us:,.1f}", line.bound, f"{line.fraction:.1%}",
        )  # fmt: skip
    return made
