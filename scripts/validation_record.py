"""What scripts/validate.py has judged, for people and in its JSON file; what is missing, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.base import InputError

NO_COMMIT = "no commit"
Plan = dict[tuple[str, str], list[dict[str, Any]]]
"""By engine and model, the cases to judge, as rows have them."""


def left_of(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Plan:
    """What of the plan no row judges."""
    judged = [(row["engine"], row["model"], row["case"]) for row in rows]
    return {pair: [case for case in cases if (*pair, case) not in judged] for pair, cases in plan.items()}


def names_of(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for people."""
    found = []
    for (engine, model), left in left_of(plan, rows).items():
        if len(left) == len(plan[engine, model]) > 0:
            found.append(f"all of {engine} {model}")
        else:
            found += [f"{engine} {model} {case['name']}" for case in left]
    return found


def kept(file: Path, made: Mapping[str, Any], plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of `file` to go on from, and what else it says is missing: of engines and models beyond the plan.

    Rows of the plan's engines and models whose cases are others are dropped. InputError: the file is of other code, or
    of another device than `made`, or that cannot be told.
    """
    if not file.is_file():
        return [], []
    before = json.loads(file.read_text())
    then, now = _code(before), _code(made)
    if then != now or before["device"] != made["device"]:
        raise InputError(f"{file} is of {before['device']} at {then}, this is {made['device']} at {now}: measure anew.")
    if then == NO_COMMIT:
        raise InputError(f"{file} cannot be resumed: what it was made with and what there is now is of no commit.")
    rows = [row for row in before["rows"] if row["case"] in plan.get((row["engine"], row["model"]), [row["case"]])]
    return rows, [name for name in before["left_out"] if not _is_of(plan, name)]


def _is_of(plan: Plan, name: str) -> bool:
    """Whether one of `names_of` is of the plan's engines and models."""
    whose = f"{name.removeprefix('all of ')} "
    return any(whose.startswith(f"{engine} {model} ") for engine, model in plan)


def _code(made: Mapping[str, Any]) -> str:
    """Its commit, unless something was uncommitted."""
    git = made["provenance"]["git"]
    return NO_COMMIT if git is None or git["dirty"] else f"commit {git['commit']}"


def line(row: Mapping[str, Any]) -> str:
    """For people."""
    text = f"{row['engine']:6} {row['model']:12} {row['case']['name']:24} {row['positions']:5}  KL {row['kl']:.2e}"
    if "kl_ratio" in row:
        ratios = row["kl_ratio"], row["nll_delta_ratio"]
        text += "".join(f"  {r['value']:.2f} (<= {r['high']:.2f})" for r in ratios)
    if "graphs_passed" in row:
        text += f"  graphs {row['graph_against_eager']:.1e} ({row['graph_positions']})"
    outcome = "passed" if passed(row) else "UNDECIDED" if row["undecided"] else "FAILED"
    return f"{text}  {row['seconds']:.1f} s  {outcome}"


def passed(row: Mapping[str, Any]) -> bool:
    """Both checks of a case."""
    return row["passed"] and passed_graphs(row)


def passed_graphs(row: Mapping[str, Any]) -> bool:
    """Whether a case's graphs gave what launches give; true where there are none."""
    return row.get("graphs_passed", True)
