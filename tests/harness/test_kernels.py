"""Kernels of steps: split from a profiler's events, read into intervals, kept by a run. All without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from engines.base import NO_LAYER, WHOLE_LAYER, Step, TraceUnsupported
from harness import measurement
from harness.instruments.kernels import Kernel, KernelProbe, disagreeing, read, steps_of
from harness.results import load
from harness.summary import slowest_ops
from tests.harness.scripted_runs import Scripted, run_scripted
from tests.harness.test_attribution import END, FLASH, GEMM, LAYER, LAYERS, NORM, START, launches, recorded

SYNC = "cudaDeviceSynchronize"


def recorded_kernels(engine: str, batch: int) -> list[Kernel]:
    names, step = recorded(engine, "graph", batch)
    kernels, start_ns = [], 1_000_000
    for name, delta, duration, launch in zip(
        names, step["start_delta_ns"], step["duration_ns"], launches(step), strict=True
    ):
        start_ns += delta
        kernels.append(Kernel(name, start_ns, duration, launch))
    return kernels


def idle_us(kernels: list[Kernel]) -> float:
    """Time in which nothing ran, counted moment by moment."""
    changes = sorted(
        [(k.start_ns, 1) for k in kernels] + [(k.end_ns, -1) for k in kernels], key=lambda c: (c[0], -c[1])
    )
    idle, running, since = 0, 0, changes[0][0]
    for moment, change in changes:
        if running == 0:
            idle += moment - since
        running, since = running + change, moment
    return idle / 1e3


@pytest.mark.parametrize(
    ("engine", "batch", "launched"),
    [("nano", 1, 8), ("fused", 1, 8), ("fused", 32, 8), ("vllm", 1, 36), ("vllm", 256, 35)],
)
def test_a_recorded_step_closes(engine: str, batch: int, launched: int) -> None:
    kernels = recorded_kernels(engine, batch)
    sample = read([kernels], LAYERS, qk_norm=True, mode="graph")
    span_us = (max(k.end_ns for k in kernels) - kernels[0].start_ns) / 1e3
    assert sample.attributed == 1.0
    assert sample.trace.gpu_us == pytest.approx(span_us)
    assert sample.gaps == pytest.approx(idle_us(kernels) / span_us)
    assert 0.98 <= sample.closure <= 1.02
    assert sample.launches == launched
    assert sample.kernels == sum(not k.name.startswith("Mem") for k in kernels)
    whole = [i for i in sample.trace.intervals if i.op == WHOLE_LAYER]
    assert [i.layer_index for i in whole] == list(range(LAYERS))
    # Ops have the time of their kernels, layers also what lies between these.
    for layer in whole:
        ops = [i for i in sample.trace.intervals if i.layer_index == layer.layer_index and i is not layer]
        assert ops[0].start_us == layer.start_us
        assert 0.8 * layer.latency_us < sum(i.latency_us for i in ops) < 1.05 * layer.latency_us
        end_us = max(i.start_us + i.latency_us for i in ops)
        assert layer.start_us + layer.latency_us == pytest.approx(end_us, abs=3)
    assert (sample.trace.mode, sample.trace.source) == ("graph", "cupti")


def step_kernels(names: list[str], start_ns: int = 0, duration_ns: int = 10, gap_ns: int = 5) -> list[Kernel]:
    return [Kernel(name, start_ns + i * (duration_ns + gap_ns), duration_ns, 7) for i, name in enumerate(names)]


def test_intervals_of_one_op_join_and_name_their_kernels() -> None:
    names = [*START, *LAYER, NORM, GEMM, "argmax", "softmax", "Memcpy DtoH"]
    sample = read([step_kernels(names)], 1, True, "eager")
    (sampled,) = [i for i in sample.trace.intervals if i.block == "sample"]
    assert (sampled.kernels, sampled.latency_us) == ("argmax; softmax", pytest.approx(0.02))
    (layer,) = [i for i in sample.trace.intervals if i.op == WHOLE_LAYER]
    assert (layer.start_us, layer.kernels) == (pytest.approx(0.03), "")
    assert layer.latency_us == pytest.approx((11 * 10 + 10 * 5) / 1e3)
    attention = next(i for i in sample.trace.intervals if i.op == "attention")
    assert attention.kernels == FLASH.removeprefix("void ")
    # Gaps between layer and others: with them, all is accounted for.
    assert sample.closure == pytest.approx(1.0)
    assert sample.gaps == pytest.approx(5 * (len(names) - 1) / (15 * len(names) - 5))


def test_each_instant_belongs_to_the_kernel_that_started_first() -> None:
    """A step of two layers with dependent launches, in ns; its times are worked out by hand.

    Of layer 0: qkv starts while embed runs; o_proj starts and ends while attention runs; gate_up starts while attention
    runs and ends after it; nothing runs from 50 to 54. Layer 1 has no overlap. Sampling starts while the head runs.
    """
    first = [(0, 12), (8, 24), (20, 44), (22, 30), (36, 50), (54, 60)]
    names = ["embed_rows_kernel", "decode_linear_a", "decode_attention_kernel", "decode_linear_b", "decode_linear_c",
             "decode_linear_d"]  # fmt: skip
    second = [(64 + 6 * i, 68 + 6 * i) for i in range(5)]
    end = [(90, 100), (92, 104)]
    kernels = [
        Kernel(name, start, stop - start, 7)
        for name, (start, stop) in zip(
            [*names, *names[1:], "decode_head_kernel", "choose_token_kernel"], [*first, *second, *end], strict=True
        )
    ]
    sample = read([kernels], 2, True, "graph")
    found = [(i.op, round(i.start_us * 1e3), round(i.latency_us * 1e3)) for i in sample.trace.intervals]
    attention = "qk_norm+rope+kv_write+attention"
    assert found == [
        ("embed", 0, 12),
        ("layer", 8, 48),  # from 12 to 60
        ("input_norm+qkv_proj", 8, 12),  # 12 to 24
        (attention, 20, 20),  # 24 to 44
        ("o_proj", 22, 0),  # hidden whole
        ("post_norm+gate_up_proj+silu_mul", 36, 6),  # 44 to 50
        ("down_proj", 54, 6),
        ("layer", 64, 28),  # from 64 to 92
        ("input_norm+qkv_proj", 64, 4),
        (attention, 70, 4),
        ("o_proj", 76, 4),
        ("post_norm+gate_up_proj+silu_mul", 82, 4),
        ("down_proj", 88, 4),
        ("final_norm+lm_head", 90, 8),  # 92 to 100
        ("sample", 92, 4),  # 100 to 104
    ]
    assert sample.trace.gpu_us == pytest.approx(0.104)
    # Idle: 50 to 54, 60 to 64, and 2 before each of the last four kernels of layer 1.
    assert sample.gaps == pytest.approx(16 / 104)
    # Durations add up to 12 + 16 + 24 + 8 + 14 + 6 + 5 * 4 + 10 + 12.
    assert sample.overlap == pytest.approx(1 - 88 / 122)
    assert (sample.attributed, sample.closure) == (1.0, pytest.approx(1.0))


def test_a_wait_for_the_layer_before_is_not_this_layers() -> None:
    """The same step, its kernels started one after the other or 8 ns too early: only starts and overlap differ."""
    names = [*START, *LAYER, *LAYER, *END]
    plain = [Kernel(name, 10 * i, 10, 7) for i, name in enumerate(names)]
    early = [Kernel(k.name, max(0, k.start_ns - 8), k.end_ns - max(0, k.start_ns - 8), 7) for k in plain]
    one, other = (read([kernels], 2, True, "graph") for kernels in (plain, early))
    assert [i.latency_us for i in one.trace.intervals] == [i.latency_us for i in other.trace.intervals]
    for sample in (one, other):
        assert (sample.closure, sample.gaps) == (pytest.approx(1.0), 0)
        assert [i.latency_us for i in sample.trace.intervals if i.op == WHOLE_LAYER] == [0.11, 0.11]
    assert (one.overlap, other.overlap) == (0, pytest.approx(8 * (len(names) - 1) / (18 * len(names) - 8)))


def test_copies_inside_a_kernel_add_nothing() -> None:
    names = [*START, *LAYER, *END]
    kernels = [Kernel("Memset", 0, 30, 1), Kernel(START[0], 5, 10, 1), *step_kernels([*names[1:]], start_ns=40)]
    sample = read([kernels], 1, True, "eager")
    assert sample.trace.intervals[0].latency_us == pytest.approx(0.03)
    assert sample.closure == pytest.approx(1.0)
    assert sample.gaps == pytest.approx(idle_us(kernels) * 1e3 / kernels[-1].end_ns)


def test_kernels_without_a_place_lower_share_and_closure() -> None:
    kernels = step_kernels(["_plan", *LAYER, *END])
    sample = read([kernels], 1, True, "eager")
    assert sample.attributed == pytest.approx(1 - 1 / len(kernels))
    assert sample.closure == pytest.approx(1 - 10 / kernels[-1].end_ns)
    assert all(i.kernels != "_plan" for i in sample.trace.intervals)


def test_a_prefill_in_two_steps_is_one_sample() -> None:
    names = [*START, *LAYER, *END]
    first, second = step_kernels(names), step_kernels(names, start_ns=10_000)
    sample = read([first, second], 1, True, "eager")
    whole = [i for i in sample.trace.intervals if i.op == WHOLE_LAYER]
    assert [i.layer_index for i in whole] == [0, 0]
    assert whole[1].start_us - whole[0].start_us == pytest.approx(10)
    assert sample.closure == pytest.approx(1.0)


def test_what_cannot_be_laid_to_layers_says_why() -> None:
    with pytest.raises(TraceUnsupported, match="cannot be laid to layers: 5 matrix products make a step"):
        read([step_kernels([*START, *END])], 1, True, "eager")
    with pytest.raises(TraceUnsupported, match="no kernel in this step"):
        read([[]], 1, True, "eager")


def test_copies_of_inputs_may_differ_between_samples_the_models_kernels_not() -> None:
    one, two, three = (
        [*START, *LAYER, *END],
        ["Memcpy HtoD", "_plan", *START, *LAYER, *END],
        [*START, *LAYER, NORM, *END],
    )
    sequences = [read([step_kernels(names)], 1, True, "eager").sequence for names in (one, two, one, three, two)]
    assert disagreeing(sequences) == {3: f"Kernel 13 of sample 3 is {NORM}, in most samples {GEMM}."}
    assert disagreeing(sequences[:3]) == {}
    uploading = read([step_kernels([*one[:-2], "Memcpy HtoD", *one[-2:]])], 1, True, "eager").sequence
    assert uploading == sequences[0]
    assert disagreeing([]) == {}


def test_steps_lie_between_pairs_of_marks() -> None:
    """Work outside the marks is no step's; a lone wait inside a step is the engine's own."""
    calls = [
        (1, "launch"),
        (2, SYNC), (3, SYNC), (4, "launch"), (5, SYNC), (6, "launch"), (7, SYNC), (8, SYNC),
        (9, "launch"),
        (10, SYNC), (11, SYNC), (12, "graph"), (13, SYNC), (14, SYNC),
        (15, SYNC), (16, SYNC), (17, "launch"), (18, SYNC), (19, SYNC),
        (20, SYNC),
    ]  # fmt: skip
    kernels = [Kernel(f"k{n}", 100 + n, 1, n) for n in (1, 4, 6, 9, 12, 12, 17)]
    names = [[k.name for k in step] for step in steps_of(reversed(kernels), reversed(calls))]
    assert names == [["k4", "k6"], ["k12", "k12"], ["k17"]]


class Recorder:
    """Stands for the GPU and its profiler: what is launched takes 10 us each, and every call gets a number."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.number = self.now_us = 0

    def call(self, name: str) -> None:
        self.number += 1
        self.log.append(self._event(name, DeviceType.CPU, self.now_us))

    def launch(self, names: list[str]) -> None:
        self.call("cudaGraphLaunch")
        for name in names:
            self.now_us += 12
            self.log.append(self._event(name, DeviceType.CUDA, self.now_us))

    def _event(self, name: str, device: DeviceType, start_us: float) -> Any:
        span = SimpleNamespace(start=start_us, end=start_us + 10)
        return SimpleNamespace(
            name=name, id=self.number, device_type=device, time_range=span, is_user_annotation=name == "range"
        )

    def events(self) -> list[Any]:
        return self.log

    @contextmanager
    def profiler(self) -> Iterator[Recorder]:
        self.log = []
        yield self
        self.call(SYNC)  # as the real one does

    def probe(self) -> KernelProbe:
        return KernelProbe(
            profiler=self.profiler, synchronize=lambda: self.call(SYNC), activities=lambda: [ProfilerActivity.CUDA]
        )


def test_a_window_gives_the_kernels_of_its_steps() -> None:
    gpu = Recorder()
    probe = gpu.probe()
    for _ in range(2):  # a second window knows nothing of the first
        with probe.window():
            for work in (["a", "range", "b"], ["c"]):
                gpu.launch(["between"])
                probe.start_step("", "decode", 1, 1)
                gpu.launch(work)
                probe.finish_step()
        assert [[k.name for k in step] for step in probe.steps] == [["a", "b"], ["c"]]
        assert probe.steps[0][1].duration_ns == 10_000


def test_a_profiler_that_shows_nothing() -> None:
    gpu = Recorder()
    probe = gpu.probe()
    with pytest.raises(TraceUnsupported, match="in 0 of 1 steps; another profiler"), probe.window():
        probe.start_step("", "decode", 1, 1)
        probe.finish_step()
    with pytest.raises(TraceUnsupported, match="on a GPU only"):
        KernelProbe(activities=lambda: [ProfilerActivity.CPU])


def run_recorded(names_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """A run of an engine whose steps launch `names_of(step)`, with kernels recorded."""
    gpu = Recorder()

    def launching(step: Step) -> Step:
        gpu.launch(names_of(step))
        return step

    monkeypatch.setattr(measurement, "KernelProbe", gpu.probe)
    record = run_scripted(
        Scripted(launching), tmp_path, monkeypatch, "instrument.eager=false", "instrument.graph=false"
    )
    return record, load(tmp_path)


def test_a_run_records_kernels_of_steps_as_they_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = [*START, *LAYER * 3, *END]
    record, runs = run_recorded(lambda _: step, tmp_path, monkeypatch)
    assert record["traces"]["kernels"] == "ok"
    assert record["failures"] == []
    assert "trace_kernels" in record["phases_s"]
    for shape in json.loads(json.dumps(record["shapes"])):
        found = shape["kernels"]
        assert (found["status"], found["samples"], found["attributed"], found["refused"]) == ("ok", 3, 1.0, [])
        assert (found["kernels"], found["launches"], found["mode"]) == (len(step) - 2, 1, "eager")
        assert found["gaps"] == pytest.approx(2 * (len(step) - 1) / (12 * len(step) - 2))
        assert found["closure"] == pytest.approx(1.0)
        assert found["overhead"] == pytest.approx(found["wall_us"] / shape["timed"]["wall_us"])
    layers = runs.layers
    assert set(layers["source"]) == {"cupti"}
    assert sorted(layers["iteration"].unique()) == [0, 1, 2]
    assert (layers.loc[layers["op"] == "lm_head", "kernels"] == GEMM).all()
    assert layers.loc[layers["layer_index"] != NO_LAYER, "latency_us"].groupby(layers["op"]).median()["layer"] == 130
    steps = runs.steps[runs.steps["instrumented"]]
    assert set(steps["source"]) == {"cupti"}
    assert (steps["gpu_us"] == 12 * len(step) - 2).all()
    assert not [w for w in record["warnings"] if "kernel" in w]


def test_doubts_about_kernels_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill that is no step of three layers has a reason; samples that ran other kernels are left out."""
    decodes = 0

    def names_of(step: Step) -> list[str]:
        nonlocal decodes
        if step.kind == "prefill":
            return [*START, *LAYER * 2, *END]
        decodes += 1
        unknown = ["_plan"] * 3 + LAYER * 3 + END
        return unknown if step.batch_size == 1 else [*START, *LAYER * 3, *END, *["argmax"] * (decodes % 3 == 0)]

    record, runs = run_recorded(names_of, tmp_path, monkeypatch)
    prefill, one, two = record["shapes"]
    assert prefill["kernels"]["status"].startswith("The kernels cannot be laid to layers: 13 matrix products")
    assert prefill["timed"]["status"] == "ok"
    failed = runs.steps[runs.steps["status"] != "ok"]
    assert failed[["phase", "mode", "instrumented"]].to_numpy().tolist() == [["prefill", "eager", True]]
    assert one["kernels"]["attributed"] == pytest.approx(1 - 3 / 40)
    assert two["kernels"]["samples"] == 2
    assert len(two["kernels"]["refused"]) == 1
    told = " ".join(record["warnings"])
    assert "decode of 1 sequences at context 16 tokens: only 92.5% of kernel time has a place" in told
    assert "decode of 2 sequences at context 16 tokens: 1 samples with other kernels are left out" in told
    assert "In the kernels trace of 1 of 2 shapes" in told


def test_the_summary_takes_kernels_where_there_are_any() -> None:
    columns = ["phase", "batch_size", "new_tokens", "context_len", "mode", "source", "layer_index", "op", "latency_us"]
    shape = ("decode", 1, 1, 16)
    eager = [(*shape, "eager", "cuda_event", 0, "layer", 100.0), (*shape, "eager", "cuda_event", 0, "rope", 90.0)]
    kernels = [(*shape, "graph", "cupti", 0, "layer", 10.0), (*shape, "graph", "cupti", 0, "o_proj", 5.0)]
    asked = {"phase": "decode", "batch_size": 1, "tokens": 16}
    assert slowest_ops(pd.DataFrame(eager + kernels, columns=columns), asked) == [("o_proj", 0.5)]
    assert slowest_ops(pd.DataFrame(eager, columns=columns), asked) == [("rope", 0.9)]


def test_no_kernels_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_scripted(Scripted(), tmp_path, monkeypatch, "instrument.eager=false", "instrument.graph=false")
    assert record["traces"]["kernels"] == "Kernels are seen on a GPU only, by a torch with CUPTI."
    assert sum("No kernels trace" in warning for warning in record["warnings"]) == 1
    assert all("kernels" not in shape for shape in record["shapes"])
