"""A comparison as rows: each item's value for each contestant, with intervals, and its ratio to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.compare.contestants import folder_name
from harness.compare.ratios import Ratio, paired_ratio
from harness.results import Runs

KEY = ["metric", "phase", "batch_size", "tokens", "output_len"]
"""Columns of `rounds` that tell items apart."""
PAIR = ["launch", "round"]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over rounds and the range they lie in. No interval: of few rounds it would not be worth its name."""

    median: float
    lowest: float
    highest: float
    rounds: int


@dataclass(frozen=True)
class Cell:
    """What one contestant did on one item: its rounds, its ratio to the baseline, and why some are missing."""

    spread: Spread | None
    ratio: Ratio | None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One item. `cells` by contestant's label."""

    metric: str
    phase: str
    batch_size: int
    tokens: int
    output_len: int
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "output_tok_s"

    @property
    def name(self) -> str:
        """For people, like "decode, batch 8, prompt 128, TPOT ms"."""
        what = {"tpot_ms": "TPOT ms", "generate_ms": "ms", "step_ms": "step ms", "output_tok_s": "output tok/s"}
        if self.phase == "serve":
            return f"{self.batch_size} requests, {what[self.metric]}"
        if self.phase == "prefill":
            return f"prefill, {self.batch_size} × {self.tokens} tokens, {what[self.metric]}"
        context = "prompt" if self.output_len else "context"
        return f"decode, batch {self.batch_size}, {context} {self.tokens}, {what[self.metric]}"

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        cells = {}
        for label, cell in self.cells.items():
            found: dict[str, Any] = {"reason": cell.reason} if cell.reason else {}
            if cell.spread is not None:
                found |= asdict(cell.spread)
            if cell.ratio is not None and cell.ratio.pairs > 1:
                ratio = cell.ratio
                found |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high, "pairs": ratio.pairs}
                found |= {"over_launches": ratio.over_launches, "verdict": ratio.verdict(self.higher_is_better)}
            cells[label] = found
        return {**{name: getattr(self, name) for name in KEY}, "cells": cells}


def rows(runs: Runs, labels: Sequence[str], baseline: str, reasons: dict[str, str] | None = None) -> list[Row]:
    """One row per item of the runs of a comparison, in the order in which items were measured.

    A contestant's runs lie in folders named after it (`folder_name`). `reasons` say of a contestant why it is gone: it
    explains what is missing.
    """
    of_folder = {folder_name(label): label for label in labels}
    label_of = {run["run_id"]: of_folder.get(Path(run["run_dir"]).name) for run in runs.runs}
    frame = runs.rounds.assign(label=runs.rounds["run_id"].map(label_of)).sort_values("started_s", kind="stable")
    found = []
    for key, group in frame.groupby(KEY, sort=False):
        row = Row(**dict(zip(KEY, key, strict=True)))
        base = _by_round(group, baseline)
        for label in labels:
            row.cells[label] = _cell(group, label, base if label != baseline else None, (reasons or {}).get(label, ""))
        found.append(row)
    return found


def _by_round(group: pd.DataFrame, label: str) -> pd.Series:
    ok = group[(group["label"] == label) & (group["status"] == "ok")]
    return ok.set_index(PAIR)["value"]


def _cell(group: pd.DataFrame, label: str, base: pd.Series | None, gone: str) -> Cell:
    values = _by_round(group, label)
    failed = group.loc[(group["label"] == label) & (group["status"] != "ok"), "status"]
    if values.empty:
        return Cell(None, None, failed.iloc[0] if len(failed) else gone or "not measured")
    spread = Spread(float(values.median()), float(values.min()), float(values.max()), len(values))
    ratio = None
    if base is not None:
        both = values.index.intersection(base.index)
        if len(both):
            launches = both.get_level_values("launch").tolist()
            ratio = paired_ratio(values[both].tolist(), base[both].tolist(), launches)
    return Cell(spread, ratio, failed.iloc[0] if len(failed) else gone)


def print_table(found: Sequence[Row], labels: Sequence[str], baseline: str, console: Console) -> None:
    """Medians over rounds with their range, and ratios to the baseline with their intervals."""
    over = any(cell.ratio and cell.ratio.over_launches for row in found for cell in row.cells.values())
    within = "over launches" if over else "within these processes: fewer than 3 launches"
    title = f"medians over rounds (lowest - highest); ratios to {escape(baseline)} (95 % interval {within})"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(escape(label), justify="right")
    for row in found:
        table.add_row(row.name, *(_text(row, row.cells[label]) for label in labels))
    console.print(table)


def _text(row: Row, cell: Cell) -> str:
    reason = escape(cell.reason.partition("\n")[0][:60])
    if cell.spread is None:
        return reason
    digits = 0 if row.metric == "output_tok_s" else 3
    s = cell.spread
    text = f"{s.median:,.{digits}f} ({s.lowest:,.{digits}f} - {s.highest:,.{digits}f})"
    if cell.ratio is not None:
        text += f"\n{cell.ratio.value:.3f}×"
        if cell.ratio.pairs > 1:
            text += f" ({cell.ratio.low:.3f} - {cell.ratio.high:.3f}) {cell.ratio.verdict(row.higher_is_better)}"
    return f"{text}\n{s.rounds} rounds; of others: {reason}" if reason else text
