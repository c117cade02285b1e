"""Engines that took turns on one GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.compare.comparison import read
from harness.compare.contestants import folder_name
from harness.compare.ratios import MIN_LAUNCHES, Ratio
from harness.compare.table import Cell, Row, rows
from harness.report.headline import HOW_TPOT
from harness.results import COMPARISON_FILE, load
from scripts.tables.registry import markdown, table
from scripts.tables.sources import MODEL, REFERENCE, ROOT, run_of_folder
from scripts.tables.studies import machine

COMPARISON = f"{REFERENCE}/compare-qwen3-0.6b-full-nano-fused-vllm"


VLLM = "vllm"
SERVE_ARM = "serve_arm"
DEFAULT_ARM = "default"
FASTEST = "vllm, its fastest arm"
OURS, BASELINE = "fused", "nano"


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
    heads = [label if label in arms else _plain(label) for label in columns]
    body = [[row.name, *(_shown(row, labels, arms) for labels in columns.values())] for row in found]
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
    return "\n\n".join([markdown([f"{settings['model']['name']}", *heads], body, left=1), source, *out])


def _caches(folder: Path, labels: list[str]) -> str:
    """A sentence: how many tokens the contestants' caches held in the first launch; "" where runs do not tell."""
    tokens = {}
    for label in labels:
        run = folder / "launch-0" / folder_name(label) / "run.json"
        if run.is_file() and (capacity := json.loads(run.read_text()).get("capacity")):
            tokens[label] = capacity["kv_cache_tokens"]
    told = [f"{_plain(label)} {held:,}" for label, held in tokens.items()]
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
    text = _spread(row, cell)
    return text if cell.ratio is None else f"{text}, {_ratio(cell.ratio)}"


def _spread(row: Row, cell: Cell) -> str:
    """The median with the range of the rounds, or why there is none."""
    if cell.spread is None:
        return cell.reason
    digits = 0 if row.higher_is_better else 2
    s = cell.spread
    return f"{s.median:,.{digits}f} ({s.lowest:,.{digits}f} to {s.highest:,.{digits}f})"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    interval = "one pair" if ratio.pairs == 1 else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.value:.2f}× ({interval})"


@table("models")
def models(folder: str = REFERENCE) -> str:
    """Comparisons of other models than `MODEL`: a row for each model and item, medians and `fused` over nano."""
    found = of_other_models(ROOT / folder)
    if not found:
        return "Not measured yet (`scripts/reference_runs.sh models`)."
    shown = list(dict.fromkeys(_plain(label) for _, record in found for label in record["settings"]["engines"]))
    body, sources, notes, within = [], [], [], ""
    for path, record in found:
        settings, reasons = record["settings"], record.get("reasons", {})
        label_of = {_plain(label): label for label in settings["engines"]}
        name = settings["model"]["name"]
        # Whoever the comparison's own ratios refer to.
        for row in rows(load(path), settings["engines"], label_of.get(BASELINE, ""), reasons):
            cells = {short: row.cells[label] for short, label in label_of.items()}
            ratio = _ratio(cells[OURS].ratio) if OURS in cells else "–"
            body.append([name, row.name, *(_spread(row, cells[s]) if s in cells else "–" for s in shown), ratio])
        run = run_of_folder(path, settings["baseline"].partition(":")[0])
        within = within or " within these processes" * (record["launches"] < MIN_LAUNCHES)
        sources.append(
            f"{name}: one {machine(run)}, {run['dtype']}, {run['weights']['source']} weights, "
            f"{settings['rounds']} rounds, launched {record['launches']} time(s). "
            f"{_caches(path, settings['engines'])}Runs: `{folder}/{path.name}`."
        )
        notes += [f"{name}: {label} left before the end, or took no part: {why}" for label, why in reasons.items()]
    said = (
        f"Medians over rounds in ABBA order, with their range; {OURS} / {BASELINE}: geometric means of rounds that ran "
        f"next to each other, with their 95 % interval{within}. {HOW_TPOT}."
    )
    head = ["model", "work", *shown, f"{OURS} / {BASELINE}"]
    return "\n\n".join([markdown(head, body, left=2), " ".join([said, *sources]), *notes])


def of_other_models(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folders and records of comparisons of several engines on another model than `MODEL`."""
    records = [(path.parent, json.loads(path.read_text())) for path in sorted(folder.glob(f"*/{COMPARISON_FILE}"))]
    return [
        (path, record)
        for path, record in records
        if record["settings"]["model"]["name"] != MODEL
        and len({label.partition(":")[0] for label in record["settings"]["engines"]}) > 1
    ]


def _plain(label: str) -> str:
    """A contestant without limits of its own."""
    return label.split(":limits.")[0]
