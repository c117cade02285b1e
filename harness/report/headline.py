"""The table to look at first: medians with 95 % intervals, and how each engine stands to the fastest other one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.compare.table import Cell, Row
from harness.report import html
from harness.report.data import UNKNOWN, Comparison, Data, Entry, Setting, Shape, comparable, driver_of, machine_of
from harness.report.html import Section

HOW_TPOT = "TPOT: a call's time less that of one with a single token of output, over the tokens beyond the first"
_REASON = 80
"""Characters of a reason that a cell has room for."""


@dataclass(frozen=True)
class Value:
    """A median with its interval, or the reason why there is none. `once`: of a single sample, without interval."""

    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    reason: str = ""
    once: bool = False

    def __str__(self) -> str:
        return f"{html.number(self.median)} (once)" if self.once else html.interval(self.median, self.low, self.high)

    def over(self, other: Value) -> tuple[float, float, float]:
        """Ratio to `other`, and the range that the ends of both intervals leave open."""
        return self.median / other.median, self.low / other.high, self.high / other.low

    def ratio(self, other: Value) -> tuple[str, str]:
        """The ratio to `other` in text, and its range, which is empty where one of both has no interval."""
        ratio, low, high = self.over(other)
        return f"{ratio:.3f}×", "" if self.once or other.once else f"({low:.3f} – {high:.3f})"


@dataclass(frozen=True)
class Line:
    """One row of a setting's table, a value for each entry that has one."""

    name: str
    higher_is_better: bool
    values: dict[str, Value]


def lines(setting: Setting) -> list[Line]:
    """Steps of each shape in ms, then items of whole calls. Intervals are those of `run.json`, from all samples."""
    found = [
        Line(f"{shape}, ms", False, {e.label: v for e in setting.entries if (v := step_value(e, shape))})
        for shape in setting.shapes
    ]
    items: dict[str, Line] = {}
    for entry in setting.entries:
        for record in entry.run.get("rounds") or ():
            row = Row(*(record[name] for name in ("metric", "phase", "batch_size", "tokens", "output_len")))
            line = items.setdefault(row.name, Line(row.name, row.higher_is_better, {}))
            line.values[entry.label] = (
                Value(record["median"], record["low"], record["high"], once=record.get("samples") == 1)
                if "median" in record
                else Value(reason=str(record.get("status")))
            )
    return found + list(items.values())


def step_value(entry: Entry, shape: Shape) -> Value | None:
    """The untraced step in ms; None where the run does not have the shape."""
    if not any(Shape.of(record) == shape for record in entry.run.get("shapes") or ()):
        return None
    timed = entry.pass_of(shape, "timed")
    if timed.get("status") != "ok":
        return Value(reason=str(timed.get("status", "not reached")))
    middle, low, high = (timed[name] / 1e3 for name in ("wall_us", "wall_us_low", "wall_us_high"))
    return Value(middle, low, high, once=timed.get("samples") == 1)


def peer(setting: Setting, entry: Entry, line: Line) -> str | None:
    """The fastest other entry that this one can be compared with: verified, a contestant, on the same machine."""
    others = [
        other.label
        for other in setting.entries
        if other is not entry and other.contestant and other.verified and comparable(entry, other)
        and (value := line.values.get(other.label)) and not value.reason
    ]  # fmt: skip
    if not others or not entry.verified:
        return None
    best = max if line.higher_is_better else min
    return best(others, key=lambda label: line.values[label].median)


def section(data: Data) -> Section | None:
    """A table for each setting and each comparison; None where nothing was timed."""
    parts = []
    for setting in data.settings:
        found = lines(setting)
        if found:
            parts += [html.heading(str(setting)), _table(setting, found), html.paragraph(_caption(setting, found))]
    for comparison in data.comparisons:
        if comparison.rows:
            parts += [html.heading(str(comparison)), _comparison_table(comparison)]
            parts.append(html.paragraph(_comparison_caption(comparison)))
    return Section("Headline", parts) if parts else None


def _table(setting: Setting, found: list[Line]) -> str:
    rows = []
    for line in found:
        cells: list[html.Cell] = []
        for entry in setting.entries:
            value = line.values.get(entry.label)
            if value is None or value.reason:
                cells.append(value.reason[:_REASON] if value else "–")
                continue
            other = peer(setting, entry, line)
            if other is None:
                cells.append(str(value))
                continue
            ratio, ends = value.ratio(line.values[other])
            cells.append((str(value), f"{ratio} {other} {ends}".rstrip()))
        rows.append([line.name, *cells])
    return html.table(["", *(_column(entry) for entry in setting.entries)], rows, "headline")


def _column(entry: Entry) -> str:
    return entry.label + ("" if entry.verified else " (not verified)")


def _caption(setting: Setting, found: list[Line]) -> str:
    machines = sorted({machine_of(entry.run) for entry in setting.entries})
    days: dict[str, list[str]] = {}
    for entry in setting.entries:
        days.setdefault(str(entry.run.get("started", UNKNOWN))[:10], []).append(entry.label)
    text = f"Median (95 % interval), no instrument attached. On {'; '.join(machines)}"
    text += ", " + "; ".join(f"{day} ({', '.join(of)})" for day, of in sorted(days.items())) if len(days) > 1 else ""
    text += "."
    if any(value.once for line in found for value in line.values.values()):
        text += " What was timed once has no interval."
    ratios = any(peer(setting, entry, line) for line in found for entry in setting.entries)
    if ratios:
        text += (
            " Ratios are to the fastest other verified engine on a GPU of the same name and driver, with what both "
            "intervals leave open. Each engine ran by itself, so what differs from one host or run to the next is not "
            "in the intervals."
        )
    elif len(setting.entries) > 1:
        drivers = sorted({driver_of(entry.run) for entry in setting.entries} - {""})
        text += " Side by side only: the runs are not verified, or not of one machine and driver"
        text += f" ({', '.join(drivers)})." if len(drivers) > 1 else "."
    return text


def _comparison_table(comparison: Comparison) -> str:
    alive = [label for label in comparison.engines if any(row.cells[label].spread for row in comparison.rows)]
    rows: list[list[html.Cell]] = []
    for row in comparison.rows:
        rows.append([row.name, *(tuple(_cell(row, row.cells[label])) for label in alive)])
    return html.table(["", *(comparison.names[label] for label in alive)], rows, "headline")


def _cell(row: Row, cell: Cell) -> Iterator[str]:
    if cell.spread is None:
        yield cell.reason[:_REASON]
        return
    yield html.interval(cell.spread.median, cell.spread.lowest, cell.spread.highest)
    if cell.ratio and cell.ratio.pairs > 1:
        verdict = {"even": "unsure"}.get(found := cell.ratio.verdict(row.higher_is_better), found)
        yield f"{cell.ratio.value:.3f}× ({cell.ratio.low:.3f} – {cell.ratio.high:.3f}) {verdict}"


def _comparison_caption(comparison: Comparison) -> str:
    over = any(cell.ratio and cell.ratio.over_launches for row in comparison.rows for cell in row.cells.values())
    gone = [label for label in comparison.engines if not any(row.cells[label].spread for row in comparison.rows)]
    text = (
        f"Median over rounds (lowest – highest); ratio to {comparison.baseline} from rounds that ran next to each "
        f"other, with its 95 % interval {'over launches' if over else 'within these processes'}. "
        f"{comparison.launches} launch{'' if comparison.launches == 1 else 'es'}, {comparison.day}."
    )
    if any(row.metric == "tpot_ms" for row in comparison.rows):
        text += f" {HOW_TPOT}, so that it is unsteady where the prompts' part is."
    return text + (f" Took no part: {', '.join(gone)}; the reasons are among the warnings." if gone else "")
