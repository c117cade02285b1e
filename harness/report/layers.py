"""Time per decoder layer, as blocks that add up, and op by op as a heat map."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.base import NO_LAYER, WHOLE_LAYER
from harness.report import html, style
from harness.report.data import Data, Entry, Setting, Shape
from harness.report.html import Section
from harness.report.plots import Plots
from harness.report.traces import OUTSIDE, Trace, best_trace, in_order

_COLUMNS = 3
_WIDTH, _HEIGHT = 3.5, 2.7
"""Inches of one panel."""
_BLOCKS = ("attention", "mlp", "layer")
_SHORT = {"embed": "embed", "head": "head", "sample": "sample", "step": "copies"}
"""Names below the bars of what lies outside of the layers."""

Traced = list[tuple[Entry, Trace]]


def traced(data: Data, setting: Setting, shape: Shape, with_ops: bool = False) -> Traced:
    """The entries of a setting that have a trace of a shape, with the best one."""
    found = ((entry, best_trace(data, entry, shape, with_ops)) for entry in setting.entries)
    return [(entry, trace) for entry, trace in found if trace is not None]


def section(data: Data, plots: Plots) -> Section | None:
    """Blocks of every layer, engines side by side, for the telling shapes of each setting."""
    parts = []
    for setting in data.settings:
        for shape in setting.telling:
            found = traced(data, setting, shape)
            if not found:
                continue
            title = f"Time per layer: {setting}, {shape}"
            caption = f"Median over traced steps. {_sources(found)}"
            parts += [html.heading(f"{setting}: {shape}"),
                      plots.add(bars(found), f"layers-{setting.slug}-{shape.slug}", title, caption),
                      html.folded("Numbers", _block_table(found))]  # fmt: skip
    return Section("Time per layer", parts) if parts else None


def heat_section(data: Data, plots: Plots) -> Section | None:
    """Op by layer for the telling shapes of each setting, on one scale for all engines of a shape."""
    parts = []
    for setting in data.settings:
        for shape in setting.telling:
            found = traced(data, setting, shape, with_ops=True)
            if not found:
                continue
            title = f"Layer by op: {setting}, {shape}"
            caption = f"Median over traced steps, µs; one scale for all engines. {_sources(found)}"
            if any(op_grid(trace).isna().to_numpy().any() for _, trace in found):
                caption += " Empty: no such op of its own in this layer."
            parts += [html.heading(f"{setting}: {shape}"),
                      plots.add(_heat(found), f"heat-{setting.slug}-{shape.slug}", title, caption),
                      html.folded("Numbers: mean over the layers that have the op", op_table(found))]  # fmt: skip
    return Section("Layers and ops", parts) if parts else None


def op_grid(trace: Trace) -> pd.DataFrame:
    """us, a row per op in the model's order and a column per decoder layer."""
    medians = trace.op_medians().reset_index()
    inside = medians[(medians["layer_index"] != NO_LAYER) & (medians["op"] != WHOLE_LAYER)]
    grid = inside.pivot_table(index="op", columns="layer_index", values="latency_us", aggfunc="sum")
    return grid.reindex(in_order(list(grid.index)))


def op_table(found: Traced) -> str:
    """Mean of each op's median over the layers that have it, a column per engine."""
    means = {entry.label: op_grid(trace).mean(axis=1) for entry, trace in found}
    ops = in_order(list({op for mean in means.values() for op in mean.index}))
    rows = [[op, *(html.number(m[op]) if op in m else "–" for m in means.values())] for op in ops]
    return html.table(["op", *(f"{label}, µs" for label in means)], rows)


def _sources(found: Traced) -> str:
    """Which trace each engine's numbers come from, those of one kind together."""
    by: dict[str, list[str]] = {}
    for entry, trace in found:
        by.setdefault(str(trace), []).append(entry.label)
    return "Traced by " + "; ".join(f"{how} ({', '.join(labels)})" for how, labels in by.items()) + "."


def _panels(count: int, height: float = _HEIGHT) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    # One engine alone gets more room than its share.
    width = _WIDTH * columns if columns > 1 else 1.6 * _WIDTH
    figure, grid = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    every = list(grid.flat)
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def bars(found: Traced) -> Figure:
    """Time over layers, a panel per engine on one scale, and beside the layers what lies outside of them."""
    figure, panels = _panels(len(found))
    used: dict[str, None] = {}
    tops = []
    for axes, (entry, trace) in zip(panels, found, strict=True):
        blocks, outside = trace.block_medians(), trace.outside_medians()
        base = np.zeros(len(blocks))
        for block in [b for b in _BLOCKS if b in blocks]:
            heights = blocks[block].fillna(0).to_numpy()
            axes.bar(blocks.index, heights, 0.85, bottom=base, **style.part(block, entry.engine))
            base += heights
            used[block] = None
        tops.append(base.max())
        axes.set_title(entry.label)
        axes.grid(axis="y")
        ticks = list(range(0, len(blocks) - len(blocks) // 8, max(1, len(blocks) // 4)))
        names = [str(layer) for layer in ticks]
        places = range(len(blocks) + 2, len(blocks) + 2 + 2 * len(outside), 2)
        for place, block in zip(places, [b for b in OUTSIDE if b in outside], strict=True):
            axes.bar(place, outside[block], 1.5, **style.part(block, entry.engine))
            used[block] = None
            tops.append(outside[block])
            ticks.append(place)
            names.append(_SHORT[block])
        axes.set_xticks(ticks, names)
        for label in axes.get_xticklabels()[len(ticks) - len(outside) :]:
            label.set(rotation=90, fontsize=8)
        axes.set_xlabel("decoder layer, then outside", fontsize=8)
    for axes in panels:
        axes.set_ylim(0, max(tops) * 1.06)
        style.thousands(axes.yaxis)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("µs")
    names = [name for name in style.PARTS if name in used]
    figure.legend(handles=style.legend_of(names), loc="outside lower center", ncols=6 if len(found) >= _COLUMNS else 3)
    return figure


def _block_table(found: Traced) -> str:
    rows = []
    for entry, trace in found:
        blocks, outside = trace.block_medians(), trace.outside_medians()
        for block in [b for b in _BLOCKS if b in blocks]:
            of = blocks[block].dropna()
            ends = (html.number(v) for v in (of.sum(), of.mean(), of.min(), of.max()))
            rows.append([entry.label, style.PARTS[block].label, *ends])
        for block in [b for b in OUTSIDE if b in outside]:
            rows.append([entry.label, style.PARTS[block].label, html.number(outside[block]), "", "", ""])
    header = ["", "block", "all layers, µs", "mean of a layer", "least", "most"]
    return html.table(header, rows, numbers=2)


def _heat(found: Traced) -> Figure:
    grids = [op_grid(trace) for _, trace in found]
    most = max(float(np.nanmax(grid.to_numpy())) for grid in grids)
    rows = max(len(grid) for grid in grids)
    figure, panels = _panels(len(found), 0.9 + 0.2 * rows)
    for axes, (entry, _), grid in zip(panels, found, grids, strict=True):
        # From 0 on: a colour is a time, also of what differs little.
        image = axes.imshow(grid.to_numpy(), aspect="auto", interpolation="none", cmap="cividis", vmin=0, vmax=most)
        axes.set_yticks(range(len(grid)), list(grid.index), fontsize=7.5)
        step = max(1, grid.shape[1] // 4)
        axes.set_xticks(range(0, grid.shape[1], step), [str(c) for c in grid.columns[::step]])
        axes.set_title(entry.label)
        axes.set_xlabel("decoder layer")
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.01, label="µs")
    style.thousands(bar.ax.yaxis)
    return figure
