"""What validates the fused engine beside the runs: decode logits at every batch size, the soak, and how it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT

SANITIZER_CLEAN = "ERROR SUMMARY: 0 errors"


def _read(file: str) -> dict[str, Any] | None:
    path = ROOT / file
    return json.loads(path.read_text()) if path.is_file() else None


@table("validation")
def validation(file: str = f"{REFERENCE}/validation.json") -> str:
    """Of scripts/validate.py: a row for each engine and model, of its cases by batch size and of those at borders."""
    made = _read(file)
    if made is None:
        return "Not measured yet (`scripts/validate.py`)."
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in made["rows"]:
        kind = "batch sizes" if row["case"]["name"].startswith("batch") else "contexts"
        groups.setdefault((row["engine"], row["model"], row["dtype"], kind), []).append(row)
    rows = [[*key, *_cells(found)] for key, found in groups.items()]
    head = ["engine", "model", "dtype", "cases by", "cases", "passed", "tokens"]
    head += ["KL", "KL ratio", "|ΔNLL| ratio", "graphs against launches"]
    source = (
        f"{made['device']}. Over teacher-forced decode steps, against transformers in float32 on the same tokens. KL "
        "is the largest mean of a case; ratios are to transformers in the same dtype, from the least to the largest of "
        "the cases, then the largest upper end of a one-sided 95 % interval, which may reach "
        f"{made['factor']}. Graphs against launches: the largest difference of a step's logits over their norm. "
        f"Failed: {', '.join(_failed(made['rows'], False)) or 'none'}. {_undecided(made['rows'])}"
        f"{_left_out(made['left_out'])}File: `{file}`."
    )
    return "\n\n".join([markdown(head, rows, left=4), source])


def _of(came: int, asked: int) -> str:
    return f"{came:,}" if came == asked else f"{came:,} of {asked:,} in the time there was"


def _cells(found: Sequence[Mapping[str, Any]]) -> list[str]:
    differences = [row["graph_against_eager"] for row in found if "graph_against_eager" in row]
    return [
        str(len(found)),
        str(sum(map(_passed, found))),
        f"{sum(row['positions'] for row in found):,}",
        f"{max(row['kl'] for row in found):.1e}",
        *(_ratios([row[name] for row in found if name in row]) for name in ("kl_ratio", "nll_delta_ratio")),
        f"{max(differences):.1e}" if differences else "",
    ]


def _ratios(found: Sequence[Mapping[str, float]]) -> str:
    if not found:
        return ""
    values = [ratio["value"] for ratio in found]
    return f"{min(values):.2f} – {max(values):.2f} (≤ {max(ratio['high'] for ratio in found):.2f})"


def _passed(row: Mapping[str, Any]) -> bool:
    return row["passed"] and row.get("graphs_passed", True)


def _left_out(cases: Sequence[str]) -> str:
    return f"Left out for want of time: {', '.join(cases)}. " if cases else ""


def _failed(rows: Sequence[Mapping[str, Any]], undecided: bool) -> list[str]:
    """Cases that did not pass: those which more prompts could still decide, or the others."""
    left = [row for row in rows if not _passed(row) and row.get("undecided", False) == undecided]
    return [f"{row['engine']} {row['model']} {row['case']['name']}" for row in left]


def _undecided(rows: Sequence[Mapping[str, Any]]) -> str:
    cases = _failed(rows, True)
    return f"Undecided, since the bound lies within the interval: {', '.join(cases)}. " if cases else ""


@table("soak")
def soak(file: str = f"{REFERENCE}/soak.json") -> str:
    """Of scripts/soak.py: what was asked, what came of it, and how memory grew."""
    made = _read(file)
    if made is None:
        return "Not measured yet (`scripts/soak.py`)."
    free = made["free_blocks"]
    rows = [
        ["requests", f"{_of(made['requests'], made['asked'])}, {made['aborted']:,} of them cut short by an abort"],
        ["steps", f"{made['steps']:,}"],
        ["preemptions", f"{made['preemptions']:,}"],
        ["tokens equal to nano's", f"{made['equal_tokens']:,}"],
        ["requests that met a tie, and that differ", f"{len(made['ties'])}, {len(made['differing'])}"],
        ["free blocks at the start and at the end", f"{free['start']:,}, {free['end']:,}"],
    ]
    for name, grown in made["growth"].items():
        what = name.removesuffix("_bytes")
        bound = f"{grown['bound_bytes'] / 2**20:.0f} MiB"
        rows.append([f"{what} memory, second half over first", f"{grown['bytes'] / 2**20:+.2f} MiB (bound {bound})"])
    source = (
        f"{made['device']}, the trained tiny checkpoint in {made['dtype']}: "
        f"{'passed' if made['passed'] else 'FAILED'}. File: `{file}`."
    )
    return "\n\n".join([markdown(["", ""], rows, left=2), source])


@table("startup")
def startup(file: str = f"{REFERENCE}/startup.json") -> str:
    """Of scripts/startup.py: seconds of the first start and of the next, and what they were spent on."""
    made = _read(file)
    if made is None:
        return "Not measured yet (`scripts/startup.py`)."
    totals, goals, rows = made["start_s"], made["goal_s"], []
    stages = made.get("stages_s", {})  # older files have none
    if any(stages.values()):
        rows = [[stage, *(f"{stages[name][stage]:.1f}" for name in totals)] for stage in stages["cold"]]
        rest = (f"{total - sum(stages[name].values()):.1f}" for name, total in totals.items())
        rows.append(["the rest", *rest])
    rows.append(["**in all**", *(f"{total:.1f}" for total in totals.values())])
    rows.append(["goal", *(f"{goals[name]:.0f}" for name in totals)])
    source = (
        f"{made['device']}, {made['engine']}, {made['model']}, {made['limits']['max_num_seqs']} sequences, "
        f"{made['graphs']} decode graphs; one start each, in seconds. Cold: the caches of compiled kernels are empty. "
        f"File: `{file}`."
    )
    return "\n\n".join([markdown(["", *totals], rows, left=1), source])


@table("memcheck")
def memcheck(file: str = f"{REFERENCE}/memcheck.json") -> str:
    """Of scripts/memcheck.sh: what compute-sanitizer said, in its own words."""
    made = _read(file)
    if made is None:
        return "Not measured yet (`scripts/memcheck.sh`)."
    clean = made["exit_code"] == 0 and made["summary"].startswith(SANITIZER_CLEAN) and "passed" in made["tests"]
    rows = [[made["tool"], made["chosen"], made["tests"] or "none", made["summary"], "clean" if clean else "NOT clean"]]
    source = f"{made['device']}, the trained tiny checkpoint, launch by launch. File: `{file}`."
    return "\n\n".join([markdown(["tool", "of the tests", "tests", "it said", "outcome"], rows, left=5), source])
