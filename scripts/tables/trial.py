"""How harness.regress judged launches of one engine, plain and slowed down, and how it would judge drawn ones."""

from __future__ import annotations

import json

import numpy as np

from harness.regress.sides import Cell, Key, Side
from harness.regress.thresholds import PRESETS
from harness.regress.verdicts import Verdict, judge
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT

VERDICTS = ("SLOWER", "UNSURE", "FASTER", "SAME")
NOISES, LAUNCHES, SLOWDOWN, DRAWN = (0.003, 0.005, 0.01), (3, 4, 6, 8, 12), 0.03, 100
KEY = Key("GPU", "model", "bfloat16", "latency", "engine", "default", "steps", "step_ms", "decode", 1, 128, 0)


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
    engine = made.get("engine", "nano")
    source = (
        f"{made['device']}, {made['model']}: {launches['normal']} plain launches of {engine} and {launches['slow']} "
        f"with {made['planted']:.0%} of each step planted into one layer, taking turns; {made['comparisons']} "
        f"comparisons of each kind, {made['launches_a_side']} launches a side, default preset. {made['note']} "
        f"File: `{file}`."
    )
    return "\n\n".join([markdown(head, rows, left=2), source])


@table("regress-power")
def regress_power() -> str:
    """In how many of DRAWN comparisons of drawn launches a slowdown of SLOWDOWN is found at the default preset."""
    rng = np.random.default_rng(0)
    rows = [[f"{noise:.1%}", *(str(found(noise, n, SLOWDOWN, rng)) for n in LAUNCHES)] for noise in NOISES]
    head = ["launch noise", *(f"{n} launches" for n in LAUNCHES)]
    source = (
        f"Found of {DRAWN} slowdowns of {SLOWDOWN:.0%}, by launches a side whose logarithms are drawn from a normal "
        "distribution, one row in each comparison; default preset."
    )
    return "\n\n".join([markdown(head, rows), source])


def found(noise: float, launches: int, slower: float, rng: np.random.Generator) -> int:
    """How many of DRAWN comparisons of so many launches a side call a candidate SLOWER that is so by a share."""
    count = 0
    for _ in range(DRAWN):
        baseline, candidate = (
            Side({KEY: Cell([np.array([factor * value]) for value in np.exp(rng.normal(0.0, noise, launches))])}, [])
            for factor in (1.0, 1.0 + slower)
        )
        count += judge(baseline, candidate, PRESETS["default"]).counts[Verdict.SLOWER]
    return count
