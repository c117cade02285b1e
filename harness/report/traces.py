"""Which trace tells most truly where a step's time went, and what it says of layers, ops and the step as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from engines.base import NO_LAYER, OPS, WHOLE_LAYER
from harness.report.data import Data, Entry, Shape

SOURCES = (("cupti", None), ("nsys", None), ("cuda_event", "graph"), ("cuda_event", "eager"), ("host", None))
"""Best first, as (source, mode). Kernels say it of the step as it is timed; events in graphs of whole layers only; the
eager trace includes waits for the host."""
KERNELS = ("cupti", "nsys")
"""Sources whose ops have no gaps in them; their whole layers have."""
LAYERS, GAPS, HOST = "layers", "gaps", "host"
OUTSIDE = ("embed", "head", "sample", "step")
STEP_PARTS = (LAYERS, *OUTSIDE, GAPS, HOST)
_ITERATION, _PIECE = ["iteration"], ["layer_index", "block", "op"]


@dataclass(frozen=True)
class Trace:
    """The rows of `layers` and `steps` of one run, shape, source and mode."""

    layers: pd.DataFrame
    steps: pd.DataFrame
    source: str
    mode: str

    def __str__(self) -> str:
        arm = self.layers["arm"].iloc[0]
        waits = ", with waits for the host" if (self.source, self.mode) == ("cuda_event", "eager") else ""
        return f"{self.source}, {self.mode}, arm {arm}{waits}"

    @property
    def has_ops(self) -> bool:
        return bool(((self.layers["layer_index"] != NO_LAYER) & (self.layers["op"] != WHOLE_LAYER)).any())

    def op_medians(self) -> pd.Series:
        """us by (layer_index, block, op): the median over iterations of the sum of an op's pieces."""
        return self.layers.groupby([*_ITERATION, *_PIECE])["latency_us"].sum().groupby(_PIECE).median()

    def block_medians(self) -> pd.DataFrame:
        """us, a row per decoder layer and a column per block; the block `layer` alone where layers are not split."""
        inside = self.layers[self.layers["layer_index"] != NO_LAYER]
        inside = inside[(inside["op"] == WHOLE_LAYER) != self.has_ops]
        sums = inside.groupby([*_ITERATION, "layer_index", "block"])["latency_us"].sum()
        return sums.groupby(["layer_index", "block"]).median().unstack("block")

    def outside_medians(self) -> pd.Series:
        """us by block of what lies outside the decoder layers."""
        outside = self.layers[self.layers["layer_index"] == NO_LAYER]
        return outside.groupby([*_ITERATION, "block"])["latency_us"].sum().groupby("block").median()

    def step_parts(self) -> pd.Series:
        """us by part of the traced step (STEP_PARTS), each the median over iterations.

        `gaps`: the GPU's time from first to last work less what is traced in it. `host`: the rest of the step's wall
        time. A trace without a GPU has no gaps.
        """
        outside = self.layers["layer_index"] == NO_LAYER
        # A whole layer holds the gaps between its kernels, which count as gaps wherever kernels were seen.
        by_op = self.source in KERNELS and self.has_ops
        whole = self.layers[outside | ((self.layers["op"] == WHOLE_LAYER) != by_op)]
        part = whole["block"].where(whole["layer_index"] == NO_LAYER, LAYERS)
        sums = whole.assign(part=part).groupby([*_ITERATION, "part"])["latency_us"].sum().unstack("part").fillna(0.0)
        steps = self.steps.set_index("iteration").loc[sums.index]
        busy = sums.sum(axis=1)
        on_gpu = steps["gpu_us"].fillna(busy)
        # Events outside a graph may overlap its end a little: less than nothing is nothing.
        sums[GAPS] = (on_gpu - busy).clip(lower=0)
        sums[HOST] = (steps["wall_us"] - on_gpu.where(on_gpu > busy, busy)).clip(lower=0)
        return sums.median().reindex(STEP_PARTS).dropna()


def best_trace(data: Data, entry: Entry, shape: Shape, with_ops: bool = False) -> Trace | None:
    """The first of SOURCES that a run has of a shape; `with_ops`: the first that splits layers into ops."""
    layers, steps = (data.rows(table, entry, shape) for table in ("layers", "steps"))
    steps = steps[steps["instrumented"] & (steps["status"] == "ok")]
    for source, wanted in SOURCES:
        here = layers[layers["source"] == source]
        for mode in [wanted] if wanted else here["mode"].unique():
            found = here[here["mode"] == mode]
            own = steps[(steps["source"] == source) & (steps["mode"] == mode)]
            if found.empty or own.empty:
                continue
            trace = Trace(found[found["iteration"].isin(own["iteration"])], own, source, mode)
            if trace.has_ops or not with_ops:
                return trace
    return None


def in_order(ops: Sequence[str]) -> list[str]:
    """Ops in the model's order; unknown ones last."""
    place = {op: i for i, op in enumerate(OPS)}
    return sorted(ops, key=lambda op: [place.get(part, len(OPS)) for part in op.split("+")])
