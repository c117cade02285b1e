"""A comparison's ratios with their intervals, drawn around 1."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from harness.compare.ratios import Ratio
from harness.compare.table import Row
from harness.report import html, style
from harness.report.data import Comparison, Data
from harness.report.html import Section
from harness.report.plots import Plots

Found = list[tuple[Row, list[tuple[str, Ratio]]]]
_WIDE = 3
"""From such a span on, ratios get a logarithmic axis with few ticks."""
_SPARSE = 100
"""From such a span on, they get a tick for each power of ten at most."""
_LIGHTER = 0.35
"""How far the colour of an engine's second variant is on its way to white."""


def section(data: Data, plots: Plots) -> Section | None:
    """A figure for each comparison with pairs; the numbers stand in the headline's tables."""
    parts = []
    for comparison in data.comparisons:
        found = ratios(comparison)
        if not found or comparison.is_ablation:
            continue
        title = f"Ratios to {comparison.baseline}: {comparison}"
        caption = (
            f"Geometric mean of paired rounds over {comparison.baseline}'s, with the 95 % interval. An interval that "
            "reaches over the line at 1 does not say which is faster; its marker is hollow. In each row contestants "
            "stand in the legend's order."
        )
        parts += [html.heading(str(comparison)),
                  plots.add(_drawn(comparison, found), f"ratios-{comparison.slug}", title, caption)]  # fmt: skip
    return Section("Comparison", parts) if parts else None


def ratios(comparison: Comparison) -> Found:
    """Rows with the ratios that have an interval, by contestant."""
    found = []
    for row in comparison.rows:
        each = [(label, cell.ratio) for label, cell in row.cells.items() if cell.ratio and cell.ratio.pairs > 1]
        if each:
            found.append((row, each))
    return found


def _drawn(comparison: Comparison, found: Found) -> Figure:
    labels = [label for label in comparison.engines if any(label == each[0] for _, cells in found for each in cells)]
    variants = comparison.variants()
    gap = 0.8 / len(labels)
    figure, axes = plt.subplots(figsize=(8.2, 1.0 + 0.16 * len(found) * (1 + len(labels))))
    for i, label in enumerate(labels):
        engine, variant = variants[label]
        shade = style.lighter(style.color(engine), _LIGHTER * variant)
        look = style.line(engine, variant) | {"linestyle": "", "color": shade}
        for place, (row, cells) in enumerate(found):
            ratio = dict(cells).get(label)
            if ratio is None:
                continue
            y = place + (i - (len(labels) - 1) / 2) * gap
            sure = ratio.verdict(row.higher_is_better) != "even"
            axes.errorbar(
                ratio.value, y, xerr=[[ratio.value - ratio.low], [ratio.high - ratio.value]], capsize=2.5,
                elinewidth=1.2,
                **(look | {"markerfacecolor": shade if sure else style.PAGE}),
            )  # fmt: skip
        axes.plot([], [], label=comparison.names[label], **(look | {"markerfacecolor": shade}))  # of the legend
    axes.axvline(1, color=style.INK, linewidth=1)
    ends = [end for _, cells in found for _, ratio in cells for end in (ratio.low, ratio.high)]
    if max(ends) > _WIDE * min(ends) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(ends) < _SPARSE * min(ends) else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_yticks(range(len(found)), [_name(row) for row, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"ratio to {comparison.baseline}")
    axes.grid(axis="x")
    figure.legend(loc="outside upper right", ncols=2 if len(labels) > 3 else len(labels))
    return figure


def _name(row: Row) -> str:
    return (
        f"{row.name} ({'higher' if row.higher_is_better else 'lower'} is better)" if row.higher_is_better else row.name
    )
