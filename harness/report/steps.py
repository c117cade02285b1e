"""Where a step goes: layers, sampling, gaps on the GPU, the host; and the host's phases."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.report import html, style
from harness.report.data import Data, Entry, Setting, Shape
from harness.report.html import Section
from harness.report.layers import traced
from harness.report.plots import Plots
from harness.report.traces import STEP_PARTS

HOST_PHASES = ("schedule", "prepare", "launch", "sample", "finish", "rest")

Bars = list[tuple[Entry, pd.Series]]
"""Entries with us by part."""


def section(data: Data, plots: Plots) -> Section | None:
    """Parts of the traced step, then the phases of the host, shape by shape."""
    parts = []
    for setting in data.settings:
        made = _gpu(data, setting, plots) + _host(data, setting, plots)
        if made:
            parts += [html.heading(str(setting)), *made]
    return Section("Where the step goes", parts) if parts else None


def host_medians(data: Data, entry: Entry, shape: Shape) -> pd.Series:
    """us by phase of the host: medians over steps; empty where they were not timed."""
    rows = data.rows("host", entry, shape)
    medians = rows.groupby("host_phase")["latency_us"].median()
    return medians.reindex([phase for phase in HOST_PHASES if phase in medians.index])


def _gpu(data: Data, setting: Setting, plots: Plots) -> list[str]:
    traces = {shape: traced(data, setting, shape) for shape in setting.shapes}
    every = {shape: [(entry, trace.step_parts()) for entry, trace in found] for shape, found in traces.items()}
    drawn = {shape: every[shape] for shape in setting.telling if every[shape]}
    if not drawn:
        return []
    title = f"Where the traced step goes: {setting}"
    caption = (
        "Each part's median over traced steps, so that a bar, and the number beside it, is the step under its trace, "
        "which mostly takes longer than without (the upright line). Shapes have scales of their own."
    )
    timed = {(e.label, s): e.pass_of(s, "timed").get("wall_us") for s in drawn for e in setting.entries}
    figure = _drawn(drawn, timed)
    rows = []
    for shape, bars in every.items():
        for (entry, of), (_, trace) in zip(bars, traces[shape], strict=True):
            cells = [html.number(of[p] / 1e3) if p in of else "–" for p in STEP_PARTS]
            whole = entry.pass_of(shape, "timed").get("wall_us")
            closure, overhead = _quality(entry, shape, trace.source, trace.mode)
            rows.append([str(shape), entry.label, str(trace), html.number(whole / 1e3) if whole else "–",
                         html.number(of.sum() / 1e3), *cells, closure, overhead])  # fmt: skip
    names = [style.PARTS[p].label for p in STEP_PARTS]
    header = ["shape", "", "traced by", "step, ms", "traced step", *names, "closure", "overhead"]
    table = html.table(header, rows, numbers=3)
    drawing = plots.add(figure, f"step-{setting.slug}", title, caption)
    return [html.paragraph("The step, by what it computes"), drawing, html.folded("Numbers of all shapes, ms", table)]


def _quality(entry: Entry, shape: Shape, source: str, mode: str) -> tuple[str, str]:
    record = entry.pass_of(shape, "kernels" if source == "cupti" else mode)
    closure, overhead = record.get("closure"), record.get("overhead")
    return (f"{closure:.3f}" if closure else "–", f"{overhead:.2f}×" if overhead else "–")


def _host(data: Data, setting: Setting, plots: Plots) -> list[str]:
    every: dict[Shape, Bars] = {}
    for shape in setting.shapes:
        found = [(entry, host_medians(data, entry, shape)) for entry in setting.entries]
        if bars := [(entry, of) for entry, of in found if len(of)]:
            every[shape] = bars
    drawn = {shape: every[shape] for shape in setting.telling if shape in every}
    if not drawn:
        return []
    title = f"Host time by phase: {setting}"
    figure = _drawn(drawn, {})
    phases = [p for p in HOST_PHASES if any(p in of for bars in every.values() for _, of in bars)]
    rows = [
        [str(shape), entry.label, *(html.number(of[p]) if p in of else "–" for p in phases)]
        for shape, bars in every.items()
        for entry, of in bars
    ]
    table = html.table(["shape", "", *(style.PARTS[p].label for p in phases)], rows, numbers=2)
    caption = (
        "Median host time of each phase in a step, without phases inside it. With a GPU the rest is mostly waiting."
    )
    drawing = plots.add(figure, f"host-{setting.slug}", title, caption)
    return [html.paragraph("The same step, by what the host does"), drawing,
            html.folded("Numbers of all shapes, µs", table)]  # fmt: skip


def _drawn(shapes: dict[Shape, Bars], timed: dict[tuple[str, Shape], float | None]) -> Figure:
    heights = [0.5 + 0.34 * len(bars) for bars in shapes.values()]
    figure, grid = plt.subplots(
        len(shapes), 1, figsize=(8.2, sum(heights) + 0.9), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    used: dict[str, None] = {}
    for axes, (shape, bars) in zip(grid.flat, shapes.items(), strict=True):
        used |= dict.fromkeys(_stack(axes, shape, bars, timed))
        style.thousands(axes.xaxis)
    list(grid.flat)[-1].set_xlabel("ms")
    names = [name for name in dict.fromkeys((*STEP_PARTS, *HOST_PHASES)) if name in used]
    handles: list[Artist] = list(style.legend_of(names))
    if any(timed.values()):
        handles.append(Line2D([], [], color=style.INK, linewidth=1.8, label="the step without a trace"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _stack(axes: Axes, shape: Shape, bars: Bars, timed: dict[tuple[str, Shape], float | None]) -> list[str]:
    for place, (entry, of) in enumerate(bars):
        left = 0.0
        for name, us in of.items():
            axes.barh(place, us / 1e3, 0.7, left=left, **style.part(str(name), entry.engine))
            left += us / 1e3
        if whole := timed.get((entry.label, shape)):
            for shade, width in ((style.PAGE, 3.6), (style.INK, 1.8)):
                axes.plot([whole / 1e3] * 2, [place - 0.46, place + 0.46], color=shade, linewidth=width)
            left = max(left, whole / 1e3)
        axes.annotate(
            html.number(of.sum() / 1e3), (left, place), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(bars)), [entry.label for entry, _ in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_title(str(shape))
    return [str(name) for _, of in bars for name, us in of.items() if us > 0]
