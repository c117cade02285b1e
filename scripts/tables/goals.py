"""What the design of `fused` asked for, held against the newest comparison."""

from __future__ import annotations

from dataclasses import dataclass

from harness.compare.comparison import read
from harness.compare.ratios import MIN_LAUNCHES, Ratio
from harness.compare.table import Row, rows
from harness.results import load
from scripts.tables.comparison import COMPARISON, vllm_arm
from scripts.tables.registry import InputError, markdown, table
from scripts.tables.sources import ROOT


@dataclass(frozen=True)
class Goal:
    """Of one item. value: ms at most, or tokens per second at least; ratio: times as fast as the faster of nano and
    vLLM, at least."""

    value: float
    ratio: float


GOALS = {
    ("decode", 1, 128): Goal(0.45, 3.6),
    ("decode", 8, 128): Goal(0.60, 3.0),
    ("decode", 32, 128): Goal(0.80, 2.8),
    ("decode", 64, 128): Goal(1.1, 2.5),
    ("decode", 128, 128): Goal(1.6, 2.3),
    ("decode", 256, 128): Goal(2.6, 2.1),
    ("prefill", 1, 128): Goal(1.0, 8.0),
    ("prefill", 1, 1024): Goal(2.5, 5.0),
    ("prefill", 1, 4095): Goal(9.5, 1.8),
    ("prefill", 16, 1024): Goal(27.0, 1.6),
    "serve": Goal(30_000, 1.4),
}
"""By phase, batch size and tokens; the served requests are one item."""
OURS, BASELINE, VLLM = "fused", "nano", "vllm"


@table("goals")
def goals(folder: str = COMPARISON) -> str:
    """A row for each goal: what was measured, how much of the goal that is, and the same of the ratio."""
    record, found = read(ROOT / folder)
    labels = record["settings"]["engines"]
    runs = load(ROOT / folder)
    against = {label: rows(runs, labels, label) for label in labels}
    shown = []
    for place, row in enumerate(found):
        goal = GOALS.get("serve" if row.phase == "serve" else (row.phase, row.batch_size, row.tokens))
        if goal is None or row.cells[OURS].spread is None:
            continue
        other = faster(row, labels)
        shown.append([row.name, *_value(row, goal), *_ratio(row, goal, other, against[other][place].cells[OURS].ratio)])
    if not shown:
        raise InputError(f"{folder} has no item that a goal was set for.")
    within = " within these processes" * (record["launches"] < MIN_LAUNCHES)
    source = (
        "A value is met or missed by its median. A ratio is how many times as fast as the faster of nano and vLLM's "
        "arms, by the medians, `fused` was in rounds next to each other, with its 95 % interval"
        f"{within}; it is open where the goal lies inside. Runs: `{folder}`."
    )
    head = ["work", "goal", "measured", "", "goal of the ratio", "ratio to the faster", "faster", ""]
    return "\n\n".join([markdown(head, shown), source])


def faster(row: Row, labels: list[str]) -> str:
    """Of nano and vLLM's arms the one with the better median."""
    medians = {
        label: spread.median
        for label in labels
        if (label == BASELINE or vllm_arm(label)) and (spread := row.cells[label].spread)
    }
    return (max if row.higher_is_better else min)(medians, key=medians.__getitem__)


def _value(row: Row, goal: Goal) -> list[str]:
    spread = row.cells[OURS].spread
    assert spread is not None
    digits = 0 if row.higher_is_better else 2
    met = spread.median >= goal.value if row.higher_is_better else spread.median <= goal.value
    off = f"{100 * (spread.median / goal.value - 1):+.0f} %"
    return [f"{goal.value:,.{digits}f}", f"{spread.median:,.{digits}f} ({off})", "met" if met else "missed"]


def _ratio(row: Row, goal: Goal, other: str, ratio: Ratio | None) -> list[str]:
    """Times as fast: of times the inverse of ours over theirs."""
    arm = vllm_arm(other)
    name = f"vllm, {arm}" if arm else other
    if ratio is None or ratio.pairs == 1:
        return [f"{goal.ratio:.1f}", "no interval", name, "open"]
    value, low, high = ratio.value, ratio.low, ratio.high
    if not row.higher_is_better:
        value, low, high = 1 / value, 1 / high, 1 / low
    said = "met" if low >= goal.ratio else "missed" if high < goal.ratio else "open"
    return [f"{goal.ratio:.1f}", f"{value:.2f} ({low:.2f} to {high:.2f})", name, said]
