"""How the plots look: one colour and marker per engine, one hatch per block, ink that follows the page.

Colours are Okabe and Ito's, which people with any colour vision can tell apart. In grey the markers, hatches and labels
do it. An engine has its colour wherever it is drawn; what differs within one bar is hatched and lighter.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, PAGE = "#12131a", "#fdfcfb"
"""Stand-ins in the SVG for the colours of the page that it lies in; nothing else has them."""
HATCH = "#2b2f36"
"""Hatches and borders of bars: dark in both modes, since the bars' own colours are the same in both."""
_ENGINES = {"vllm": ("#0072b2", "o"), "nano": ("#009e73", "s"), "fused": ("#d55e00", "^"),
            "nano_vllm": ("#cc79a7", "D"), "hf": ("#e69f00", "v")}  # fmt: skip
_OTHERS = (("#56b4e9", "P"), ("#b8a900", "X"), ("#7f7f7f", "*"))
"""Of engines that somebody added. The yellow is Okabe and Ito's, darker, so that it shows on white."""
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Part:
    """How one piece of a stacked bar is drawn: `light` from 0, the engine's colour, to 1, the page's."""

    label: str
    hatch: str
    light: float


PARTS = {
    "layer": Part("whole layer, not split", "", 0.0),
    "layers": Part("decoder layers", "", 0.0),
    "attention": Part("attention", "", 0.0),
    "mlp": Part("MLP", "////", 0.45),
    "embed": Part("embedding", "||||", 0.6),
    "head": Part("final norm and head", "xxxx", 0.3),
    "sample": Part("sampling", "\\\\\\\\", 0.6),
    "step": Part("inputs and tokens copied", "++++", 0.5),
    "gaps": Part("gaps between kernels", "----", 0.8),
    "host": Part("host only", "", 0.85),
    "schedule": Part("schedule", "", 0.0),
    "prepare": Part("prepare", "////", 0.45),
    "launch": Part("launch", "xxxx", 0.3),
    "finish": Part("finish", "++++", 0.5),
    "rest": Part("rest, mostly waiting", "", 0.85),
}

FONTS = ["DejaVu Sans", "Verdana", "Arial"]
"""The first is what sizes are computed with; an SVG names all of them in each of its texts, so they are few."""
RC: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "hatch.color": HATCH, "hatch.linewidth": 0.5, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "font.size": 9, "font.sans-serif": FONTS, "axes.grid": False, "grid.color": INK,
    "grid.alpha": 0.15, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8.5, "svg.fonttype": "none",
    "svg.hashsalt": "report", "figure.constrained_layout.use": True, "axes.axisbelow": True,
}  # fmt: skip


def use() -> None:
    """Set matplotlib up for the report's plots, without a display."""
    mpl.use("Agg")
    mpl.rcParams.update(RC)


def color(engine: str) -> str:
    """An engine's colour, in every plot and report."""
    return _look(engine)[0]


def marker(engine: str) -> str:
    """An engine's marker, in every plot and report."""
    return _look(engine)[1]


def known(engine: str) -> bool:
    """Whether an engine has a colour and marker of its own."""
    return engine in _ENGINES


def _look(engine: str) -> tuple[str, str]:
    return _ENGINES.get(engine) or _OTHERS[zlib.crc32(engine.encode()) % len(_OTHERS)]


def line(engine: str, variant: int) -> dict[str, Any]:
    """Arguments of `plot` and `errorbar`: variants of an engine share its colour and differ in line and filling."""
    filling = color(engine) if variant % 2 == 0 else PAGE
    return {
        "color": color(engine), "marker": marker(engine), "markersize": 5.5, "markerfacecolor": filling,
        "linestyle": _LINES[variant % len(_LINES)], "linewidth": 1.4,
    }  # fmt: skip


def part(name: str, engine: str) -> dict[str, Any]:
    """Arguments of `bar`: the engine's colour, lighter and hatched as the part wants it."""
    look = PARTS[name]
    return {"facecolor": lighter(color(engine), look.light), "hatch": look.hatch, "edgecolor": HATCH, "linewidth": 0.4}


def lighter(name: str, by: float) -> tuple[float, float, float]:
    """A colour on its way to white."""
    red, green, blue = (1 - (1 - channel) * (1 - by) for channel in to_rgb(name))
    return red, green, blue


def legend_of(names: Sequence[str]) -> list[Patch]:
    """Legend handles of parts, in grey: the colour is the engine's."""
    grey = "#8c8c8c"
    looks = [PARTS[name] for name in names]
    return [
        Patch(facecolor=lighter(grey, look.light), hatch=look.hatch, edgecolor=HATCH, linewidth=0.4, label=look.label)
        for look in looks
    ]


def plain_log(axes: Axes, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers; linear from 0 on where the values span less than three times."""
    low, high = min(values), max(values)
    which = axes.yaxis if axis == "y" else axes.xaxis
    if low <= 0 or high / low < 3:
        (axes.set_ylim if axis == "y" else axes.set_xlim)(0, high * 1.15)
        return
    (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
    which.set_major_locator(LogLocator(subs=(1,) if high / low > 100 else (1, 2, 3, 5)))
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    which.set_minor_locator(NullLocator())
    which.set_minor_formatter(NullFormatter())


def thousands(axis: Axis) -> None:
    """Numbers with a comma between thousands."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    """A base-2 axis with a tick at each batch size."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(batches), [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(batches) / 1.25, max(batches) * 1.25)


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 13) -> None:
    """Labels right of the axes for lines that end at (x, y), each with text and colour, none over another.

    Call it when the axes have their limits; `gap` is the least distance in points.
    """
    least = gap * axes.figure.dpi / 72 / axes.bbox.height
    places: Any = axes.transData.transform([(x, y) for x, y, _, _ in ends]) if ends else []
    placed = sorted(
        (float(axes.transAxes.inverted().transform(p)[1]), *end) for p, end in zip(places, ends, strict=True)
    )
    heights: list[float] = []
    for height, *_ in placed:
        heights.append(max(height, heights[-1] + least) if heights else height)
    # What was only pushed up is moved half way back, so that a crowd stays around its middle.
    shift = max((h - p[0] for h, p in zip(heights, placed, strict=True)), default=0.0) / 2
    for height, (_, x, y, text, shade) in zip(heights, placed, strict=True):
        axes.annotate(
            text, (x, y), (1.02, height - shift), textcoords="axes fraction", va="center", fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.7, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip
