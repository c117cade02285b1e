"""The study of single ops: time over rows for each variant, and where fusing wins and loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.ops.table import crossovers
from harness.report import html, style
from harness.report.data import Data, machine_of
from harness.report.html import Section
from harness.report.plots import Plots

KEYS = ["run_id", "op", "dtype", "mode", "weight"]
_LOOKS = (("#0072b2", "o"), ("#d55e00", "^"), ("#009e73", "s"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"),
          ("#b8a900", "X"), ("#7f7f7f", "*"))  # fmt: skip
"""One per variant, named in each plot; what bears an engine's name has that engine's."""
_HIGHEST_RATIO = 2.5
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
        caption = (
            f"Median of one call over the number of rows, {mode}, on {machine_of(run)}; right, over that of the "
            f"fastest unfused variant: below the line fusing wins; above {_HIGHEST_RATIO} it is cut off."
        )
        found = study(run, op, weight)
        rows: list[list[html.Cell]] = []
        for n, times in at.iterrows():
            cells = ("–" if pd.isna(us) else html.number(us) for us in times)
            rows.append([f"{n:,}", *cells, str(times.idxmin()), _ratio(found.get(int(n), {}))])  # type: ignore[call-overload]
        header = ["rows", *(f"{variant}, µs" for variant in at.columns), "fastest", "best fused / best unfused"]
        drawing = plots.add(
            drawn([("", at, unfused(run))]), f"ops-{run_id}-{op}-{weight}", f"Op study: {title}", caption
        )
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


def unfused(run: Mapping[str, Any]) -> list[str]:
    """Variants of a study that are a norm and a product apart, as its config tells."""
    variants = (run.get("config") or {}).get("variants") or {}
    return [name for name, conf in variants.items() if not conf["linear"]]


def drawn(studied: Sequence[tuple[str, pd.DataFrame, Sequence[str]]]) -> Figure:
    """A row of two panels for each (title, medians over rows, unfused variants): times, and over the best unfused."""
    figure, grid = plt.subplots(len(studied), 2, figsize=(11.0, 3.4 * len(studied)), squeeze=False)
    for (left, right), (title, at, apart) in zip(grid, studied, strict=True):
        _lines(left, at)
        left.set_ylabel("µs")
        left.set_title(title)
        style.plain_log(left, "y", at.stack().tolist())
        # A study of fused variants alone is held against its fastest.
        best = at[[name for name in at.columns if name in apart] or list(at.columns)].min(axis=1)
        ratios = at.div(best, axis=0)
        ends = _lines(right, ratios)
        right.axhline(1, color=style.INK, linewidth=0.9)
        right.set_ylabel("time / fastest unfused")
        # What is several times slower would hide where lines cross.
        right.set_ylim(max(0.0, float(ratios.min().min()) - 0.1), min(float(ratios.max().max()) + 0.1, _HIGHEST_RATIO))
        style.end_labels(right, [(x, min(y, right.get_ylim()[1]), *rest) for x, y, *rest in ends])
    return figure


def _lines(axes: Axes, at: pd.DataFrame) -> list[tuple[float, float, str, str]]:
    """A line for each variant; their ends, to be named."""
    ends = []
    engines = {variant: (style.color(variant), style.marker(variant)) for variant in at.columns if style.known(variant)}
    free = [look for look in _LOOKS if look not in engines.values()]
    others = [variant for variant in at.columns if variant not in engines]
    looks = engines | {variant: free[i % len(free)] for i, variant in enumerate(others)}
    for variant in at.columns:
        shade, marker = looks[variant]
        of = at[variant].dropna()
        if of.empty:
            continue
        axes.plot(of.index, of, color=shade, marker=marker, markersize=4.5, linewidth=1.3)
        ends.append((float(of.index[-1]), float(of.iloc[-1]), str(variant), shade))
    axes.set_xlabel("rows")
    axes.grid(axis="y")
    ticks = [int(rows) for rows in at.index]
    style.batch_axis(axes, ticks if len(ticks) < 8 else ticks[::2])
    return ends
