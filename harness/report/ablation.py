"""What each feature of an engine is worth: variants with other features on, against one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness.compare.contestants import folder_name
from harness.report import html, style
from harness.report.data import Comparison, Data, Setting
from harness.report.headline import Value, lines
from harness.report.html import Section
from harness.report.plots import Plots

_DRAWN = 6
"""Items that get a panel; the table has all."""
_FAR = 5
"""Times as long as the next one in its panel is a bar that is cut off, since nothing else would be seen beside it."""


@dataclass(frozen=True)
class Variant:
    """An engine with some of its features: `values` by the name of what was timed, and `ratios` to the reference's, of
    rounds that ran next to each other; without them the two values are divided."""

    label: str
    engine: str
    features: tuple[str, ...]
    values: dict[str, Value]
    ratios: dict[str, Value]

    def over(self, reference: Variant, item: str) -> Value:
        """The ratio to the reference's value, with its interval where there is one."""
        if item in self.ratios:
            return self.ratios[item]
        mine, its = self.values[item], reference.values[item]
        middle, low, high = mine.over(its)
        return Value(middle, low, high, once=mine.once or its.once)


@dataclass(frozen=True)
class Family:
    """Variants of one engine, and the one that they are held against."""

    title: str
    reference: Variant
    others: list[Variant]

    @property
    def items(self) -> list[str]:
        """What the reference and another variant have both."""
        return [item for item in self.reference.values if any(item in other.values for other in self.others)]

    def ordered(self, items: Sequence[str]) -> list[Variant]:
        """The others, those that change one of the items most first."""
        most = {id(other): max((abs(other.over(self.reference, item).median - 1) for item in items
                                if item in other.values), default=0.0) for other in self.others}  # fmt: skip
        return sorted(self.others, key=lambda other: -most[id(other)])

    def name(self, variant: Variant) -> str:
        """A variant by what sets it apart from the reference."""
        here, its = variant.features, self.reference.features
        without, more = [f for f in its if f not in here], [f for f in here if f not in its]
        if not (without or more):
            return its_name(self) if variant is self.reference else f"the same features ({variant.label})"
        parts = [f"without {'+'.join(without)}"] * bool(without) + [f"with {'+'.join(more)}"] * bool(more)
        return " ".join(parts) if here else "no features"


def its_name(family: Family) -> str:
    """The reference by its features."""
    every = {feature for other in family.others for feature in other.features}
    if not family.reference.features:
        return "no features"
    return "all features" if every <= set(family.reference.features) else "+".join(family.reference.features)


def of_setting(setting: Setting) -> Iterator[Family]:
    """Engines that ran with different features, each run by itself, held against the one with most of them."""
    found = lines(setting)
    variants = []
    for entry in setting.entries:
        features = (entry.run.get("notes") or {}).get("features")
        if features is not None:
            values = {line.name: v for line in found if (v := line.values.get(entry.label)) and not v.reason}
            variants.append(Variant(entry.label, entry.engine, tuple(features), values, {}))
    for engine in dict.fromkeys(v.engine for v in variants):
        of_engine = [v for v in variants if v.engine == engine and v.values]
        yield from _family(str(setting), of_engine, max(of_engine, key=lambda v: len(v.features), default=None))


def of_comparison(data: Data, comparison: Comparison) -> Iterator[Family]:
    """Variants that took turns, held against the comparison's baseline; medians over rounds, with their range."""
    engines, variants = comparison.variants(), {}
    for label in comparison.engines:
        runs = [run for run in data.runs.runs if Path(run["run_dir"]).name == folder_name(label)
                and data.comparison_of(run) is comparison]  # fmt: skip
        features = next((f for run in runs if (f := (run.get("notes") or {}).get("features")) is not None), None)
        if features is None:
            continue
        cells = {row.name: row.cells[label] for row in comparison.rows}
        values = {name: Value(c.spread.median, c.spread.lowest, c.spread.highest) for name, c in cells.items()
                  if c.spread is not None}  # fmt: skip
        ratios = {name: Value(c.ratio.value, c.ratio.low, c.ratio.high, once=c.ratio.pairs < 2)
                  for name, c in cells.items() if c.ratio is not None}  # fmt: skip
        if values:
            variants[label] = Variant(label, engines[label][0], tuple(features), values, ratios)
    reference = variants.get(comparison.baseline)
    of_engine = [v for v in variants.values() if reference and v.engine == reference.engine]
    yield from _family(f"{comparison.model}, taking turns", of_engine, reference)


def families(data: Data) -> list[Family]:
    """Of all settings and comparisons; those with the same reference features, one after the other, are one."""
    found: dict[tuple, Family] = {}
    every = [f for s in data.settings for f in of_setting(s)]
    for family in every + [f for c in data.comparisons for f in of_comparison(data, c)]:
        key = family.title, family.reference.engine, family.reference.features
        if first := found.get(key):
            # Each keeps the ratios to the reference that took turns with it.
            others = [replace(v, ratios={i: v.over(family.reference, i) for i in v.values if i in
                                         family.reference.values}) for v in family.others]  # fmt: skip
            family = replace(first, others=first.others + others)
        found[key] = family
    return list(found.values())


def section(data: Data, plots: Plots) -> Section | None:
    """Bars and a table for each engine that ran with several sets of features; None where none did."""
    parts = []
    for family in families(data):
        engine = family.reference.engine
        title = f"{engine}, {its_name(family)} and others: {family.title}"
        caption = (
            f"Change of the time against {its_name(family)} (line), with the 95 % interval of rounds that ran next to "
            "each other, or what two intervals leave open; the table has the ends of those that are cut off. An empty "
            "bar: the interval reaches over the line, and does not say whether the feature counts. An arrow: the bar "
            f"is cut off, being over {_FAR} times as long as the next. Each column has its own scale; the largest "
            "change is first. A ratio is to the reference that took turns with its row, which may be another than the "
            "one whose times are in the first row."
        )
        parts += [html.heading(title),
                  plots.add(drawn(family), f"ablation-{engine}-{its_name(family)}-{family.title}", title, caption),
                  html.table(*_table(family), "headline")]  # fmt: skip
    return Section("What each feature is worth", parts) if parts else None


def _family(title: str, variants: Sequence[Variant], reference: Variant | None) -> Iterator[Family]:
    if reference and len({v.features for v in variants}) > 1:
        yield Family(title, reference, [v for v in variants if v is not reference])


def drawn(family: Family) -> Figure:
    """A row of bars for each variant, a column for each item with a scale of its own; what weighs most comes first."""
    items = family.items
    columns = items if len(items) <= _DRAWN else [items[round(i * (len(items) - 1) / (_DRAWN - 1))]
                                                  for i in range(_DRAWN)]  # fmt: skip
    order = family.ordered(columns)
    figure, grid = plt.subplots(
        1, len(columns), figsize=(2.2 + 1.55 * len(columns), 1.1 + 0.26 * len(order)), sharey=True, squeeze=False
    )
    for axes, item in zip(grid.flat, columns, strict=True):
        ends = []
        for place, variant in enumerate(order):
            if item not in variant.values:
                continue
            ratio = variant.over(family.reference, item)
            percent, low, high = (100 * (value - 1) for value in (ratio.median, ratio.low, ratio.high))
            ends.append((percent, [] if ratio.once else [low, high], place, variant.engine))
        most = _most([percent for percent, *_ in ends])
        reach = 1.5 * most + 0.5
        lowest = max(min((percent for percent, *_ in ends), default=0.0), -most)
        axes.set_xlim(min(-0.25 * reach, 1.5 * lowest), 1.35 * reach)
        for percent, whiskers, place, engine in ends:
            cut = abs(percent) > most
            length = max(-most, min(percent, most))
            axes.barh(place, length, 0.7, **_look(engine, unsure=bool(whiskers) and whiskers[0] <= 0 <= whiskers[1]))
            # An interval of few rounds may reach far beyond every bar; the table has its ends.
            shown = [] if cut else [min(end, reach) for end in whiskers]
            axes.plot(shown, [place] * len(shown), color=style.INK, linewidth=0.9)
            at = (max(length, 0.0, *shown), place)
            text = f"{'→ ' if cut and percent > 0 else '← ' if cut else ''}{percent:+,.1f}"
            axes.annotate(text, at, (4, 0), textcoords="offset points", va="center", fontsize=7.5)
        axes.axvline(0, color=style.INK, linewidth=0.9)
        axes.set_title(item.replace(", ", "\n"), fontsize=8)
        axes.tick_params(labelsize=7.5)
    first = grid[0][0]
    first.set_yticks(range(len(order)), [family.name(variant) for variant in order])
    first.set_ylim(len(order) - 0.45, -0.55)
    figure.supxlabel(f"% more time than with {its_name(family)}; for rates, % more of them", fontsize=8.5)
    return figure


def _most(percents: Sequence[float]) -> float:
    """How long a panel's longest bar is drawn."""
    lengths = sorted((abs(percent) for percent in percents), reverse=True)
    if len(lengths) > 1 and lengths[0] > _FAR * lengths[1] > 0:
        return 1.5 * lengths[1]
    return lengths[0] if lengths else 0.0


def _look(engine: str, unsure: bool) -> dict[str, Any]:
    """A bar's arguments: empty where the interval does not say on which side of the line the change is."""
    if not unsure:
        return style.part("mlp", engine)
    return {"facecolor": style.PAGE, "edgecolor": style.color(engine), "linewidth": 0.8}


def _table(family: Family) -> tuple[list[str], list[list[html.Cell]]]:
    items = family.items
    rows: list[list[html.Cell]] = [[its_name(family), *(str(family.reference.values[item]) for item in items)]]
    for variant in family.others:
        cells: list[html.Cell] = []
        for item in items:
            if item not in variant.values:
                cells.append("–")
                continue
            ratio = variant.over(family.reference, item)
            ends = "" if ratio.once else f" ({ratio.low:.3f} – {ratio.high:.3f})"
            cells.append((str(variant.values[item]), f"{ratio.median:.3f}×{ends}"))
        rows.append([family.name(variant), *cells])
    return ["", *items], rows
