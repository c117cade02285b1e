"""The trial of harness.regress: its turns, its slow engine, and its counts."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.base import Request, SamplingParams
from engines.nano import LLM
from harness.regress.sides import Key
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Verdict
from scripts import regress_trial, slow_engine
from scripts.regress_trial import NORMAL, SAME_SAME, SAME_SLOW, SLOW, Launches, delays_us, order, verdicts_of
from scripts.tables import trial
from tests.engines import reference
from tests.harness.regress_runs import write

COMMITTED = sorted((Path(__file__).parents[2] / "results" / "reference").glob("*/regress-trial.json"))
PLAIN: tuple = ("decode", 1, 128)
OTHER: tuple = ("prefill", 1, 512)


def key(number: int) -> Key:
    return Key("GPU", "model", "bfloat16", "latency", "nano", "default", "steps", "step_ms", "decode", number, 128, 0)


def drawn(rng: np.random.Generator, by: float, noise: float = 0.003, launches: int = 12) -> tuple[float, ...]:
    return tuple((1 + by) * np.exp(rng.normal(0, noise, launches)))


def test_launches_take_turns() -> None:
    assert order(4) == [(NORMAL, 0), (SLOW, 0), (NORMAL, 1), (NORMAL, 2), (SLOW, 1), (NORMAL, 3)]
    assert order(3) == [(NORMAL, 0), (SLOW, 0), (NORMAL, 1), (NORMAL, 2)]


def test_delays_are_shares_of_the_first_launchs_steps(tmp_path) -> None:
    shapes = [
        {"phase": "decode", "batch_size": 32, "tokens": 128, "timed": {"wall_us": 2000.0}},
        {"phase": "prefill", "batch_size": 1, "tokens": 512, "timed": {"wall_us": 18000.0}},
    ]
    write(tmp_path / "run", shapes=shapes)
    assert delays_us(tmp_path, 0.03) == [[32, 60.0], [512, 540.0]]


def test_the_slow_engine_waits_in_steps_of_its_rows_and_draws_the_same_tokens(monkeypatch) -> None:
    class Clock:
        looked = 0

        def perf_counter(self) -> float:
            self.looked += 1
            return self.looked * 1e-3

    clock = Clock()
    slow = slow_engine.LLM(reference.config(options={"delays_us": [[2, 9500.0]]}))  # ten looks at a clock of 1 ms
    monkeypatch.setattr(slow_engine, "time", clock)
    looks, tokens = [], {}
    for engine in (slow, LLM(reference.config())):
        for name in "ab":
            engine.add(Request(name, (5, 6, 7), SamplingParams(temperature=0.0, max_tokens=3 + (name == "b"))))
        drawn_of: dict[str, list[int]] = {}
        while engine.has_unfinished():
            before = clock.looked
            engine.advance()
            step = engine.last_step()
            for name, token in step.tokens:
                drawn_of.setdefault(name, []).append(token)
            if engine is slow:
                looks.append((step.kind, step.batch_size, clock.looked - before))
        tokens[engine] = drawn_of
        engine.close()
    assert looks == [("prefill", 2, 0), ("decode", 2, 11), ("decode", 2, 11), ("decode", 1, 0)]
    first, second = tokens.values()
    assert first == second


def test_what_is_the_same_is_called_so_and_what_is_slow_is_found() -> None:
    rng = np.random.default_rng(1)
    rows = [
        Launches(key(0), drawn(rng, 0.0), drawn(rng, 0.03)),
        Launches(key(1), drawn(rng, 0.0), drawn(rng, 0.0)),
        Launches(key(2), drawn(rng, 0.0, noise=0.05), drawn(rng, 0.03, noise=0.05)),
    ]
    found = verdicts_of(rows, 20, PRESETS["default"])
    assert [len(found[kind]) for kind in (SAME_SAME, SAME_SLOW)] == [20, 20]
    assert all(verdicts[key(0)] is Verdict.SAME for verdicts in found[SAME_SAME])
    assert all(verdicts[key(0)] is Verdict.SLOWER for verdicts in found[SAME_SLOW])
    assert all(verdicts[key(1)] is Verdict.SAME for verdicts in found[SAME_SLOW])
    assert Verdict.UNSURE in {verdicts[key(2)] for verdicts in found[SAME_SLOW]}
    assert verdicts_of(rows, 20, PRESETS["default"]) == found


def test_halves_have_no_launch_in_common(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(regress_trial, "_judged", lambda base, cand, _: seen.append((base, cand)) or {})
    normal = tuple(float(n) for n in range(1, 13))
    verdicts_of([Launches(key(0), normal, tuple(-n for n in normal))], 5, PRESETS["default"])
    for place, (base, cand) in enumerate(seen):
        left, right = (np.concatenate(side.rows[key(0)].launches) for side in (base, cand))
        assert (len(left), len(right)) == (6, 6)
        if place % 2 == 0:  # plain with plain
            assert sorted([*left, *right]) == list(normal)
        else:
            assert len(set(right)) == 6 and max(right) < 0 < min(left)
    assert len({tuple(base.rows[key(0)].log_medians) for base, _ in seen}) == 5


def test_the_command_judges_what_is_there_and_the_table_shows_it(tmp_path, monkeypatch, capsys) -> None:
    for side, factor in ((NORMAL, 1.0), (SLOW, 1.04)):
        for launch in range(6):
            times = 1000 * (1 + 0.001 * launch) * np.ones(9)
            write(tmp_path / side / f"{launch:02}", {PLAIN: factor * times, OTHER: times})
    file = tmp_path / "out" / "trial.json"
    monkeypatch.setattr(
        sys, "argv", ["trial", str(tmp_path), "--launches", "6", "--slowdown", "0.04", "--json", str(file)]
    )
    monkeypatch.setattr(regress_trial, "_process", None)  # none is started
    assert regress_trial.main() == 0
    made = json.loads(file.read_text())
    assert (made["launches_a_side"], made["comparisons"], made["device"]) == (3, 20, "NVIDIA H200")
    slow, plain = made["rows"]
    assert (slow["key"]["phase"], plain["key"]["phase"]) == ("decode", "prefill")
    assert (slow["slower_by"], plain["slower_by"]) == (pytest.approx(0.04), pytest.approx(0, abs=1e-12))
    assert slow["launch_noise"] == pytest.approx(np.std(np.log(1 + 0.001 * np.arange(6)), ddof=1))
    assert slow["same_with_slow"]["SLOWER"] == made["comparisons_with_slower"]["same_with_slow"] == 20
    assert slow["same_with_same"] == {"SLOWER": 0, "UNSURE": 0, "FASTER": 0, "SAME": 20}
    assert "something SLOWER in 20 of 20" in capsys.readouterr().out
    shown = trial.regress_trial(str(file))
    assert "| decode, batch 1, 128 tokens, step ms | plain with slow | 0.19% | 4.00% | 20 | 0 | 0 | 0 |" in shown
    assert trial.regress_trial("nothing.json").startswith("Not measured yet")


def test_too_few_launches_are_refused(tmp_path, monkeypatch, capsys) -> None:
    for side in (NORMAL, SLOW):
        for launch in range(4):
            write(tmp_path / side / f"{launch:02}", {PLAIN: np.full(9, 1000.0)})
    monkeypatch.setattr(sys, "argv", ["trial", str(tmp_path), "--launches", "4"])
    assert regress_trial.main() == 2
    assert "4 launches give sides of 2; 6 are needed" in capsys.readouterr().err


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_counts_follow_from_the_committed_launches(file) -> None:
    made = json.loads(file.read_text())
    rows = [Launches(Key(**row["key"]), tuple(row["normal_ms"]), tuple(row["slow_ms"])) for row in made["rows"]]
    found = verdicts_of(rows, made["comparisons"], Thresholds(**made["thresholds"]))
    for row, told in zip(rows, made["rows"], strict=True):
        for kind, all_verdicts in found.items():
            for verdict in Verdict:
                assert told[kind][verdict] == sum(verdicts[row.key] is verdict for verdicts in all_verdicts)
        assert math.isclose(
            told["slower_by"], np.exp(np.mean(np.log(row.slow_ms)) - np.mean(np.log(row.normal_ms))) - 1
        )
