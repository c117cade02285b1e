"""Engines that took turns on one GPU."""

from __future__ import annotations

import json
from pathlib import Path

from harness.compare.comparison import read
from harness.compare.contestants import folder_name
from harness.compare.ratios import MIN_LAUNCHES
from harness.compare.table import Cell, Row
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT, run_of_folder

COMPARISON = f"{REFERENCE}/compare-qwen3-0.6b-full-nano-fused-vllm"


VLLM = "vllm"
SERVE_ARM = "serve_arm"
DEFAULT_ARM = "default"
FASTEST = "vllm, its fastest arm"


@table("comparison")
def comparison(folder: str = COMPARISON) -> str:
    """Medians over rounds with their range, ratios to the baseline with their intervals, and where they come from.

    Of vLLM's arms each row shows the fastest, by name, and `default` beside it.
    """
    record, found = read(ROOT / folder)
    settings, reasons = record["settings"], record["reasons"]
    measured = [label for label in settings["engines"] if any(row.cells[label].spread for row in found)]
    arms = {label: arm for label in measured if (arm := vllm_arm(label))}
    columns = _columns(measured, arms)
    heads = [label if label in arms else label.split(":limits.")[0] for label in columns]
    rows = [[row.name, *(_shown(row, labels, arms) for labels in columns.values())] for row in found]
    baseline = settings["baseline"]
    run = run_of_folder(ROOT / folder, baseline.partition(":")[0])
    versions = run["provenance"]["versions"]
    within = " within these processes" * (record["launches"] < MIN_LAUNCHES)
    source = (
        f"One {run['provenance']['gpu']['name']}, {settings['model']['name']}, {run['dtype']}, "
        f"{run['weights']['source']} weights, torch {versions['torch']}, Triton {versions['triton']}. Medians over "
        f"{settings['rounds']} rounds in ABBA order, launched {record['launches']} time(s) (half as many rounds of the "
        f"served requests), with the range of the rounds; ratios to {baseline} are geometric means of rounds that ran "
        f"next to each other, with their 95 % interval{within}. TPOT: a call with 129 tokens of output less one with "
        f"1, over 128. {_caches(ROOT / folder, measured)}Runs: `{folder}`."
    )
    out = [f"{label} took no part: {reason}" for label, reason in reasons.items() if label not in measured]
    out += [f"{label} left before the end: {reason}" for label, reason in reasons.items() if label in measured]
    return "\n\n".join([markdown([f"{settings['model']['name']}", *heads], rows, left=1), source, *out])


def _caches(folder: Path, labels: list[str]) -> str:
    """A sentence: how many tokens the contestants' caches held in the first launch; "" where runs do not tell."""
    tokens = {}
    for label in labels:
        run = folder / "launch-0" / folder_name(label) / "run.json"
        if run.is_file() and (capacity := json.loads(run.read_text()).get("capacity")):
            tokens[label] = capacity["kv_cache_tokens"]
    told = [f"{label.split(':limits.')[0]} {held:,}" for label, held in tokens.items()]
    return f"Tokens in the cache: {', '.join(told)}. " if told else ""


def vllm_arm(label: str) -> str:
    """The arm that a contestant of vLLM serves with; "" of another engine."""
    engine, *options = label.split(":")
    if engine != VLLM:
        return ""
    return dict(option.split("=", 1) for option in options).get(SERVE_ARM, DEFAULT_ARM)


def _columns(measured: list[str], arms: dict[str, str]) -> dict[str, list[str]]:
    """Heads and the contestants that a cell is chosen from; of several arms of vLLM, all, then `default` alone."""
    columns: dict[str, list[str]] = {}
    for label in measured:
        if label not in arms or len(arms) == 1:
            columns[label] = [label]
        elif FASTEST not in columns:
            columns[FASTEST] = list(arms)
            columns |= {f"vllm {DEFAULT_ARM}": [name] for name, arm in arms.items() if arm == DEFAULT_ARM}
    return columns


def _shown(row: Row, labels: list[str], arms: dict[str, str]) -> str:
    """The one contestant's cell, or that of the fastest, with its arm."""
    if len(labels) == 1:
        return _cell(row, row.cells[labels[0]])
    medians = {label: spread.median for label in labels if (spread := row.cells[label].spread)}
    if not medians:
        return row.cells[labels[0]].reason
    best = (max if row.higher_is_better else min)(medians, key=medians.__getitem__)
    return f"{_cell(row, row.cells[best])}, {arms[best]}"


def _cell(row: Row, cell: Cell) -> str:
    if cell.spread is None:
        return cell.reason
    digits = 0 if row.higher_is_better else 2
    s = cell.spread
    text = f"{s.median:,.{digits}f} ({s.lowest:,.{digits}f} to {s.highest:,.{digits}f})"
    if cell.ratio is None:
        return text
    if cell.ratio.pairs == 1:
        return f"{text}, {cell.ratio.value:.2f}× (one pair)"
    return f"{text}, {cell.ratio.value:.2f}× ({cell.ratio.low:.2f} to {cell.ratio.high:.2f})"
