"""Ops beside what the hardware allows, where its ceilings are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.base import WHOLE_LAYER, InputError
from harness.report import html, style
from harness.report.data import Data, Entry, Setting, Shape
from harness.report.html import Section
from harness.report.plots import Plots
from harness.report.traces import in_order
from harness.roofline.__main__ import ceilings_of
from harness.roofline.ceilings import Ceilings
from harness.roofline.table import STEP, Line, lines

_CAPTION = (
    "Left: ops that multiply, by operations per byte that they must move; the roof is what this machine can do ({}). "
    "Right: the share of the least possible time in each op's time; 100 % is the roof, and more means data that came "
    "from a cache. The sign beside an op's name is its marker on the left; colours are the engines'."
)
_MARKERS = "os^DvPX*<>phd8"
"""One per op, in the order of the legend."""


@dataclass(frozen=True)
class Placed:
    """The roofline's lines of one entry and shape."""

    entry: Entry
    shape: Shape
    ceilings: Ceilings
    lines: list[Line]


def section(data: Data, plots: Plots, given: Ceilings | None) -> Section | None:
    """Rooflines of the telling shapes. A sentence says why where ceilings or traces are missing."""
    parts = []
    for setting in data.settings:
        if not setting.shapes:
            continue
        found, reasons = placed(data, setting, given)
        parts += [html.heading(str(setting)), *(html.paragraph(reason) for reason in reasons)]
        for shape in setting.telling:
            here = [p for p in found if p.shape == shape]
            if not here:
                continue
            title = f"Roofline: {setting}, {shape}"
            caption = _CAPTION.format(here[0].ceilings)
            drawing = plots.add(_drawn(here), f"roofline-{setting.slug}-{shape.slug}", title, caption)
            parts += [html.heading(str(shape)), drawing, html.folded("Numbers", _table(here))]
    return Section("Roofline", parts) if parts else None


def placed(data: Data, setting: Setting, given: Ceilings | None) -> tuple[list[Placed], list[str]]:
    """Every entry and shape whose ceilings are known, and sentences on those whose are not."""
    found, reasons = [], dict[str, None]()
    for entry in setting.entries:
        run: Mapping[str, Any] = entry.run
        try:
            limit = given or ceilings_of(run)
            for of_shape in lines(data.runs, run, limit):
                shape = Shape(of_shape.phase, of_shape.batch_size, of_shape.tokens)
                found.append(Placed(entry, shape, limit, of_shape.lines))
        except (InputError, KeyError) as reason:
            text = str(reason) if isinstance(reason, InputError) else f"{entry.label}: run.json has no {reason}."
            reasons[text.replace("or give them by", "or give them to the report by")] = None
    return found, list(reasons)


def _drawn(here: list[Placed]) -> Figure:
    ops = in_order(list({line.op for p in here for line in p.lines if line.op not in (WHOLE_LAYER, STEP)}))
    ops += [op for op in (WHOLE_LAYER, STEP) if any(line.op == op for p in here for line in p.lines)]
    height = max(3.6, 0.5 + 0.24 * len(ops))
    figure, (roof, shares) = plt.subplots(1, 2, figsize=(10.2, height), width_ratios=(5, 4))
    _roof(roof, here, ops)
    _shares(shares, here, ops)
    return figure


def _roof(axes: Axes, here: list[Placed], ops: list[str]) -> None:
    limit = here[0].ceilings
    points = [(p, line) for p in here for line in p.lines if line.cost.flop]
    intensity = [line.cost.flop / line.cost.bytes for _, line in points]
    ridge = limit.matrix_flop_per_s / limit.read_bytes_per_s
    low, high = min([*intensity, ridge]) / 2, max([*intensity, ridge]) * 2
    xs = np.geomspace(low, high, 200)
    axes.plot(
        xs, np.minimum(xs * limit.read_bytes_per_s, limit.matrix_flop_per_s) / 1e12, color=style.INK, linewidth=1.2
    )
    for (p, line), x in zip(points, intensity, strict=True):
        done = line.cost.flop / line.time_us * 1e6 / 1e12
        look = _marker(ops, line.op)
        axes.plot(x, done, color=style.color(p.entry.engine), marker=look, markersize=6, linestyle="", alpha=0.9)
    heights = [line.cost.flop / line.time_us / 1e6 for _, line in points]
    style.plain_log(axes, "x", [low, high])
    style.plain_log(axes, "y", [min(heights) / 2, limit.matrix_flop_per_s / 1e12])
    axes.set_ylim(min(heights) / 2, limit.matrix_flop_per_s / 1e12 * 1.6)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid()


def _marker(ops: list[str], op: str) -> str:
    return _MARKERS[ops.index(op) % len(_MARKERS)]


def _shares(axes: Axes, here: list[Placed], ops: list[str]) -> None:
    for p in here:
        of = {line.op: line.fraction for line in p.lines}
        looks = style.line(p.entry.engine, p.entry.variant) | {"linestyle": ""}
        axes.plot(
            [100 * of[op] for op in ops if op in of],
            [i for i, op in enumerate(ops) if op in of],
            label=p.entry.label,
            **looks,
        )
    axes.axvline(100, color=style.INK, linewidth=0.8)
    for i, op in enumerate(ops):
        if any(line.op == op and line.cost.flop for p in here for line in p.lines):  # its marker on the left
            at = axes.get_yaxis_transform()
            axes.plot(-0.03, i, marker=_marker(ops, op), color=style.INK, markersize=5, transform=at, clip_on=False)
    axes.set_yticks(range(len(ops)), ops, fontsize=7.5)
    axes.tick_params(axis="y", length=0, pad=13)
    axes.set_ylim(len(ops) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of what the hardware allows")
    axes.grid()
    axes.figure.legend(loc="outside upper right", ncols=4)


def _table(here: list[Placed]) -> str:
    rows = []
    for p in here:
        for line in p.lines:
            numbers = (line.time_us, line.cost.bytes / 1e6, line.cost.flop / 1e9, line.floor_us)
            rows.append(
                [p.entry.label, line.op, line.source, line.bound, *map(html.number, numbers), f"{line.fraction:.1%}"]
            )
    return html.table(["", "op", "timed by", "bound by", "µs", "MB", "GFLOP", "floor, µs", "achieved"], rows, numbers=4)
