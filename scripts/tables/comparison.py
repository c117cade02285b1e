"""Engines that took turns on one GPU."""

from __future__ import annotations

from harness.compare.comparison import read
from harness.compare.ratios import MIN_LAUNCHES
from harness.compare.table import Cell, Row
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT, run_of_folder

COMPARISON = f"{REFERENCE}/compare-qwen3-0.6b-full-nano_vllm-nano-vllm"


@table("comparison")
def comparison(folder: str = COMPARISON) -> str:
    """Medians over rounds with their range, ratios to the baseline with their intervals, and where they come from."""
    record, found = read(ROOT / folder)
    settings, reasons = record["settings"], record["reasons"]
    shown = [label for label in settings["engines"] if any(row.cells[label].spread for row in found)]
    baseline = settings["baseline"]
    rows = [[row.name, *(_cell(row, row.cells[label]) for label in shown)] for row in found]
    run = run_of_folder(ROOT / folder / "launch-0", baseline)
    versions = run["provenance"]["versions"]
    within = " within these processes" * (record["launches"] < MIN_LAUNCHES)
    source = (
        f"One {run['provenance']['gpu']['name']}, {settings['model']['name']}, {run['dtype']}, "
        f"{run['weights']['source']} weights, torch {versions['torch']}, Triton {versions['triton']}. Medians over "
        f"{settings['rounds']} rounds in ABBA order, launched {record['launches']} time(s) (half as many rounds of the "
        f"served requests), with the range of the rounds; ratios to {baseline} are geometric means of rounds that ran "
        f"next to each other, with their 95 % interval{within}. TPOT: a call with 129 tokens of output less one with "
        f"1, over 128. Runs: `{folder}`."
    )
    out = [f"{label} took no part: {reason}" for label, reason in reasons.items() if label not in shown]
    return "\n\n".join([markdown([f"{settings['model']['name']}", *shown], rows), source, *out])


def _cell(row: Row, cell: Cell) -> str:
    if cell.spread is None:
        return cell.reason
    digits = 0 if row.higher_is_better else 2
    s = cell.spread
    text = f"{s.median:,.{digits}f} ({s.lowest:,.{digits}f} to {s.highest:,.{digits}f})"
    if cell.ratio is None:
        return text
    return f"{text}, {cell.ratio.value:.2f}× ({cell.ratio.low:.2f} to {cell.ratio.high:.2f})"
