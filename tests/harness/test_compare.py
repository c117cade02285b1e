"""Comparisons: paired statistics against closed forms, turns in ABBA order, and what happens when an engine dies."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from engines.base import InputError
from harness.compare import comparison as comparison_module
from harness.compare.__main__ import main, parse
from harness.compare.comparison import Comparison, read
from harness.compare.contestants import Contestant, contestants, folder_name, short_names
from harness.compare.ratios import paired_ratio
from harness.compare.table import Spread, print_table, rows
from harness.compare.worker import Answer, Order, Worker
from harness.progress import Reporter
from harness.results import RunWriter, load
from harness.slim import slim_comparison

SMALL = [
    "model=tiny", "workload=tpot", "device=cpu", "weights=random", "workload.cpu_prefill=[[2,8]]",
    "workload.cpu_decode=[]", "workload.output_tokens=4",
]  # fmt: skip


# --- paired ratios ---


def test_an_exact_ratio_has_a_point_for_an_interval() -> None:
    found = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.verdict(higher_is_better=False) == "slower"
    assert found.verdict(higher_is_better=True) == "faster"


def test_the_interval_is_that_of_the_paired_t_test_on_logarithms() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = np.exp(rng.normal(0.1, 0.05, 9)), np.exp(rng.normal(0, 0.05, 9))
    expected = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    found = paired_ratio(list(ours), list(theirs))
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((expected.low, expected.high))


def test_the_interval_covers_the_truth_as_often_as_it_says_although_both_engines_drift() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(2000):
        drift = np.linspace(1, 1.05, 8)
        ours, theirs = 1.02 * drift * np.exp(rng.normal(0, 0.01, 8)), drift * np.exp(rng.normal(0, 0.01, 8))
        found = paired_ratio(list(ours), list(theirs))
        covered += found.low <= 1.02 <= found.high
    # Binomial(2000, 0.95) leaves 0.935 to 0.965 in one of 500 tries.
    assert 0.935 <= covered / 2000 <= 0.965


@pytest.mark.parametrize(("launches", "covers"), [(1, False), (4, True)])
def test_what_differs_between_starts_is_seen_from_three_launches_on(launches: int, covers: bool) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        number = np.repeat(np.arange(launches), 8)
        of_start = rng.normal(0, 0.01, launches)[number]
        ratio = 1.02 * np.exp(of_start + rng.normal(0, 0.005, len(number)))
        found = paired_ratio(list(ratio), [1.0] * len(ratio), number.tolist())
        assert found.over_launches == covers
        covered += found.low <= 1.02 <= found.high
    # Binomial(1000, 0.95) leaves 0.93 to 0.97 in one of 300 tries.
    assert (0.93 <= covered / 1000 <= 0.97) == covers


def test_one_pair_proves_nothing() -> None:
    assert paired_ratio([2.0], [1.0]).verdict(higher_is_better=False) == "even"


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0])])
def test_what_is_no_pairs_is_refused(pair) -> None:
    with pytest.raises(ValueError, match="pair"):
        paired_ratio(*pair)


# --- the command line ---


def test_short_names_are_what_tells_contestants_apart() -> None:
    labels = ["nano:limits.a=1", "fused", "fused:features=[]", "vllm:arm=x:limits.a=1", "vllm:arm=y:limits.a=1"]
    assert list(short_names(labels).values()) == ["nano", "fused", "fused:features=[]", "vllm:arm=x", "vllm:arm=y"]
    assert short_names(["vllm:arm=x:limits.a=1", "vllm:arm=x"]) == {
        "vllm:arm=x:limits.a=1": "vllm:arm=x:limits.a=1", "vllm:arm=x": "vllm:arm=x"
    }  # fmt: skip
    assert short_names(["nano", "nano_vllm"]) == {"nano": "nano", "nano_vllm": "nano_vllm"}


def test_contestants_share_everything_but_their_own_options() -> None:
    nano, eager = contestants(["nano", "nano:enforce_eager=true"], [*SMALL, "seed=5"])
    assert (nano.config.engine.options, eager.config.engine.options) == ({}, {"enforce_eager": True})
    assert nano.config.seed == eager.config.seed == 5
    assert nano.config.limits.gpu_memory_utilization == pytest.approx(0.45)
    assert nano.folder != eager.folder


@pytest.mark.parametrize(
    ("labels", "said"), [([], "names no engine"), (["nano", "nano"], "twice"), (["nanno"], "no engine 'nanno'")]
)
def test_wrong_engines_are_a_sentence(labels, said) -> None:
    with pytest.raises(InputError, match=said):
        contestants(labels, SMALL)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("fused:features=[nonsense]", "Feature 'nonsense' of engine fused is not known; known are device_loop"),
        ("fused:features=5", "do not fit engine fused: 'int' object is not iterable"),
        ("nano:blocksize=64", "no option 'blocksize'; did you mean block_size?"),
        ("hf:block_size=64", "no option block_size"),
        ("vllm:serve_arm=fast", "no serve_arm 'fast'"),
        ("nano_vllm:block_size=64", "no option 'block_size'"),
    ],
)
def test_an_option_that_an_engine_does_not_take_ends_all_before_any_starts(
    label, said, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(comparison_module, "Worker", None)
    monkeypatch.setattr(sys, "argv", ["compare", f"engines=[nano,{label}]", f"into={tmp_path / 'c'}", *SMALL])
    assert main() == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not list(tmp_path.iterdir())


def test_own_settings_are_told_from_overrides() -> None:
    settings, overrides = parse(["engines=[nano,vllm:serve_arm=default]", "rounds=3", "model=tiny"])
    assert (settings.engines, settings.rounds, overrides) == (["nano", "vllm:serve_arm=default"], 3, ["model=tiny"])
    with pytest.raises(InputError, match="rounds"):
        parse(["engines=[nano]", "rounds=many"])


def test_an_option_may_be_a_list() -> None:
    labels = ["fused", "fused:features=[-head]", "fused:features=[head,residual]:block_size=64", "fused:features=[]"]
    settings, _ = parse([f"engines=[{','.join(labels)}]"])
    assert settings.engines == labels
    options = [contestant.config.engine.options for contestant in contestants(settings.engines, SMALL)]
    assert options == [
        {},
        {"features": ["-head"]},
        {"features": ["head", "residual"], "block_size": 64},
        {"features": []},
    ]
    assert len({contestant.folder for contestant in contestants(settings.engines, SMALL)}) == 4
    assert parse(["engines=['nano', \"fused:features=[head]\"]"])[0].engines == ["nano", "fused:features=[head]"]


@pytest.mark.parametrize("engines", ["[nano,fused:features=[head]", "[nano]]", "[nano],[fused]"])
def test_brackets_that_do_not_match_are_a_sentence(engines) -> None:
    with pytest.raises(InputError, match="brackets"):
        parse([f"engines={engines}"])


def test_a_label_with_brackets_is_shown_as_it_is(tmp_path) -> None:
    labels = ["fused:features=[head]", "fused:features=[-head]"]
    for label in labels:
        writer = RunWriter(tmp_path / folder_name(label), label)
        writer.add_rounds([_round(label, 0, 1.0)])
        writer.flush()
        writer.write_run({"engine": label})
    console = Console(width=200, record=True, file=io.StringIO())
    print_table(rows(load(tmp_path), labels, labels[1]), labels, labels[1], console)
    shown = console.export_text()
    assert all(shown.count(label) == 1 + (label == labels[1]) for label in labels)


# --- turns ---


class Recorder:
    """Stands for a contestant's process and writes down who was asked for what."""

    log: list[tuple[str, int, bool]]

    def __init__(self, config, run_dir, label) -> None:
        self.label, self.reason = label, ""
        RunWriter(run_dir, f"run of {label}").write_run({"engine": label, "status": "ok"})

    def wait_ready(self) -> bool:
        return True

    def measure(self, order) -> Answer:
        self.log.append((self.label, order.round, order.warm_up))
        return Answer("done")

    def dismiss(self) -> None:
        self.log.append((f"dismissed {self.label}", -1, False))

    def close(self) -> None:
        self.log.append((f"closed {self.label}", -1, False))

    def end(self) -> None: ...


def test_rounds_go_there_and_back_again(tmp_path, monkeypatch) -> None:
    Recorder.log = []
    monkeypatch.setattr(comparison_module, "Worker", Recorder)
    three = [
        replace(c, label=label) for c, label in zip(contestants(["nano", "fused", "hf"], SMALL), "ABC", strict=True)
    ]
    Comparison(three, "A", num_rounds=3, launches=1, folder=tmp_path / "c", reporter=Reporter()).run()
    warm_ups = [label for label, _, warm_up in Recorder.log if warm_up]
    turns = [(number, label) for label, number, warm_up in Recorder.log if not warm_up and number >= 0]
    assert warm_ups == ["A", "B", "C"]
    assert turns == [(0, "A"), (0, "B"), (0, "C"), (1, "C"), (1, "B"), (1, "A"), (2, "B"), (2, "C"), (2, "A")]
    ends = [label for label, number, _ in Recorder.log if number < 0]
    assert ends == [*(f"dismissed {label}" for label in "ABC"), *(f"closed {label}" for label in "ABC")]


def test_each_is_first_last_and_between_the_others_equally_often() -> None:
    orders = [comparison_module.turns(["A", "B", "C"], number) for number in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["A", "A", "B", "B", "C", "C"]


# --- rows ---


def _round(label: str, number: int, value: float | None, status: str = "ok") -> dict:
    return {
        "engine": label, "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 8, "tokens": 128,
        "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1, "value": value,
        "status": status,
    }  # fmt: skip


def test_ratios_pair_rounds_of_the_same_number(tmp_path) -> None:
    for label, values in (("A", {0: 1.0, 1: 10.0, 2: 100.0}), ("B", {1: 20.0, 2: 200.0, 3: 7.0})):
        writer = RunWriter(tmp_path / label, label)
        writer.add_rounds(_round(label, number, value) for number, value in values.items())
        writer.flush()
        writer.write_run({"engine": label})
    (row,) = rows(load(tmp_path), ["A", "B"], "A")
    assert row.cells["A"].ratio is None
    assert row.cells["B"].ratio is not None
    assert (row.cells["B"].ratio.value, row.cells["B"].ratio.pairs) == (pytest.approx(2.0), 2)
    assert row.cells["B"].spread is not None
    assert row.cells["B"].spread.median == 20.0


def test_a_failed_block_leaves_its_reason(tmp_path) -> None:
    writer = RunWriter(tmp_path / "A", "A")
    writer.add_rounds([_round("A", 0, 1.0), {**_round("B", 0, None, "out of memory: 2 GiB"), "samples": 0}])
    writer.flush()
    writer.write_run({"engine": "A"})
    (row,) = rows(load(tmp_path), ["A", "B"], "A", {"B": "its process ended"})
    assert row.cells["B"].reason == "its process ended"  # the failed row is A's run
    writer = RunWriter(tmp_path / "B", "B")
    writer.add_rounds([{**_round("B", 0, None, "out of memory: 2 GiB"), "samples": 0}])
    writer.flush()
    writer.write_run({"engine": "B"})
    (row,) = rows(load(tmp_path), ["A", "B"], "A", {})
    assert row.cells["B"].reason == "out of memory: 2 GiB"


def test_a_block_that_failed_among_others_is_told(tmp_path) -> None:
    for label, failed in (("A", {}), ("B", {1: "129 tokens took no longer than one: ask for more output_tokens."})):
        writer = RunWriter(tmp_path / label, label)
        writer.add_rounds(_round(label, i, None if i in failed else 2.0, failed.get(i, "ok")) for i in range(3))
        writer.flush()
        writer.write_run({"engine": label})
    found = rows(load(tmp_path), ["A", "B"], "A")
    assert found[0].cells["A"].reason == ""
    assert found[0].cells["B"].spread == Spread(2.0, 2.0, 2.0, 2)
    out = io.StringIO()
    print_table(found, ["A", "B"], "A", Console(file=out, width=200))
    assert "2 rounds; of others: 129 tokens took no longer than one" in out.getvalue()


@pytest.mark.parametrize("rounds", [1, 2], ids=["all failed", "one of two"])
def test_reasons_are_shown_as_they_are_in_one_line(rounds, tmp_path) -> None:
    """Errors have brackets, which are no markup, and lines of which the first says most."""
    writer = RunWriter(tmp_path / "A", "A")
    failed = {**_round("A", 0, None, "RuntimeError: [/tmp/x] is gone\nat line 3"), "samples": 0}
    writer.add_rounds([failed, _round("A", 1, 2.0)][:rounds])
    writer.flush()
    writer.write_run({"engine": "A"})
    out = io.StringIO()
    print_table(rows(load(tmp_path), ["A"], "A"), ["A"], "A", Console(file=out, width=200))
    assert "RuntimeError: [/tmp/x] is gone" in out.getvalue() and "line 3" not in out.getvalue()


# --- whole comparisons, in real processes ---


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """A comparison in which the second engine's process ends in the middle."""
    (nano,) = contestants(["nano"], SMALL)
    target = "tests.harness.failing_engine.Dies"
    dying = Contestant("dies", replace(nano.config, engine=replace(nano.config.engine, name="dies", target=target)))
    folder = tmp_path_factory.mktemp("comparison") / "c"
    comparison = Comparison([nano, dying], "nano", num_rounds=4, launches=1, folder=folder, reporter=Reporter())
    return comparison, comparison.run(), folder


def test_the_others_finish_when_one_dies(died) -> None:
    comparison, (row,), _ = died
    assert row.cells["nano"].spread.rounds == 4
    assert row.cells["dies"].spread.rounds == 2
    assert "exit code 3" in row.cells["dies"].reason
    assert "exit code 3" in comparison.reasons["dies"]


def test_the_others_are_measured_when_one_does_not_start(tmp_path) -> None:
    (nano,) = contestants(["nano"], SMALL)
    target = "tests.harness.launched_engines.Refuses"
    refusing = Contestant("refuses", replace(nano.config, engine=replace(nano.config.engine, target=target)))
    folder = tmp_path / "c"
    comparison = Comparison([nano, refusing], "nano", num_rounds=1, launches=1, folder=folder, reporter=Reporter())
    (row,) = comparison.run()
    assert row.cells["nano"].spread.rounds == 1
    assert comparison.reasons == {"refuses": "It cannot do this."} and row.cells["refuses"].spread is None


def test_one_that_ends_between_its_turns_is_out_and_no_more(tmp_path) -> None:
    (nano,) = contestants(["nano"], SMALL)
    worker = Worker(nano.config, tmp_path / "nano", "nano")
    assert worker.wait_ready()
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.join()
    order = Order(0, 0, 0, 0.0)
    assert worker.measure(order).kind == worker.measure(order).kind == "dead"
    assert "exit code -9" in worker.reason
    worker.close()


def test_a_second_start_measures_nothing_again(died, monkeypatch) -> None:
    comparison, before, folder = died
    monkeypatch.setattr(comparison_module, "Worker", None)
    again = Comparison(comparison.contestants, "nano", num_rounds=4, launches=1, folder=folder, reporter=Reporter())
    assert again.run() == before
    assert json.loads((folder / "comparison.json").read_text())["status"] == "ok"
    assert read(folder)[1][0].cells["nano"] == before[0].cells["nano"]


def test_a_comparison_made_small_says_the_same(died, tmp_path) -> None:
    _, (before,), folder = died
    slim_comparison(folder, tmp_path / "small", 5)
    record, (after,) = read(tmp_path / "small")
    assert "exit code 3" in record["reasons"]["dies"]
    assert after.cells["nano"].spread.median == pytest.approx(before.cells["nano"].spread.median, abs=1e-3)
    assert after.cells["dies"].spread.rounds == before.cells["dies"].spread.rounds
    with pytest.raises(InputError, match="no comparison"):
        slim_comparison(tmp_path, tmp_path / "other", 5)


def test_a_comparison_that_cannot_be_made_small_leaves_what_was_there(died, tmp_path) -> None:
    _, (before,), folder = died
    source, small = tmp_path / "source", tmp_path / "small"
    shutil.copytree(folder, source)
    slim_comparison(source, small, 5)
    damaged = sorted(source.rglob("rounds.parquet"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        slim_comparison(source, small, 5)
    assert read(small)[1][0].cells["nano"].spread.rounds == before.cells["nano"].spread.rounds
    slim_comparison(folder, small, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "small"}
    with pytest.raises(InputError, match="lie in each other"):
        slim_comparison(folder, folder, 5)


def test_variants_of_one_engine_are_kept_under_their_folders_names(tmp_path) -> None:
    labels = ["fused", "fused:features=[-head]"]
    settings = {"engines": labels, "model": {"name": "tiny"}, "workload": {"name": "ablation"}}
    for name in ("ablation-without-0", "ablation-without-5"):
        for label in labels:
            folder = tmp_path / name / "launch-0" / folder_name(label)
            writer = RunWriter(folder, f"{name} {label}")
            writer.flush()
            writer.write_run({"engine": "fused"})
        (tmp_path / name / "comparison.json").write_text(json.dumps({"settings": settings}))
    script = Path(__file__).parents[2] / "scripts" / "reference_refresh.py"
    command = [sys.executable, script, *tmp_path.iterdir(), "--to", tmp_path / "h200"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert sorted(path.name for path in (tmp_path / "h200").iterdir()) == ["ablation-without-0", "ablation-without-5"]


def test_other_settings_do_not_mix_with_what_is_there(died) -> None:
    comparison, _, folder = died
    other = Comparison(comparison.contestants, "nano", num_rounds=5, launches=1, folder=folder, reporter=Reporter())
    with pytest.raises(InputError, match="other settings"):
        other.run()


def test_no_process_outlives_a_comparison_that_is_ended(tmp_path) -> None:
    told = tmp_path / "pids"
    command = [sys.executable, "-m", "harness.compare", "engines=[nano]", f"into={tmp_path / 'c'}", *SMALL,
               "engine.target=tests.harness.failing_engine.Hangs"]  # fmt: skip
    parent = subprocess.Popen(command, env={**os.environ, "HANGS": str(told)}, cwd=Path(__file__).parents[2])
    try:
        assert _within_s(90, lambda: told.exists() and told.read_text().endswith("\n"))
        pids = [int(pid) for pid in told.read_text().split()]
        assert all(map(_runs, pids))
        parent.terminate()
        assert parent.wait(30) == 143
        assert _within_s(10, lambda: not any(map(_runs, pids)))
    finally:
        parent.kill()


def _within_s(seconds: float, happened) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
