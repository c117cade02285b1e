"""Runs from start to end: on the reference engine with the tiny checkpoint, and on an engine that misbehaves."""

from __future__ import annotations

import gc
import io
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engines.base import (
    Capacity,
    EngineConfig,
    HostPhases,
    InputError,
    Request,
    RequestResult,
    Scheduled,
    Step,
    TraceUnsupported,
)
from harness import measurement, runner
from harness.config import Config, compose
from harness.instruments.host import HostProbe
from harness.instruments.probe import Interval, StepTrace
from harness.measurement import out_of_memory
from harness.passes import Sample, _joined
from harness.progress import Reporter
from harness.results import load
from harness.rounds import Blocks
from harness.runner import RunFailed, run
from harness.summary import main, print_summary, rounds_table, steps_table

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
QUICK = ("instrument.max_iterations=10", "instrument.traced_iterations=3", "instrument.max_seconds_per_shape=2")


def config(*overrides: str) -> Config:
    return compose(["engine=hf", "model=tiny", f"weights={TINY}", "workload=smoke", "device=cpu", *QUICK, *overrides])


def silent() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


class Scripted:
    """An engine without a model. `on_step` sees each step before it is returned, and may change it or raise."""

    name, arm, mode = "scripted", "default", "eager"

    def __init__(self, on_step: Callable[[Step], Step] = lambda step: step, kv_cache_tokens: int = 100_000) -> None:
        self.on_step = on_step
        self.launches_ahead = False
        self.capacity = Capacity(1024, 64, 16384, kv_cache_tokens)
        self.notes: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.waiting: list[Request] = []
        self.log: list[str] = []

    def start(self, _target: str, config: EngineConfig) -> Scripted:
        self.config = config
        return self

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def host_phases(self) -> HostPhases:
        return {}

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.left)

    def last_step(self) -> Step:
        return self.last

    def advance(self) -> None:
        if self.waiting:
            scheduled = tuple(Scheduled(r.request_id, len(r.prompt_token_ids), 0) for r in self.waiting)
            self.left |= {r.request_id: r.sampling.max_tokens for r in self.waiting}
            self.waiting, kind = [], "prefill"
        else:
            scheduled, kind = tuple(Scheduled(name, 1, self.lengths[name]) for name in self.left), "decode"
        self.log.append(f"{kind} {len(scheduled)}" + ("" if gc.isenabled() else " undisturbed"))
        step = self.on_step(Step(kind, scheduled))  # type: ignore[arg-type]
        for s in scheduled:
            self.lengths[s.request_id] = s.context_len + s.new_tokens
            self.left[s.request_id] -= 1
        finished = tuple(name for name, left in self.left.items() if left == 0)
        self.left = {name: left for name, left in self.left.items() if left}
        self.last = Step(step.kind, step.scheduled, (), finished)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.waiting = []
        self.left = {name: left for name, left in self.left.items() if name not in set(request_ids)}

    def serve(self, requests: Iterable[Request], on_finish: Any = None) -> list[RequestResult]:
        return []

    def score(self, requests: Iterable[Request]) -> list[Any]:
        return []

    def attach(self, probe: Any, mode: str) -> None:
        self.log.append(f"attach {mode}")
        if mode == "graph":
            raise TraceUnsupported("no graphs here")

    def detach(self) -> None:
        self.log.append("detach")

    def close(self) -> None:
        self.log.append("close")


def run_scripted(engine: Scripted, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    monkeypatch.setattr(runner, "start_engine", engine.start)
    return run(config("verify=false", *overrides), run_dir, silent())


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


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError("no room")]
)
def test_out_of_memory_is_a_row_and_the_next_shape_runs(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(step: Step) -> Step:
        if step.batch_size == 2:
            raise error
        return step

    engine = Scripted(full)
    record = run_scripted(engine, tmp_path, monkeypatch, "workload.cpu_decode=[[2,16],[1,16]]")
    steps = load(tmp_path).steps
    failed = steps[steps["batch_size"] == 2]
    assert len(failed) == 2  # one for the timed pass, one for the eager trace
    assert failed["wall_us"].isna().all()
    assert failed["status"].str.startswith("out of memory: ").all()
    assert sorted(failed["instrumented"]) == [False, True]
    last = steps[(steps["batch_size"] == 1) & (steps["phase"] == "decode")]
    assert len(last) > 2
    assert last["wall_us"].notna().all()
    assert record["status"] == "ok"
    assert [f.split(":")[0] for f in record["failures"]] == [
        "decode of 2 sequences at context 16 tokens, timed", "decode of 2 sequences at context 16 tokens, eager"
    ]  # fmt: skip
    assert not engine.has_unfinished()


def test_other_errors_end_the_run_and_keep_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Step) -> Step:
        if step.batch_size == 2:
            raise RuntimeError("illegal memory access")
        return step

    engine = Scripted(broken)
    with pytest.raises(RuntimeError, match="illegal"):
        run_scripted(engine, tmp_path, monkeypatch)
    runs = load(tmp_path)
    assert (runs.runs[0]["status"], runs.runs[0]["error"]) == ("failed", "RuntimeError: illegal memory access")
    assert set(runs.steps["batch_size"]) == {1}
    assert engine.log[-1] == "close"


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def stopped(step: Step) -> Step:
        nonlocal seen
        seen += step.kind == "decode" and step.batch_size == 2
        if seen == 6:
            raise KeyboardInterrupt
        return step

    engine = Scripted(stopped)
    with pytest.raises(KeyboardInterrupt):
        run_scripted(engine, tmp_path, monkeypatch)
    runs = load(tmp_path)
    assert runs.runs[0]["status"] == "interrupted"
    by_shape = runs.steps.groupby(["phase", "batch_size"]).size()
    assert by_shape["decode", 2] == 6 - 1 - 3  # without the warm-up and the step that never came back
    assert by_shape["prefill", 1] >= 1
    assert runs.runs[0]["shapes"][2]["timed"]["stop"] == "interrupted"
    assert engine.log[-1] == "close"
    assert gc.isenabled()
    print_summary(tmp_path, Console(file=io.StringIO()))


def test_a_step_of_another_kind_gives_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = 0

    def sometimes_mixed(step: Step) -> Step:
        nonlocal decodes
        decodes += step.kind == "decode"
        return Step("mixed", step.scheduled) if step.kind == "decode" and decodes % 6 == 0 else step

    record = run_scripted(Scripted(sometimes_mixed), tmp_path, monkeypatch)
    steps = load(tmp_path).steps
    failed = steps[steps["status"] != "ok"]
    assert "A mixed step of 1 sequences came instead" in failed["status"].iloc[0]
    assert set(failed["phase"]) == {"decode"}
    assert len(record["failures"]) == 4


def test_nothing_timed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(lambda step: Step("mixed", step.scheduled))
    with pytest.raises(RunFailed, match=r"No shape could be timed; the first failure: prefill of 1 .* mixed"):
        run_scripted(engine, tmp_path, monkeypatch)
    assert load(tmp_path).runs[0]["status"] == "failed"
    assert "attach eager" not in engine.log


def test_what_no_cache_can_hold_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(kv_cache_tokens=40)
    with pytest.raises(
        InputError, match=r"decode of 2 sequences at context 16 tokens needs a cache of \d+ tokens.* 40"
    ):
        run_scripted(engine, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()
    assert engine.log == ["close"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["workload.cpu_prefill=[[1,1024]]"], r"The prefill of 1 prompts of 1024 tokens needs 1025 positions.*1024"),
        (["limits.max_model_len=16"], r"The prefill .* needs 17 positions.* limits.max_model_len is 16"),
        (["limits.max_num_seqs=1"], r"The decode of 2 .* needs 2 sequences at once.* limits.max_num_seqs is 1"),
        (["engine.target=engines.hf.Nothing"], r"engine.target engines.hf.Nothing cannot be imported"),
        (["weights=/no/such/folder"], r"no folder /no/such/folder"),
    ],
)
def test_bad_input_is_refused(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        run(config(*overrides), tmp_path / "run", silent())
    assert not (tmp_path / "run").exists()


def test_an_engine_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.hf import HF

    class Wrong(HF):
        def score(self, requests: Any) -> list[Any]:
            scored = super().score(requests)
            for one in scored:
                one.logits.mul_(1.05)
            return scored

    monkeypatch.setattr(runner, "start_engine", lambda _target, config: Wrong(config))
    with pytest.raises(RunFailed, match="Nothing was timed, since hf in float32 does not agree with transformers"):
        run(config(), tmp_path, silent())
    runs = load(tmp_path)
    assert runs.steps.empty
    assert (runs.runs[0]["status"], runs.runs[0]["verification"]["status"]) == ("failed", "failed")
    assert runs.runs[0]["verification"]["engine"]["kl"] > 1e-6


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


def test_out_of_memory() -> None:
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not out_of_memory(RuntimeError("memory of things past"))
    assert not out_of_memory(ValueError("out of memory"))


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_a_single_sample_has_no_interval() -> None:
    shape = {"phase": "decode", "batch_size": 1, "tokens": 16}
    timed = {"status": "ok", "wall_us": 2000.0, "wall_us_low": 2000.0, "wall_us_high": 2000.0, "mode": "graph"}
    many = {**timed, "wall_us_low": 1990.0, "samples": 30}
    shapes = [{**shape, "timed": {**timed, "samples": 1}}, {**shape, "timed": many}]
    layers = pd.DataFrame(
        columns=["phase", "batch_size", "new_tokens", "context_len", "source", "mode", "op", "layer_index"]
    ).assign(latency_us=0.0)
    once, often = cells(steps_table({"shapes": shapes}, layers, ""))
    assert once[3:5] == ["2.000", "(once)"]
    assert often[3:5] == ["2.000", "1.990 - 2.000"]


def test_a_call_that_failed_stands_in_the_table() -> None:
    call = {"phase": "decode", "batch_size": 1, "tokens": 16, "output_len": 8, "metric": "tpot_ms"}
    value = {"status": "ok", "median": 2.0, "low": 2.0, "high": 2.0, "samples": 1}
    few = "3 tokens too few came back [/tmp/log]."  # what rich would take for the end of a style
    records = [{**call, **value}, {**call, "status": f"{few}\nA trace."}, {**call, **value, "status": few}]
    table = rounds_table(records, "")
    with (console := Console(width=200)).capture() as printed:
        console.print(table)
    assert printed.get().count(few) == 2 and "A trace" not in printed.get()
    once, failed, then = cells(table)
    assert once[5:] == ["2.000", "(once)", "1"]
    assert then[5:] == ["2.000", f"(once), then: {escape(few)}", "1"]
    assert failed[5:] == ["-", escape(few), "0"]


def test_summary_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
