"""Ops beside what the hardware allows, where its ceilings are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engines.base import WHOLE_LAYER, InputError
from harness.report import html, style
from harness.report.data import Data, Entry, Setting, Shape, machine_of
from harness.report.html import Section
from harness.report.plots import Plots
from harness.report.traces import in_order
from harness.roofline.__main__ import ceilings_of
from harness.roofline.ceilings import Ceilings, Key
from harness.roofline.ceilings import given as of_datasheet
from harness.roofline.table import STEP, Line, lines

_CAPTION = (
    "Left: ops that multiply, by operations per byte that they must move, below the roof ({}). "
    "Right: the share of the least possible time in each op's time; 100 % is the roof, and more means data that came "
    "from a cache. The sign beside an op's name is its marker on the left; colours are the engines'."
)
_DATASHEETS = {"NVIDIA H200": (4.8e12, 989e12), "NVIDIA H100 80GB HBM3": (3.35e12, 989e12)}
"""Bytes and dense 16-bit operations per second by the maker's datasheet, for runs whose machine was not measured."""
_HALF = ("bfloat16", "float16")
_MARKERS = "os^DvPX*<>phd8"
"""One per op that multiplies, in the model's order."""


@dataclass(frozen=True)
class Placed:
    """The roofline's lines of one entry and shape."""

    entry: Entry
    shape: Shape
    ceilings: Ceilings
    lines: list[Line]


def section(data: Data, plots: Plots, given: Ceilings | None) -> Section | None:
    """Rooflines of the telling shapes. A sentence says why where ceilings or traces are missing."""
    parts: list[str] = []
    every: dict[str, list[str]] = {}
    for setting in data.settings:
        if not setting.shapes:
            continue
        found, reasons = placed(data, setting, given)
        for reason in reasons:
            every.setdefault(reason, []).append(str(setting))
        for shape in setting.telling:
            here = [p for p in found if p.shape == shape]
            if not here:
                continue
            title = f"Roofline: {setting}, {shape}"
            caption = _CAPTION.format(here[0].ceilings)
            drawing = plots.add(_drawn(here), f"roofline-{setting.slug}-{shape.slug}", title, caption)
            parts += [html.heading(f"{setting}: {shape}"), drawing, html.folded("Numbers", _table(here))]
    told = [html.paragraph(f"{reason} ({'; '.join(settings)})") for reason, settings in every.items()]
    return Section("Roofline", [*told, *parts]) if told or parts else None


def placed(data: Data, setting: Setting, given: Ceilings | None) -> tuple[list[Placed], list[str]]:
    """Every entry and shape with the ceilings that are known, and sentences on those that nobody measured."""
    found, reasons = [], dict[str, None]()
    for entry in setting.entries:
        run: Mapping[str, Any] = entry.run
        try:
            limit, said = (given, "") if given else _limit(run, data)
            if said:
                reasons[said] = None
            for of_shape in lines(data.runs, run, limit):
                shape = Shape(of_shape.phase, of_shape.batch_size, of_shape.tokens)
                found.append(Placed(entry, shape, limit, of_shape.lines))
        except (InputError, KeyError) as reason:
            text = str(reason) if isinstance(reason, InputError) else f"{entry.label}: run.json has no {reason}."
            reasons[text.replace("or give them by", "or give them to the report by")] = None
    return found, list(reasons)


def _limit(run: Mapping[str, Any], data: Data) -> tuple[Ceilings, str]:
    """A run's measured ceilings, or those that another run on the page was measured under with the same GPU, driver and
    torch, else its GPU's datasheet and a sentence on that. InputError: none is known."""
    try:
        return ceilings_of(run), ""
    except InputError:
        if not run.get("ceilings") and (other := _measured_alike(run, data)):
            return ceilings_of(other), f"{machine_of(run)}: ceilings as measured for {data.name_of(other)}."
        sheet = _DATASHEETS.get(machine_of(run))
        if run.get("ceilings") or sheet is None or run.get("dtype") not in _HALF:
            raise
    name = f"{machine_of(run)} by its datasheet"
    said = f"{name}: nobody measured the ceilings of this machine, and no kernel reaches these."
    return replace(of_datasheet(*sheet), device=name, matrix_dtype=str(run["dtype"])), said


def _measured_alike(run: Mapping[str, Any], data: Data) -> dict[str, Any] | None:
    """The first run on the page that holds ceilings, with the GPU, driver and torch of `run`."""
    key = Key.of(run["provenance"], run["device"])
    alike = (other for other in data.runs.runs if Key.of(other["provenance"], other["device"]) == key)
    return next((other for other in alike if other.get("ceilings")), None)


def _drawn(here: list[Placed]) -> Figure:
    ops = in_order(list({line.op for p in here for line in p.lines if line.op not in (WHOLE_LAYER, STEP)}))
    ops += [op for op in (WHOLE_LAYER, STEP) if any(line.op == op for p in here for line in p.lines)]
    height = max(3.6, 0.5 + 0.24 * len(ops))
    figure, (roof, shares) = plt.subplots(1, 2, figsize=(10.2, height), width_ratios=(5, 4))
    drawn = [op for op in ops if any(line.op == op and line.cost.flop for p in here for line in p.lines)]
    markers = {op: _MARKERS[i % len(_MARKERS)] for i, op in enumerate(drawn)}
    _roof(roof, here, markers)
    _shares(shares, here, ops, markers)
    return figure


def _roof(axes: Axes, here: list[Placed], markers: Mapping[str, str]) -> None:
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
        axes.plot(
            x, done, color=style.color(p.entry.engine), marker=markers[line.op], markersize=6, linestyle="", alpha=0.9
        )
    heights = [line.cost.flop / line.time_us / 1e6 for _, line in points]
    style.plain_log(axes, "x", [low, high])
    style.plain_log(axes, "y", [min(heights) / 2, limit.matrix_flop_per_s / 1e12])
    axes.set_ylim(min(heights) / 2, limit.matrix_flop_per_s / 1e12 * 1.6)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid()


def _shares(axes: Axes, here: list[Placed], ops: list[str], markers: Mapping[str, str]) -> None:
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
        if op in markers:  # as on the left
            at = axes.get_yaxis_transform()
            axes.plot(-0.03, i, marker=markers[op], color=style.INK, markersize=5, transform=at, clip_on=False)
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
