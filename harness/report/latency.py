"""Time per token over batch, and of prefill over the prompt's length: one line per engine, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report import html, style
from harness.report.data import Comparison, Data, Setting, Shape
from harness.report.headline import Value, step_value
from harness.report.html import Section
from harness.report.plots import Plots

_WIDTH, _HEIGHT = 4.6, 3.1
"""Inches of one panel, without its labels."""
_LETTER = 0.075
"""Inches that a letter of the labels beside a panel takes."""


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
    y: str = "ms per step"

    @property
    def xs(self) -> list[int]:
        return sorted({x for curve in self.curves for x in curve.points})


def panels(setting: Setting) -> list[Panel]:
    """Steps of one size are no curve, and stand in the headline.

    Decode over batch for each context, prefill over the prompt's length for each number of prompts and over prompts
    for each length.
    """
    groups: dict[str, tuple[str, list[tuple[int, Shape]]]] = {}
    for shape in setting.shapes:
        if shape.phase == "decode":
            groups.setdefault(f"decode, context {shape.tokens}", ("batch", []))[1].append((shape.batch_size, shape))
        elif shape.phase == "prefill":
            prompts = f"prefill, {shape.batch_size} prompt{'s' * (shape.batch_size > 1)}"
            groups.setdefault(prompts, ("tokens of a prompt", []))[1].append((shape.tokens, shape))
            each = f"prefill, prompts of {shape.tokens} tokens"
            groups.setdefault(each, ("prompts", []))[1].append((shape.batch_size, shape))
    found = []
    for title, (x, places) in groups.items():
        curves = []
        for entry in setting.entries:
            values = {place: step_value(entry, shape) for place, shape in places}
            points = {place: value for place, value in values.items() if value and not value.reason}
            if points:
                curves.append(Curve(entry.label, entry.engine, entry.variant, points))
        panel = Panel(title, x, curves)
        if len(panel.xs) > 1:
            found.append(panel)
    return sorted(found, key=lambda panel: (not panel.title.startswith("decode"), panel.x != "tokens of a prompt"))


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
                curves.append(Curve(comparison.names[label], *variants[label], points))
        panel = Panel(f"decode, prompt {tokens}", "batch", curves, "ms per token")
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
            parts += [html.heading(str(setting)), plots.add(drawn(found), f"latency-{setting.slug}", title, caption)]
    for comparison in data.comparisons:
        if not comparison.is_ablation and (found := comparison_panels(comparison)):
            title = f"Time per token over batch: {comparison}"
            caption = "Median over rounds, and the range of the rounds. Engines took turns."
            parts += [
                html.heading(str(comparison)),
                plots.add(drawn(found), f"latency-{comparison.slug}", title, caption),
            ]
    return Section("Time per token over batch", parts) if parts else None


def drawn(found: list[Panel]) -> Figure:
    """All panels, two beside each other."""
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    labels = _LETTER * max(len(curve.label) for panel in found for curve in panel.curves)
    figure, grid = plt.subplots(rows, columns, figsize=((_WIDTH + labels) * columns, _HEIGHT * rows), squeeze=False)
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
    axes.set_ylabel(panel.y)
    axes.grid(axis="y")
    style.batch_axis(axes, panel.xs)
    style.plain_log(axes, "y", [e for c in panel.curves for v in c.points.values() for e in (v.low, v.high)])
    last = [(max(c.points), c.points[max(c.points)].median, c.label, style.color(c.engine)) for c in panel.curves]
    style.end_labels(axes, last)
