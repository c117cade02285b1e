"""Comparisons as they run: turns in ABBA order, real processes, one that dies, and what is found there again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engines.base import InputError
from harness.compare import comparison as comparison_module
from harness.compare.comparison import Comparison, read
from harness.compare.contestants import Contestant, contestants, folder_name
from harness.compare.worker import Answer, Order, Worker
from harness.progress import Reporter
from harness.results import RunWriter
from harness.slim import slim_comparison
from tests.harness.test_compare_contestants import SMALL

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
