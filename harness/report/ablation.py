"""What each feature of an engine is worth: its variants with features left out, beside the one that has all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness.compare.contestants import folder_name
from harness.report import html, style
from harness.report.data import Comparison, Data, Setting
from harness.report.headline import Value, lines
from harness.report.html import Section
from harness.report.labels import feature_set
from harness.report.plots import Plots

_DRAWN = 4
"""Items that get a panel; the table has all."""


@dataclass(frozen=True)
class Variant:
    """An engine with some of its features, and its values by the name of what was timed."""

    engine: str
    features: tuple[str, ...]
    values: dict[str, Value]


def of_setting(setting: Setting) -> list[list[Variant]]:
    """The variants of each engine that ran with different features."""
    found = lines(setting)
    variants = []
    for entry in setting.entries:
        features = (entry.run.get("notes") or {}).get("features")
        if features is not None:
            values = {line.name: v for line in found if (v := line.values.get(entry.label)) and not v.reason}
            variants.append(Variant(entry.engine, tuple(features), values))
    return _families(variants)


def of_comparison(data: Data, comparison: Comparison) -> list[list[Variant]]:
    """The same of the contestants of a comparison; medians over rounds, with their range."""
    variants, engines = [], comparison.variants()
    for label in comparison.engines:
        runs = [run for run in data.runs.runs if Path(run["run_dir"]).name == folder_name(label)
                and data.comparison_of(run) is comparison]  # fmt: skip
        features = next((f for run in runs if (f := (run.get("notes") or {}).get("features")) is not None), None)
        if features is not None:
            spreads = {row.name: row.cells[label].spread for row in comparison.rows}
            values = {name: Value(s.median, s.lowest, s.highest) for name, s in spreads.items() if s is not None}
            variants.append(Variant(engines[label][0], tuple(features), values))
    return _families(variants)


def section(data: Data, plots: Plots) -> Section | None:
    """Bars and a table for each engine that ran with several sets of features; None where none did."""
    parts = []
    families = [(str(s), s.slug, family) for s in data.settings for family in of_setting(s)]
    families += [(str(c), c.slug, family) for c in data.comparisons for family in of_comparison(data, c)]
    for title, slug, family in families:
        engine = family[0].engine
        caption = "Time with these features on, over all of them (line); the range is that of the headline's table."
        parts += [html.heading(f"{engine}: {title}"),
                  plots.add(_drawn(family), f"ablation-{engine}-{slug}", f"Features of {engine}: {title}", caption),
                  html.table(*_table(family))]  # fmt: skip
    return Section("What each feature is worth", parts) if parts else None


def names(family: Sequence[Variant]) -> list[str]:
    """Each variant's features in few words."""
    return [feature_set(v.features, [other.features for other in family]) for v in family]


def _families(variants: Sequence[Variant]) -> list[list[Variant]]:
    """By engine, most features first; engines with one set of features are left out."""
    found = []
    for engine in dict.fromkeys(v.engine for v in variants):
        family = sorted((v for v in variants if v.engine == engine and v.values), key=lambda v: -len(v.features))
        if len({v.features for v in family}) > 1:
            found.append(family)
    return found


def _items(family: Sequence[Variant]) -> Iterator[str]:
    yield from (name for name in family[0].values if any(name in v.values for v in family[1:]))


def _drawn(family: Sequence[Variant]) -> Figure:
    items = list(_items(family))
    drawn = (
        items if len(items) <= _DRAWN else [items[round(i * (len(items) - 1) / (_DRAWN - 1))] for i in range(_DRAWN)]
    )
    labels = names(family)
    figure, grid = plt.subplots(
        len(drawn), 1, figsize=(8.2, len(drawn) * (0.75 + 0.28 * len(family))), squeeze=False
    )  # fmt: skip
    for axes, item in zip(grid.flat, drawn, strict=True):
        whole = family[0].values[item].median
        for place, variant in enumerate(family):
            if value := variant.values.get(item):
                look: dict[str, Any] = style.part("mlp" if place else "layers", variant.engine)
                ends = [[value.median - value.low], [value.high - value.median]]
                axes.barh(
                    place,
                    value.median,
                    0.7,
                    xerr=ends,
                    capsize=2,
                    ecolor=style.INK,
                    error_kw={"elinewidth": 0.8},
                    **look,
                )
                text = f"{html.number(value.median)}" + f", {value.median / whole - 1:+.1%}" * (place > 0)
                axes.annotate(
                    text, (max(value.high, whole), place), (6, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.axvline(whole, color=style.INK, linewidth=0.9)
        axes.set_yticks(range(len(family)), labels)
        axes.set_ylim(len(family) - 0.45, -0.55)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_title(item)
    return figure


def _table(family: Sequence[Variant]) -> tuple[list[str], list[list[html.Cell]]]:
    rows: list[list[html.Cell]] = []
    for item in _items(family):
        whole = family[0].values[item]
        cells: list[html.Cell] = []
        for place, variant in enumerate(family):
            value = variant.values.get(item)
            if value is None:
                cells.append("–")
                continue
            ratio, low, high = value.over(whole)
            text = html.interval(value.median, value.low, value.high)
            cells.append((text, f"{ratio:.3f}× ({low:.3f} – {high:.3f})") if place else text)
        rows.append([item, *cells])
    return ["", *names(family)], rows
