"""How harness.regress judged launches of one engine, plain and slowed down."""

from __future__ import annotations

import json

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT

VERDICTS = ("SLOWER", "UNSURE", "FASTER", "SAME")


@table("regress-trial")
def regress_trial(file: str = f"{REFERENCE}/regress-trial.json") -> str:
    """Verdicts over the comparisons of scripts/regress_trial.py. Without its outcome, a sentence that says so."""
    path = ROOT / file
    if not path.is_file():
        return "Not measured yet (`scripts/regress_trial.py`)."
    made = json.loads(path.read_text())
    rows = []
    for row in made["rows"]:
        for kind, name in (("same_with_same", "plain with plain"), ("same_with_slow", "plain with slow")):
            said = [str(row[kind][verdict]) for verdict in VERDICTS]
            rows.append([row["name"], name, f"{row['launch_noise']:.2%}", f"{row['slower_by']:.2%}", *said])
    head = ["row", "comparison", "launch noise", "slow launches slower by", *VERDICTS]
    launches = made["launches"]
    source = (
        f"{made['device']}, {made['model']}: {launches['normal']} plain launches of nano and {launches['slow']} with "
        f"{made['planted']:.0%} of each step planted into one layer, taking turns; {made['comparisons']} comparisons "
        f"of each kind, {made['launches_a_side']} launches a side, default preset. {made['note']} File: `{file}`."
    )
    return "\n\n".join([markdown(head, rows, left=2), source])
