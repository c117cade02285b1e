"""Runs from start to end: on the reference engine with the tiny checkpoint, and on an engine that is scripted."""

from __future__ import annotations

import gc
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.base import HostPhases, Step
from harness import measurement
from harness.config import compose
from harness.instruments.host import HostProbe
from harness.instruments.probe import Interval, StepTrace
from harness.passes import Sample, _joined
from harness.progress import Reporter
from harness.results import load
from harness.rounds import Blocks
from harness.runner import RunFailed, run
from harness.summary import main
from tests.harness.scripted_runs import QUICK, TINY, Scripted, config, run_scripted, silent


def test_a_run_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(config(), tmp_path / "run", silent())
    runs = load(tmp_path / "run")
    (written,) = runs.runs
    assert written == {
        **json.loads(json.dumps(record, default=str)),
        **{k: written[k] for k in written.keys() - record},
    }
    assert (written["status"], written["verification"]["status"], written["failures"]) == ("ok", "passed", [])
    assert written["weights"]["source"] == "local"
    assert written["traces"].keys() == {"host", "kernels", "eager", "graph"}
    assert written["traces"]["eager"] == "ok" != written["traces"]["graph"]
    assert set(written["phases_s"]) >= {"weights", "engine_start", "verify", "timed", "trace_eager"}
    shape_of = ["phase", "batch_size", "new_tokens", "context_len"]
    shapes = {("prefill", 1, 16, 0), ("decode", 1, 1, 16), ("decode", 2, 2, 16)}
    timed, traced = (runs.steps[runs.steps["instrumented"] == flag] for flag in (False, True))
    for steps in (timed, traced, runs.layers):
        assert set(steps[shape_of].itertuples(index=False, name=None)) == shapes
    assert (runs.steps["status"] == "ok").all()
    assert traced.groupby(shape_of).size().tolist() == [3, 3, 3]
    for shape in written["shapes"]:
        found = shape["timed"]
        assert found["wall_us_low"] <= found["wall_us"] <= found["wall_us_high"]
        assert found["stop"] in ("precision", "max_iterations", "time")
        assert shape["eager"]["overhead"] == pytest.approx(shape["eager"]["wall_us"] / found["wall_us"])
        assert 0.3 < shape["eager"]["closure"] <= 1.0
        if shape["phase"] == "decode":
            assert abs(shape["eager"]["mean_context_len"] - 16) < 8
    whole = runs.layers[runs.layers["op"] == "layer"]
    assert sorted(whole["layer_index"].unique()) == [0, 1, 2]
    assert {"embed", "qkv_proj", "lm_head", "sample"} <= set(runs.layers["op"])
    shown = capsys.readouterr().out
    assert "slowest ops" in shown
    assert "No graph trace" in shown
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == shown


def test_what_a_start_does_is_said_and_timed(tmp_path):
    said = io.StringIO()
    record = run(config("engine=nano", "verify=false"), tmp_path / "run", Reporter(Console(file=said)))
    lines = said.getvalue().splitlines()
    begun = lines.index("Starting nano on cpu, float32")
    took = record["phases_s"]["engine_start"]
    assert "  load weights" in lines[begun:] and f"Ready after {took:.1f} s" in lines[begun:]
    assert list(record["notes"]["start_s"]) == ["load weights"]  # what needs a GPU is not done without one
    assert 0 < record["notes"]["start_s"]["load weights"] < took


def test_passes_come_in_order_and_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted()
    monkeypatch.setattr(measurement, "GraphEventProbe", HostProbe)
    record = run_scripted(engine, tmp_path, monkeypatch)
    marks = [entry for entry in engine.log if not entry.startswith(("prefill", "decode"))]
    assert marks == ["attach eager", "detach", "attach graph", "close"]
    assert all("undisturbed" in entry for entry in engine.log if entry not in marks)
    assert gc.isenabled()
    assert record["traces"].items() >= {"eager": "ok", "graph": "no graphs here"}.items()
    assert record["verification"]["status"] == "skipped"
    assert any("not verified" in warning for warning in record["warnings"])


def test_host_phases_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Phased(Scripted):
        def host_phases(self) -> HostPhases:
            return {"launch": [(self, "on_step")]}

    def slow(step: Step) -> Step:
        time.sleep(0.002)
        return step

    record = run_scripted(Phased(slow), tmp_path, monkeypatch)
    rows = load(tmp_path).host
    shapes = rows.groupby(["phase", "batch_size"])
    assert sorted(shapes.groups) == [("decode", 1), ("decode", 2), ("prefill", 1)]
    for _, group in shapes:
        assert sorted(zip(group["iteration"], group["host_phase"], strict=True)) == [
            (i, phase) for i in range(3) for phase in ("launch", "rest")
        ]
        assert (group.loc[group["host_phase"] == "launch", "latency_us"] >= 2000).all()
        assert (group.loc[group["host_phase"] == "rest", "latency_us"] < 2000).all()
    assert all(shape["host"]["phases_us"]["launch"] >= 2000 for shape in record["shapes"])


def test_a_generate_workload_gives_rounds(tmp_path: Path) -> None:
    settings = ["workload=tpot", "workload.cpu_prefill=[[2,8]]", "workload.cpu_decode=[[1,8]]"]
    made = compose(["engine=nano", "model=tiny", f"weights={TINY}", "device=cpu", *settings, *QUICK,
                    "workload.output_tokens=33", "instrument.max_seconds_per_shape=60"])  # fmt: skip
    record = run(made, tmp_path / "run", silent())
    rounds = load(tmp_path / "run").rounds
    assert [(r["metric"], r["batch_size"], r["output_len"]) for r in record["rounds"]] == [
        ("generate_ms", 2, 1),
        ("tpot_ms", 1, 33),
    ]
    for told in record["rounds"]:
        values = rounds.loc[rounds["metric"] == told["metric"], "value"]
        assert told["median"] == pytest.approx(values.median())
        assert len(values) == told["samples"] >= 5
    assert (rounds["value"] > 0).all()


def test_calls_without_a_number_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of an engine whose many tokens take no longer than one: on a busy machine that happens to a quick one."""
    monkeypatch.setattr(Blocks, "_call_ms", lambda _self, call: 5.0)
    calls = ["workload=tpot", "workload.cpu_prefill=[[2,8]]", "workload.cpu_decode=[[1,8]]"]
    record = run_scripted(Scripted(), tmp_path / "one", monkeypatch, *calls)
    prompts, tokens = record["rounds"]
    assert (record["status"], prompts["status"], prompts["median"]) == ("ok", "ok", 5.0)
    assert "took no longer than one: ask for more output_tokens" in tokens["status"]
    assert "median" not in tokens
    (failed,) = load(tmp_path / "one").rounds.query("status != 'ok'").to_dict("records")
    assert (failed["metric"], failed["status"], failed["samples"]) == ("tpot_ms", tokens["status"], 0)
    assert "Failed: tpot_ms of " in capsys.readouterr().out
    with pytest.raises(RunFailed, match="No call could be timed; the first failure: .* ask for more output_tokens"):
        run_scripted(Scripted(), tmp_path / "none", monkeypatch, *calls, "workload.cpu_prefill=[]")
    assert load(tmp_path / "none").runs[0]["status"] == "failed"


def test_a_run_tells_of_throttled_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def block(self: Any, *order: Any) -> dict[str, Any]:
        self.throttled_blocks.append(["sw_power_cap"] if len(self.throttled_blocks) == 1 else [])
        row = self.blocks([]).row(*order[:4])
        return row | {"throttled": bool(self.throttled_blocks[-1])}

    monkeypatch.setattr(measurement.Measurement, "block", block)
    settings = ["workload=tpot", "workload.cpu_prefill=[[2,8]]", "workload.cpu_decode=[]", "workload.output_tokens=2"]
    quick = [*QUICK, "instrument.max_seconds_per_shape=60"]  # two blocks at least, however busy the machine is
    made = compose(["engine=nano", "model=tiny", f"weights={TINY}", "device=cpu", *settings, *quick])
    record = run(made, tmp_path / "run", silent())
    assert any(re.fullmatch(r"After 1 of \d+ blocks .* throttled \(sw_power_cap\)\.", w) for w in record["warnings"])


def test_limits_come_from_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted()
    run_scripted(engine, tmp_path, monkeypatch, "workload.cpu_prefill=[[3,600]]")
    assert (engine.config.max_model_len, engine.config.max_num_seqs) == (601, 3)
    assert (engine.config.dtype, engine.config.device, engine.config.checkpoint) == ("float32", "cpu", TINY)


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("workload=throughput", "workload.cpu_num_requests=3", "workload.prompt_len=[4,40]")
    record = run(config(*small, "workload.output_len=[5,20]"), tmp_path, silent())
    runs = load(tmp_path)
    assert len(runs.requests) == 3
    served = record["throughput"]
    assert served["output_tokens"] == runs.requests["output_tokens"].sum()
    assert served["output_tok_s"] == pytest.approx(served["output_tokens"] / served["wall_s"])
    first = runs.requests.iloc[0]
    assert first["e2el_ms"] == pytest.approx(first["ttft_ms"] + sum(first["itl_ms"]))
    assert first["tpot_ms"] == pytest.approx(sum(first["itl_ms"]) / (first["output_tokens"] - 1))
    assert (runs.requests["arrival_s"] >= 0).all()
    assert runs.requests["e2el_ms"].max() / 1e3 <= served["wall_s"]
    assert not runs.layers.empty  # typical steps are traced
    assert "output tok/s" in capsys.readouterr().out


def test_prompts_that_need_several_steps_are_one_sample(tmp_path: Path) -> None:
    run(config("workload.cpu_prefill=[[4,16]]", "limits.max_num_batched_tokens=32"), tmp_path, silent())
    steps = load(tmp_path).steps
    prefill = steps[steps["phase"] == "prefill"]
    assert set(prefill["new_tokens"]) == {64}
    layers = load(tmp_path).layers
    one = layers[(layers["phase"] == "prefill") & (layers["iteration"] == 0) & (layers["op"] == "embed")]
    assert len(one) == 4  # hf embeds each prompt for itself
    assert one["start_us"].is_monotonic_increasing


def test_joined_steps_add_up() -> None:
    def sample(wall_us: float, gpu_us: float | None) -> Sample:
        return Sample(wall_us, 0, StepTrace([Interval(0, "layer", "layer", 1.0, 2.0)], gpu_us=gpu_us))

    joined = _joined([sample(10, 5), sample(20, 7)])
    assert joined.trace is not None
    assert (joined.wall_us, joined.trace.gpu_us) == (30, 12)
    assert [i.start_us for i in joined.trace.intervals] == [1, 11]
    unknown = _joined([sample(10, 5), sample(20, None)])
    assert unknown.trace is not None
    assert unknown.trace.gpu_us is None
    assert _joined([Sample(1, 0), Sample(2, 0)]) == Sample(3, 0)


def test_no_instrument_means_no_traced_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted()
    record = run_scripted(engine, tmp_path, monkeypatch, "instrument=nvtx")  # and no tool listens
    assert record["traces"] == {}
    assert not load(tmp_path).steps["instrumented"].any()
    assert not any(entry.startswith("attach") for entry in engine.log)
