"""What scripts/reference_checks.sh measures: features left out or alone, arrivals, energy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.fused.features import FEATURES
from harness.compare.comparison import read
from harness.compare.ratios import MIN_LAUNCHES
from harness.compare.table import Cell, Row
from harness.report.labels import labels
from harness.results import COMPARISON_FILE
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT, run_of_folder, runs

WITHOUT, ALONE = "ablation-without", "ablation-alone"


def picture(name: str, what: str) -> str:
    """A picture of scripts/doc_plots.py, which is made of the same runs."""
    return f"![{what}](images/{name}.svg)"


def comparisons(folder: Path, prefix: str) -> list[Path]:
    """Folders of the comparisons whose name begins so."""
    return sorted(path.parent for path in folder.glob(f"{prefix}-*/{COMPARISON_FILE}"))


@table("ablation")
def ablation(folder: str = REFERENCE, kind: str = "without") -> str:
    """Of each feature left out (`kind` without) or alone (alone): the change of each call's time against all, or none.

    Several comparisons, each with a reference of its own, are one table.
    """
    prefix, part = (WITHOUT, "ablation") if kind == "without" else (ALONE, "alone")
    found = [(path, *read(path)) for path in comparisons(ROOT / folder, prefix)]
    if not found:
        return f"Not measured yet (`scripts/reference_checks.sh {part}`)."
    changes: dict[str, dict[str, str]] = {}
    references: dict[str, list[str]] = {}
    reasons: list[str] = []
    for _, record, rows in found:
        baseline = record["settings"]["baseline"]
        for label in record["settings"]["engines"]:
            if label == baseline:
                for row in rows:
                    references.setdefault(row.name, []).append(_median(row, row.cells[label]))
            else:
                changes[feature_of(label)] = {row.name: _change(row.cells[label]) for row in rows}
        reasons += [f"{feature_of(label)} left early: {why}" for label, why in record.get("reasons", {}).items()]
    known = [name for name in FEATURES if name in changes]
    known += [name for name in changes if name not in FEATURES]
    reference = "all features" if kind == "without" else "no features"
    body = [[reference, *(", ".join(values) for values in references.values())]]
    body += [[f"`{name}`", *(changes[name].get(call, "not measured") for call in references)] for name in known]
    path, record, _ = found[0]
    settings, run = record["settings"], run_of_folder(path, "fused")
    within = " within these processes" * (record["launches"] < MIN_LAUNCHES)
    what = "without the feature" if kind == "without" else "with this feature alone"
    source = (
        f"One {machine(run)}, {settings['model']['name']}, {run['dtype']}. {reference[0].upper()}{reference[1:]}: "
        f"medians in ms, one for each of {len(found)} comparisons. Below, % more time {what}: geometric means over "
        f"{settings['rounds']} rounds that ran next to each other, with their 95 % interval{within}. Runs: "
        f"{', '.join(f'`{folder}/{path.name}`' for path, *_ in found)}."
    )
    shown = []
    if kind == "without":
        shown = [picture("ablation", "Change of each call's time without each feature")]
        source += " An empty bar: the interval reaches over the line. An arrow: the bar is cut off."
    return "\n\n".join([*shown, markdown([f"fused {kind}", *references], body), source, *reasons])


def feature_of(label: str) -> str:
    """`head` of `fused:features=[-head]` or `fused:features=[head]`."""
    return label.partition("features=[")[2].rstrip("]").removeprefix("-")


def machine(run: Mapping[str, Any]) -> str:
    """The GPU that a run ran on, or the CPU."""
    provenance = run["provenance"]
    return str(provenance["cpu"]["model"] if run["device"] == "cpu" else provenance["gpu"]["name"])


def _median(row: Row, cell: Cell) -> str:
    return cell.reason if cell.spread is None else f"{cell.spread.median:.2f}"


def _change(cell: Cell) -> str:
    if cell.ratio is None:
        return cell.reason or "–"
    change, low, high = (100 * (value - 1) for value in (cell.ratio.value, cell.ratio.low, cell.ratio.high))
    if cell.ratio.pairs < 2:
        return f"{change:+.1f} (one pair)"
    return f"{change:+.1f} ({low:+.1f} to {high:+.1f})"


@table("serving")
def serving(folder: str = REFERENCE) -> str:
    """Latency of requests that arrive over time: a row for each rate and engine."""
    found = [run for run in runs(folder).runs if run.get("serving")]
    if not found:
        return "Not measured yet (`scripts/reference_checks.sh serving`)."
    rates = sorted({record["rate"] or 0 for run in found for record in run["serving"]})
    rows = []
    for rate in rates:
        for run, name in zip(found, labels(found, machine), strict=True):
            rows += [_served(rate, name, record) for record in run["serving"] if (record["rate"] or 0) == rate]
    first = found[0]
    slo = first["config"]["workload"]["slo"].items()
    bounds = " and ".join(f"{name[:4].upper()} up to {ms:g} ms" for name, ms in slo if ms is not None) or "any latency"
    source = (
        f"One {machine(first)}, {first['model']}, {first['dtype']}: {first['serving'][0]['requests']} requests at each "
        f"rate, {first['config']['workload']['arrivals']} arrivals, the same for every engine, one engine after the "
        f"other. Latencies count from the moment at which a request was due. Goodput: requests with {bounds}, as a "
        f"share of all; in the picture how many a second until the last one was done. Where the queue grows (a hollow "
        f"marker), the rate is more than the engine can do. Runs: `{folder}`."
    )
    head = ["requests/s", "engine", "TTFT ms p50", "p99", "TPOT ms p50", "p99", "end to end ms p50", "p99"]
    head += ["output tok/s", "goodput", "queue"]
    shown = picture("serving", "Latency and goodput over the rate of arrivals")
    return "\n\n".join([shown, markdown(head, rows, left=2), source])


def _served(rate: float, name: str, record: Mapping[str, Any]) -> list[str]:
    names = ("ttft_ms", "tpot_ms", "e2el_ms")
    latencies = [record.get(f"{latency}_p{p}") for latency in names for p in (50, 99)]
    queue = {True: "grows", False: "steady", None: "–"}[record["still_growing"]]
    return [
        f"{rate:g}" if rate else "all at once", name, *("–" if ms is None else f"{ms:,.1f}" for ms in latencies),
        f"{record['output_tok_s']:,.0f}", f"{record['goodput_share']:.0%}", queue,
    ]  # fmt: skip


@table("energy")
def energy(folder: str = REFERENCE) -> str:
    """mJ per token beyond idle, a column for each engine."""
    found = [run for run in runs(folder).runs if any("energy" in shape for shape in run.get("shapes", ()))]
    if not found:
        return "Not measured yet (`scripts/reference_checks.sh energy`)."
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for run, name in zip(found, labels(found, machine), strict=True):
        for shape in run["shapes"]:
            key = (shape["phase"], shape["batch_size"], shape["tokens"])
            cells.setdefault(key, {})[name] = _joules(shape.get("energy", {}))
    rows = [[_shape(*key), *(of.get(name, "–") for name in labels(found, machine))] for key, of in cells.items()]
    idle = sorted(
        round(spent["idle_w"])
        for run in found
        for shape in run["shapes"]
        if "idle_w" in (spent := shape.get("energy", {}))
    )
    watts = " to ".join(map(str, dict.fromkeys([*idle[:1], *idle[-1:]]))) or "?"
    source = (
        f"One {machine(found[0])}, {found[0]['model']}, {found[0]['dtype']}: mJ per token of the whole GPU over a loop "
        f"of steps, less the {watts} W that it takes idle. Of decode in brackets: the share of the loop's energy that "
        f"its prompts and first steps took and that is subtracted. Runs: `{folder}`."
    )
    return "\n\n".join([markdown(["step", *labels(found, machine)], rows), source])


def _joules(record: Mapping[str, Any]) -> str:
    if "j_per_token" not in record:
        return str(record.get("status", "–"))
    share = f" ({record['subtracted_share']:.0%})" if record.get("subtracted_share") else ""
    return f"{1e3 * record['j_per_token']:,.2f}{share}"


def _shape(phase: str, batch: int, tokens: int) -> str:
    return f"prefill, {batch} × {tokens}" if phase == "prefill" else f"decode, batch {batch}, context {tokens}"
