"""Time per token over batch, and of prefill over tokens: one line per engine, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from harness.report import html, style
from harness.report.data import Comparison, Data, Setting
from harness.report.headline import Value, step_value
from harness.report.html import Section
from harness.report.plots import Plots

_PANEL = (4.6, 3.1)
"""Inches of one panel."""


@dataclass(frozen=True)
class Curve:
    """One engine's values over batch sizes or tokens."""

    label: str
    engine: str
    variant: int
    points: dict[int, Value]


@dataclass(frozen=True)
class Panel:
    """Curves that share axes."""

    title: str
    x: str
    curves: list[Curve]

    @property
    def xs(self) -> list[int]:
        return sorted({x for curve in self.curves for x in curve.points})


def panels(setting: Setting) -> list[Panel]:
    """A panel of decode steps for each context, over batch; one of prefill steps, over tokens."""
    groups: dict[str, tuple[str, list]] = {}
    for shape in setting.shapes:
        if shape.phase == "decode":
            key = f"decode, context {shape.tokens}"
            groups.setdefault(key, ("batch", []))[1].append((shape.batch_size, shape))
        elif shape.phase == "prefill":
            groups.setdefault("prefill", ("tokens in the step", []))[1].append((shape.work, shape))
    found = []
    for title, (x, places) in groups.items():
        curves = []
        for entry in setting.entries:
            values = {place: step_value(entry, shape) for place, shape in places}
            points = {place: value for place, value in values.items() if value and not value.reason}
            if points:
                curves.append(Curve(entry.label, entry.engine, entry.variant, points))
        panel = Panel(title, x, curves)
        if len(panel.xs) > 1:  # one size is no curve, and stands in the headline
            found.append(panel)
    return sorted(found, key=lambda panel: panel.title != "prefill" and -len(panel.xs))


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """A panel for each prompt length of the comparison's TPOT, medians over rounds with the range of the rounds."""
    variants = comparison.variants()
    lengths = sorted(
        {row.tokens for row in comparison.rows if row.metric in ("tpot_ms", "step_ms") and row.phase == "decode"}
    )
    found = []
    for tokens in lengths:
        curves = []
        for label in comparison.engines:
            points = {
                row.batch_size: Value(cell.spread.median, cell.spread.lowest, cell.spread.highest)
                for row in comparison.rows
                if row.phase == "decode" and row.tokens == tokens and (cell := row.cells[label]).spread is not None
            }
            if points:
                curves.append(Curve(label, *variants[label], points))
        panel = Panel(f"decode, prompt {tokens}", "batch", curves)
        if len(panel.xs) > 1:
            found.append(panel)
    return found


def section(data: Data, plots: Plots) -> Section | None:
    """A figure for each setting and comparison with steps of several sizes."""
    parts = []
    for setting in data.settings:
        if found := panels(setting):
            title = f"Step time over batch: {setting}"
            caption = (
                "Median of one untraced step and its 95 % interval (often smaller than the marker). In decode a step "
                "is the time per token of each sequence."
            )
            parts += [html.heading(str(setting)), plots.add(_drawn(found), f"latency-{setting.slug}", title, caption)]
    for comparison in data.comparisons:
        if found := comparison_panels(comparison):
            title = f"Time per token over batch: {comparison}"
            caption = "Median over rounds, and the range of the rounds. Engines took turns."
            parts += [
                html.heading(str(comparison)),
                plots.add(_drawn(found), f"latency-{comparison.slug}", title, caption),
            ]
    return Section("Time per token over batch", parts) if parts else None


def _drawn(found: list[Panel]):
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(_PANEL[0] * columns, _PANEL[1] * rows), squeeze=False)
    for axes, panel in zip(grid.flat, found, strict=False):
        _draw(axes, panel)
    for axes in list(grid.flat)[len(found) :]:
        axes.remove()
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    for curve in panel.curves:
        xs = sorted(curve.points)
        values = [curve.points[x] for x in xs]
        medians = [v.median for v in values]
        ends = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
        axes.errorbar(xs, medians, yerr=ends, capsize=2.5, elinewidth=0.9, **style.line(curve.engine, curve.variant))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel("ms per step")
    axes.grid(axis="y")
    style.batch_axis(axes, panel.xs)
    style.plain_log(axes, "y", [e for c in panel.curves for v in c.points.values() for e in (v.low, v.high)])
    last = [(max(c.points), c.points[max(c.points)].median, c.label, style.color(c.engine)) for c in panel.curves]
    style.end_labels(axes, last)
