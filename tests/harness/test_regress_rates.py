"""False alarms and power of harness.regress, by simulation over step times recorded on an H200.

A launch is blocks of the recorded steps of each shape, as many as were timed, times launch noise of a stated size. The
numbers of the issue (20 comparisons of the same with the same, 20 with 3 % put in) go through folders and the command
line; rates over more comparisons skip the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness.regress.__main__ import main
from harness.regress.sides import Cell, Key, Side
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Verdict, judge
from tests.harness.regress_runs import Shape, recorded, write

LAUNCHES = 6
NOISE = 0.005
"""Launch noise put in: 0.5 %, so that two launches differ by up to 1.4 %, 19 times of 20."""
ALWAYS = 0.9999
"""A right program fails a test of a rate once in ten thousand seeds."""


def _folder(path: Path, rng: np.random.Generator, slow: Shape | None = None) -> str:
    for launch in range(LAUNCHES):
        made = {shape: steps.launch(rng, NOISE, 0.03 if shape == slow else 0.0) for shape, steps in recorded().items()}
        write(path / str(launch), made, engine="fused")
    return str(path)


def _side(rng: np.random.Generator, launches: int, noise: float, slow: Shape | None = None, by: float = 0.0) -> Side:
    rows = {}
    for shape, steps in recorded().items():
        key = Key("GPU", "model", "bfloat16", "latency", "fused", "default", "steps", "step_ms", *shape, 0)
        of = by if shape == slow else 0.0
        rows[key] = Cell([steps.launch(rng, noise, of) for _ in range(launches)])
    return Side(rows, [])


def _verdicts(rng, launches: int, noise: float, preset: Thresholds, slow: Shape | None = None, by: float = 0.0):
    found = judge(_side(rng, launches, noise), _side(rng, launches, noise, slow, by), preset)
    return {(row.key.phase, row.key.batch_size, row.key.tokens): row for row in found.rows}


def test_twenty_comparisons_of_the_same_give_no_alarm(tmp_path) -> None:
    rng = np.random.default_rng(1)
    for number in range(20):
        sides = [_folder(tmp_path / f"{number}{side}", rng) for side in "ab"]
        assert main([*sides, "--json", str(tmp_path / "out.json")]) != 1
        assert json.loads((tmp_path / "out.json").read_text())["counts"]["SLOWER"] == 0


def test_three_percent_in_one_step_is_found_in_at_least_19_of_20(tmp_path) -> None:
    rng = np.random.default_rng(2)
    decode = [shape for shape in recorded() if shape[0] == "decode"]
    found = others = 0
    for number in range(20):
        slow = decode[number % len(decode)]
        sides = [_folder(tmp_path / f"{number}a", rng), _folder(tmp_path / f"{number}b", rng, slow)]
        code = main([*sides, "--json", str(tmp_path / "out.json")])
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        slower = [(r["phase"], r["batch_size"], r["tokens"]) for r in rows if r["verdict"] == "SLOWER"]
        assert (code == 1) == bool(slower)
        found += slow in slower
        others += len(set(slower) - {slow})
    assert found >= 19
    assert others <= stats.binom.ppf(ALWAYS, 20, PRESETS["default"].false_discovery)


@pytest.mark.parametrize(("launches", "noise"), [(3, 0.005), (6, 0.005), (6, 0.02), (3, 0.03), (1, 0.01)])
def test_false_alarms_are_as_rare_as_promised(launches, noise) -> None:
    """With launches that differ as much as assumed or less, or from three on, by whatever."""
    rng = np.random.default_rng(launches)
    comparisons = 150 if launches >= 3 else 20
    alarms = sum(
        any(row.verdict is Verdict.SLOWER for row in _verdicts(rng, launches, noise, PRESETS["default"]).values())
        for _ in range(comparisons)
    )
    # Where nothing changed every alarm is a false discovery, and half of them are FASTER.
    assert alarms <= stats.binom.ppf(ALWAYS, comparisons, PRESETS["default"].false_discovery / 2)


def test_three_percent_is_found_in_nineteen_of_twenty_decode_steps() -> None:
    rng = np.random.default_rng(4)
    decode = [shape for shape in recorded() if shape[0] == "decode"]
    comparisons, found = 150, 0
    for number in range(comparisons):
        slow = decode[number % len(decode)]
        rows = _verdicts(rng, LAUNCHES, NOISE, PRESETS["default"], slow, 0.03)
        found += rows[slow].verdict is Verdict.SLOWER
    assert found >= stats.binom.ppf(1 - ALWAYS, comparisons, 0.95)


def test_one_launch_each_is_never_believed_as_far_as_three_percent() -> None:
    rng = np.random.default_rng(5)
    slow = ("decode", 1, 1024)
    rows = [_verdicts(rng, 1, 0.0, PRESETS["default"], slow, 0.03)[slow] for _ in range(5)]
    assert {row.verdict for row in rows} == {Verdict.UNSURE}
    assert {row.verdict for row in (_verdicts(rng, 1, 0.0, PRESETS["default"], slow, 0.1)[slow],)} == {Verdict.SLOWER}


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    slow = ("decode", 8, 128)
    inside = 0
    comparisons = 500
    steps = recorded()[slow]
    key = Key("GPU", "model", "bfloat16", "latency", "fused", "default", "steps", "step_ms", *slow, 0)
    for _ in range(comparisons):
        a, b = (Side({key: Cell([steps.launch(rng, 0.02, by) for _ in range(4)])}, []) for by in (0, 0.1))
        (row,) = judge(a, b, PRESETS["default"]).rows
        assert row.change is not None
        inside += row.change.low <= np.log(1.1) <= row.change.high
    low, high = stats.binom.interval(ALWAYS, comparisons, 0.95)
    assert low <= inside <= high
