"""Runs that go wrong: what is refused, what ends a run and keeps its rows, and what only fails a shape."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from engines.base import InputError, Step
from harness import runner
from harness.measurement import out_of_memory
from harness.results import load
from harness.runner import RunFailed, run
from harness.summary import print_summary
from tests.harness.scripted_runs import Scripted, config, run_scripted, silent


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


def test_out_of_memory() -> None:
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not out_of_memory(RuntimeError("memory of things past"))
    assert not out_of_memory(ValueError("out of memory"))
