"""The trial of harness.regress: its turns, its slow engine, and its counts."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.base import InputError, Request, SamplingParams
from engines.fused import LLM as Fused
from engines.nano import LLM as Nano
from harness.regress.sides import Key
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Verdict
from harness.results import load
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


@pytest.mark.parametrize(
    "slow_class, plain_class, options",
    [(slow_engine.Nano, Nano, {}), (slow_engine.Fused, Fused, {"features": ["-device_loop"]})],
    ids=["nano", "fused"],
)
def test_the_slow_engine_waits_in_steps_of_its_rows_and_draws_the_same_tokens(
    monkeypatch, slow_class, plain_class, options
) -> None:
    class Clock:
        looked = 0

        def perf_counter(self) -> float:
            self.looked += 1
            return self.looked * 1e-3

    clock = Clock()
    # Ten looks at a clock of 1 ms.
    slow = slow_class(reference.config(options={**options, "delays_us": [[2, 9500.0]]}))
    monkeypatch.setattr(slow_engine, "time", clock)
    looks, tokens = [], {}
    for engine in (slow, plain_class(reference.config(options=options))):
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


def test_captured_steps_all_get_a_kernel_and_only_those_of_the_rows_one_that_spins(monkeypatch) -> None:
    """So what plain and slow launches differ by is the delay, and not a launch more."""
    spun: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "_sleep", spun.append)
    monkeypatch.setattr(slow_engine, "_cycles_per_us", lambda: 2000.0)
    layers = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(5)))
    for delays in ((), ((32, 45.5),)):
        hooked = layers.requires_grad_(False)
        slow_engine.plant(hooked, torch.device("cuda"), delays)
        for rows in (1, 32):
            hooked(torch.zeros(rows, 4))
        layers[2]._forward_pre_hooks.clear()
        assert [bool(layer._forward_pre_hooks) for layer in layers] == [False] * 5  # the middle one had it, no other
    assert spun == [0, 0, 0, 91_000]


class Here:
    """A launch in this process: importing everything takes most of a launch of the tiny model."""

    returncode = 0

    def __init__(self) -> None:
        self.stdin = io.StringIO()

    def communicate(self) -> tuple[str, None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(self.stdin.getvalue()))
            exec(regress_trial.LAUNCH, {})
        return "", None


@pytest.mark.parametrize("engine", regress_trial.ENGINES)
def test_a_trial_on_the_tiny_model(tmp_path, monkeypatch, engine) -> None:
    file = tmp_path / "trial.json"
    work = ("--launches", "6", "--seconds", "0.05", "--slowdown", "2", "--engine", engine, "--json", str(file))
    tiny = ("model=tiny", "device=cpu", "instrument.min_iterations=5", "workload.cpu_decode=[[2,16]]")
    monkeypatch.setattr(sys, "argv", ["trial", str(tmp_path), *work, "--", *tiny, "workload.cpu_prefill=[]"])
    monkeypatch.setattr(regress_trial, "_process", Here)
    assert regress_trial.main() == 0
    made = json.loads(file.read_text())
    assert (made["engine"], made["launches"], made["launches_a_side"]) == (engine, {NORMAL: 6, SLOW: 3}, 3)
    (row,) = made["rows"]
    runs = {side: load(tmp_path / side).runs for side in (NORMAL, SLOW)}
    delays = [run["config"]["engine"]["options"]["delays_us"] for run in runs[SLOW]]
    assert delays == [delays_us(tmp_path / NORMAL / "00", 2.0)] * 3
    assert min(row["slow_ms"]) >= delays[0][0][1] / 1e3  # whatever else this machine does
    said = {side: [run["verification"]["status"] for run in of] for side, of in runs.items()}
    assert said == {NORMAL: ["passed"] + ["skipped"] * 5, SLOW: ["passed"] + ["skipped"] * 2}
    (tmp_path / NORMAL / "00").rename(tmp_path / "gone")  # the only one of its side that was verified
    (tmp_path / NORMAL / "01").rename(tmp_path / NORMAL / "00")
    with pytest.raises(InputError, match="not verified"):
        regress_trial.read_launches(tmp_path)


def test_a_launch_that_ends_before_it_is_told_what_to_do_says_why(tmp_path, monkeypatch, capsys) -> None:
    """As one does that cannot import an engine."""

    class Gone:
        returncode = 1

        class stdin:
            @staticmethod
            def write(_text: str) -> None: ...

            @staticmethod
            def flush() -> None:
                raise BrokenPipeError

        @staticmethod
        def communicate() -> tuple[str, None]:
            return "ImportError: no such engine", None

    monkeypatch.setattr(regress_trial, "_process", Gone)
    monkeypatch.setattr(sys, "argv", ["trial", str(tmp_path)])
    assert regress_trial.main() == 2
    assert "no such engine" in capsys.readouterr().err


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
            unverified = {} if launch == 0 else {"verification": {"status": "skipped"}}
            write(tmp_path / side / f"{launch:02}", {PLAIN: factor * times, OTHER: times}, **unverified)
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
    assert "6 plain launches of nano and 6 with" in shown
    assert trial.regress_trial("nothing.json").startswith("Not measured yet")


def test_the_power_table_finds_more_with_more_launches_and_less_noise() -> None:
    rng = np.random.default_rng(3)
    assert trial.found(0.003, 6, 0.03, rng) == trial.DRAWN
    assert trial.found(0.015, 3, 0.03, rng) < trial.DRAWN / 2
    assert trial.found(0.003, 6, 0.0, rng) == 0


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
