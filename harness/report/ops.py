"""The study of single ops: time over rows for each variant, and where fusing wins and loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from harness.ops.table import crossovers
from harness.report import html, style
from harness.report.data import Data, machine_of
from harness.report.html import Section
from harness.report.plots import Plots

KEYS = ["run_id", "op", "dtype", "mode", "weight"]
_LOOKS = (("#0072b2", "o"), ("#d55e00", "^"), ("#009e73", "s"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"),
          ("#b8a900", "X"), ("#7f7f7f", "*"))  # fmt: skip
"""One per variant: they are no engines, and are named in each plot."""
_VERDICTS = {"faster": "fusing wins", "slower": "fusing loses", "even": "unsure"}


def medians(data: Data) -> pd.DataFrame:
    """us, a row per run, op, dtype, mode, weight and number of rows, a column per variant; failed ones are missing."""
    samples = data.runs.ops
    samples = samples[samples["status"] == "ok"]
    weight = samples["shape"].str.replace(" ", "").str.partition("x")[2]  # without the rows
    return samples.assign(weight=weight).groupby([*KEYS, "rows", "variant"])["latency_us"].median().unstack("variant")


def section(data: Data, plots: Plots) -> Section | None:
    """A figure and a table for each op and weight; None where no op was studied."""
    parts: list[str] = []
    if data.runs.ops.empty:
        return None
    runs = {run["run_id"]: run for run in data.runs.runs}
    for (run_id, op, dtype, mode, weight), group in medians(data).groupby(KEYS):
        run = runs[run_id]
        at = group.droplevel(KEYS).dropna(axis=1, how="all")
        title = f"{op}, weight {weight.replace('x', ' × ')}, {dtype}"
        caption = f"Median of one call over the number of rows, {mode}, on {machine_of(run)}."
        found = study(run, op, weight)
        rows: list[list[html.Cell]] = []
        for n, times in at.iterrows():
            cells = ("–" if pd.isna(us) else html.number(us) for us in times)
            rows.append([f"{n:,}", *cells, str(times.idxmin()), _ratio(found.get(int(n), {}))])  # type: ignore[call-overload]
        header = ["rows", *(f"{variant}, µs" for variant in at.columns), "fastest", "best fused / best unfused"]
        drawing = plots.add(_drawn(at), f"ops-{run_id}-{op}-{weight}", f"Op study: {title}", caption)
        told = " ".join([*crossovers(list(found.values())), fastest(at)])
        parts += [html.heading(title), drawing, html.paragraph(told), html.table(header, rows)]
    return Section("Op study", parts) if parts else None


def study(run: Mapping[str, Any], op: str, weight: str) -> dict[int, Mapping[str, Any]]:
    """What `run.json` says of an op and weight ("rows of the weight x its columns"), by number of rows."""
    for product in run.get("study") or ():
        if (product["op"], f"{product['weight_rows']}x{product['k']}") == (op, weight):
            return {record["rows"]: record for record in product["rows"]}
    return {}


def fastest(at: pd.DataFrame) -> str:
    """Which variant is fastest from how many rows on."""
    best = at.idxmin(axis=1)
    changes = best[best != best.shift()]
    return (
        "Fastest: "
        + "; ".join(f"from {rows:,} row{'s' * (rows != 1)} on {variant}" for rows, variant in changes.items())
        + "."
    )


def _ratio(record: Mapping[str, Any]) -> html.Cell:
    both = record.get("fused_over_unfused")
    if not both:
        return "–"
    text = f"{both['fused']} / {both['unfused']} {both['ratio']:.3f}×"
    if "verdict" not in both:
        return text
    return text, f"({both['low']:.3f} – {both['high']:.3f}) {_VERDICTS[both['verdict']]}"


def _drawn(at: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(figsize=(7.6, 3.6))
    ends = []
    for i, variant in enumerate(at.columns):
        shade, marker = _LOOKS[i % len(_LOOKS)]
        of = at[variant].dropna()
        axes.plot(of.index, of, color=shade, marker=marker, markersize=5, linewidth=1.3)
        ends.append((of.index[-1], of.iloc[-1], str(variant), shade))
    axes.set_xlabel("rows")
    axes.set_ylabel("µs")
    axes.grid(axis="y")
    ticks = [int(rows) for rows in at.index]
    style.batch_axis(axes, ticks if len(ticks) < 12 else ticks[::2])
    style.plain_log(axes, "y", at.stack().tolist())
    style.end_labels(axes, ends)
    return figure
