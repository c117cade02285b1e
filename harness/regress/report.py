"""A judgement as a table, as JSON, and as the Markdown of a pull request's comment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.regress.sides import Key, Side, options_of
from harness.regress.verdicts import Judgement, Reason, Row, Verdict

_STYLES = {Verdict.SLOWER: "bold red", Verdict.UNSURE: "yellow", Verdict.FASTER: "green", Verdict.SAME: "dim"}
_SENTENCES = {
    Reason.SIGNIFICANT: "",
    Reason.NO_CHANGE: "",
    Reason.SMALL_CHANGE: "a small change",
    Reason.BASELINE_FAILED: "failed in the baseline",
    Reason.CANDIDATE_FAILED: "failed in the candidate",
    Reason.TOO_FEW_SAMPLES: "too few samples",
    Reason.TOO_FEW_LAUNCHES: "too few launches",
    Reason.NOT_SIGNIFICANT: "not significant",
    Reason.TOO_NOISY: "too noisy",
}
_WHERE = ("device", "model", "dtype", "workload", "engine", "arm", "table")
_DETAIL = 80
"""Characters of a failure that a table has room for."""


def headline(judgement: Judgement) -> str:
    """One line: how many rows have which verdict."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in judgement.counts.items() if n)
    return f"{len(judgement.rows)} rows: {counts}."


def notes(judgement: Judgement, baseline: Side, candidate: Side) -> list[str]:
    """Sentences on what limits the verdicts."""
    found = []
    unsure = [row.reason for row in judgement.rows if row.verdict is Verdict.UNSURE]
    if few := sum(reason in (Reason.TOO_FEW_LAUNCHES, Reason.TOO_FEW_SAMPLES) for reason in unsure):
        least = judgement.thresholds.min_launches
        found.append(f"{few} rows need more launches: from {least} runs on each side on, their spread is measured.")
    for side, keys in (("baseline", judgement.only_baseline), ("candidate", judgement.only_candidate)):
        if keys:
            found.append(f"{len(keys)} rows are in the {side} only: {_some([key.name for key in keys])}.")
    for side, gone in (("baseline", baseline.dead), ("candidate", candidate.dead)):
        found += [f"{label} took no part in the {side} to its end: {reason}" for label, reason in gone.items()]
    for side, runs in (("baseline", baseline.runs), ("candidate", candidate.runs)):
        growing = sorted({served["rate"] or 0 for run in runs for served in run.get("serving") or ()
                          if served.get("still_growing")})  # fmt: skip
        if growing:
            rates = ", ".join(f"{rate:g}" for rate in growing)
            found.append(
                f"At {rates} requests/s the queue of the {side} was still growing: its latencies say how long it grew."
            )
    seen = [row.noise_seen for row in judgement.rows if row.noise_seen is not None]
    if seen:
        found.append(
            f"From launch to launch, rows differed by {median(seen):.2%} in the middle and {max(seen):.2%} at most "
            f"(standard deviation); the guess was {judgement.thresholds.launch_noise:.2%}."
        )
    before, after = _conditions(baseline), _conditions(candidate)
    for name in sorted(before.keys() | after.keys()):
        if before[name] != after[name]:
            found.append(f"{name}: {_listed(before[name])} in the baseline, {_listed(after[name])} in the candidate.")
    return found


def _conditions(side: Side) -> defaultdict[str, set[str]]:
    """Versions and engines' options of a side's runs: what may differ, and should not do so unseen."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for run in side.runs:
        provenance = run["provenance"]
        gpu = provenance.get("gpu") or {}
        versions = {**(provenance.get("versions") or {}), **{name: gpu.get(name) for name in ("driver", "cuda")}}
        for name, version in versions.items():
            if version:
                found[name].add(str(version))
        if options := options_of(run):
            found[f"options of {run['engine']} in {run['workload']}"].add(options.lstrip(":"))
    return found


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values)) or "none"


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shared(rows: Sequence[Row]) -> dict[str, str]:
    """What all rows have in common, said once above the table."""
    values = {name: {getattr(row.key, name) for row in rows} for name in _WHERE}
    return {name: found.pop() for name, found in values.items() if len(found) == 1}


def _where(key: Key, shared: dict[str, str]) -> str:
    return " ".join(getattr(key, name) for name in _WHERE if name not in shared)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def _percent(log: float) -> str:
    return f"{math.expm1(log):+.1%}"


def _cells(row: Row, shared: dict[str, str]) -> list[str]:
    """A table's cells, the same on the screen and in Markdown."""
    change = interval = "-"
    if row.change is not None:
        change = _percent(row.change.effect)
        interval = f"{_percent(row.change.low)} to {_percent(row.change.high)}"
    why = _SENTENCES[row.reason] + (f": {row.detail[:_DETAIL]}" if row.detail else "")
    launches = f"{row.launches[0]} / {row.launches[1]}"
    values = [_value(row.baseline), _value(row.candidate), change, interval, launches]
    return [_where(row.key, shared), row.key.name, *values, row.verdict.value, why]


_HEADER = ("", "row", "baseline", "candidate", "time", "interval", "launches", "verdict", "why")
_LEFT = ("", "row", "verdict", "why")


def print_judgement(judgement: Judgement, said: Sequence[str], console: Console) -> None:
    """The table, SLOWER first, then the notes in `said` and the counts."""
    shared = _shared(judgement.rows)
    legend = f"time: + is slower; {100 * judgement.thresholds.confidence:g} % intervals"
    table = Table(title=Text(f"{_title(shared)} ({legend})"), title_justify="left")
    for name in _HEADER:
        table.add_column(name, justify="left" if name in _LEFT else "right")
    for row in judgement.rows:
        # Text: what an engine said may look like markup.
        table.add_row(*map(Text, _cells(row, shared)), style=_STYLES[row.verdict])
    console.print(table)
    for sentence in said:
        console.print(f"Note: {sentence}", markup=False, soft_wrap=True)
    console.print(headline(judgement), markup=False, soft_wrap=True)


def _title(shared: dict[str, str]) -> str:
    return ", ".join(value for name, value in shared.items() if name != "table")


def markdown(judgement: Judgement, said: Sequence[str], exit_code: int) -> str:
    """What a pull request's comment says: rows that are not SAME in the open, all rows folded away."""
    shared = _shared(judgement.rows)
    outcome = {0: "Nothing is slower", 1: "Something is slower", 3: "Too much is unsure"}[exit_code]
    changed = [row for row in judgement.rows if row.verdict is not Verdict.SAME]
    parts = [f"### {outcome}", f"{headline(judgement)} {_title(shared)}."]
    if changed:
        parts.append(_markdown_table(changed, shared))
    parts += [f"- {sentence}" for sentence in said]
    folded = _markdown_table(judgement.rows, shared)
    parts.append(f"<details><summary>All rows and thresholds</summary>\n\n{folded}\n")
    limits = ", ".join(f"{name} {value:g}" for name, value in judgement.thresholds.record().items())
    parts.append(f"Time: + is slower. Thresholds: {limits}.\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Row], shared: dict[str, str]) -> str:
    # A reason may hold anything that an engine said.
    lines = [[cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in _cells(row, shared)]
             for row in rows]  # fmt: skip
    rule = ["---" if name in _LEFT else "---:" for name in _HEADER]
    return "\n".join(f"| {' | '.join(line)} |" for line in [_HEADER, rule, *lines])


def refusal(reason: str) -> str:
    """The comment where nothing could be compared."""
    return f"### Not compared\n\n{reason}\n"


def record(judgement: Judgement, said: Sequence[str], exit_code: int) -> dict[str, Any]:
    """JSON-ready: every row with its key, change as shares of the time, verdict and reason."""
    return {
        "exit_code": exit_code,
        "counts": {verdict.value: n for verdict, n in judgement.counts.items()},
        "thresholds": judgement.thresholds.record(),
        "notes": list(said),
        "rows": [_row_record(row) for row in judgement.rows],
        "only_baseline": [asdict(key) for key in judgement.only_baseline],
        "only_candidate": [asdict(key) for key in judgement.only_candidate],
    }


def _row_record(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(row.key, name) for name in (f.name for f in fields(Key))}
    found |= {"verdict": row.verdict.value, "reason": row.reason.value, "detail": row.detail}
    found |= {"baseline": row.baseline, "candidate": row.candidate}
    for name, pair in (("launches", row.launches), ("samples", row.samples)):
        found |= {f"baseline_{name}": pair[0], f"candidate_{name}": pair[1]}
    if row.change is not None:
        slower = {name: math.expm1(getattr(row.change, name)) for name in ("effect", "low", "high")}
        found |= {"slower_by": slower["effect"], "slower_by_low": slower["low"], "slower_by_high": slower["high"]}
        found |= {"p_value": row.change.p_value, "q_value": row.q_value, "launch_noise_seen": row.noise_seen}
    return found
