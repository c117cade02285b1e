"""Energy by a counter that follows a closed form: known power of each kind of step, ticks of a tenth of a second."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.base import Step, TraceUnsupported
from engines.fused.runner import FusedRunner
from harness import machine, measurement
from harness.energy import EnergyMeter
from harness.runner import run
from tests.harness.scripted_runs import Scripted, config, run_scripted, silent

ENERGY_COUNTER = machine.energy_counter

IDLE_W, ASLEEP_W = 100.0, 60.0
TICK_S = LAG_S = 0.1


class Gpu:
    """Its clock moves as it works or waits; the counter has the energy up to one tick before the last one.

    It idles at IDLE_W once it has worked, at ASLEEP_W before.
    """

    def __init__(self) -> None:
        self.now_s = 0.03  # between two ticks
        self.work: list[tuple[float, float, float]] = []  # from, to, W

    def run(self, seconds: float, watts: float) -> None:
        self.work.append((self.now_s, self.now_s + seconds, watts))
        self.now_s += seconds

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def joules(self) -> float:
        told_s = math.floor(self.now_s / TICK_S) * TICK_S - LAG_S
        asleep_s = min(told_s, self.work[0][0] if self.work else math.inf)
        worked_j = sum((w - IDLE_W) * max(0.0, min(e, told_s) - b) for b, e, w in self.work if b < told_s)
        return ASLEEP_W * asleep_s + IDLE_W * (told_s - asleep_s) + worked_j

    def meter(self) -> EnergyMeter:
        return EnergyMeter(self.joules, clock=lambda: self.now_s, sleep=self.sleep)


@pytest.mark.parametrize("round_s", [0.003, 0.25, 7.0])
def test_a_loop_spends_its_power_less_idle(round_s):
    gpu = Gpu()
    meter = gpu.meter()
    gpu.run(0.05, 700.0)  # a warm-up: nothing of it may be in the loop
    spent = meter.spend(lambda: gpu.run(round_s, 350.0), 3.0)
    assert spent.idle_w == pytest.approx(IDLE_W, rel=5e-3)
    assert spent.rounds == pytest.approx(max(1, 3.0 / round_s), abs=1)
    assert spent.joules / spent.rounds == pytest.approx(250.0 * round_s, rel=5e-3)


def test_a_counter_that_stands_still_is_refused():
    gpu = Gpu()
    with pytest.raises(TraceUnsupported, match="does not move"):
        EnergyMeter(lambda: 5.0, clock=lambda: gpu.now_s, sleep=gpu.sleep)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """What runs see as their GPU while energy is measured, and only then."""
    gpu = Gpu()
    monkeypatch.setattr(machine, "energy_counter", lambda: gpu.joules)
    monkeypatch.setattr(measurement, "EnergyMeter", lambda joules: EnergyMeter(joules, lambda: gpu.now_s, gpu.sleep))
    of_cpu = measurement.Measurement.measure_energy

    def on_gpu(self):
        monkeypatch.setattr(self, "device", "cuda")
        of_cpu(self)
        monkeypatch.setattr(self, "device", "cpu")

    monkeypatch.setattr(measurement.Measurement, "measure_energy", on_gpu)
    return gpu


def assert_energy(shapes: list[dict]) -> None:
    """Prompts: 40 ms at 600 W. Decode: 10 ms at 100 W over idle for the step and 10 W for each sequence."""
    for shape in shapes:
        found, batch = shape["energy"], shape["batch_size"]
        assert found["status"] == "ok"
        assert found["idle_w"] == pytest.approx(IDLE_W, rel=5e-3)
        if shape["phase"] == "prefill":
            step_j, tokens = 0.040 * 500.0, batch * shape["tokens"]
        else:
            step_j, tokens = 0.010 * (100.0 + 10.0 * batch), batch
        assert found["j_per_step"] == pytest.approx(step_j, rel=0.02)
        assert found["j_per_token"] == pytest.approx(step_j / tokens, rel=0.02)


def test_decode_is_told_from_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu):
    def take(step: Step) -> Step:
        if step.kind == "prefill":
            gpu.run(0.040, 600.0)
        else:
            gpu.run(0.010, IDLE_W + 100.0 + 10.0 * step.batch_size)
        return step

    record = run_scripted(Scripted(take), tmp_path / "run", monkeypatch, "instrument=steps", "instrument.energy=true")
    assert record["traces"]["energy"] == "ok"
    assert_energy(record["shapes"])


def test_steps_launched_ahead_are_not_charged_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu
) -> None:
    """fused has launched the next step when its tokens are no longer wanted."""
    prefill, launch = FusedRunner._prefill, FusedRunner.launch
    launched = []

    def run_prefill(self, inputs):
        gpu.run(0.040, 600.0)
        return prefill(self, inputs)

    def run_decode(self, sequences, unread=None):
        launched.append(unread is not None)
        gpu.run(0.010, IDLE_W + 100.0 + 10.0 * len(sequences))
        return launch(self, sequences, unread)

    monkeypatch.setattr(FusedRunner, "_prefill", run_prefill)
    monkeypatch.setattr(FusedRunner, "launch", run_decode)
    overrides = (
        "engine=fused", "verify=false", "instrument=steps", "instrument.energy=true", "instrument.energy_seconds=1",
    )  # fmt: skip
    record = run(config(*overrides), tmp_path / "run", silent())
    assert any(launched)
    assert_energy(record["shapes"])


def test_a_failing_read_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    class NvmlError(Exception):
        pass

    reads, fail_from = 0, 10

    def read(_gpu: str) -> int:
        nonlocal reads
        reads += 1
        if reads == fail_from:
            raise NvmlError("GPU is lost")
        return round(1e3 * gpu.joules())

    fake = SimpleNamespace(
        NVMLError=NvmlError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlDeviceGetTotalEnergyConsumption=read,
    )  # fmt: skip
    with monkeypatch.context() as only_here:
        only_here.setitem(sys.modules, "pynvml", fake)
        counter = ENERGY_COUNTER()
    monkeypatch.setattr(machine, "energy_counter", lambda: counter)

    def work(step: Step) -> Step:
        gpu.run(0.010, 300.0)
        return step

    overrides = ("instrument=steps", "instrument.energy=true")
    record = run_scripted(Scripted(work), tmp_path / "first", monkeypatch, *overrides)
    why = "NVML cannot read the energy counter: GPU is lost"
    assert f"No energy trace: {why}" in record["warnings"]  # before the first shape
    assert record["status"] == "ok"

    reads, fail_from = 0, 200
    record = run_scripted(Scripted(work), tmp_path / "second", monkeypatch, *overrides)
    told = [shape["energy"]["status"] for shape in record["shapes"]]
    assert told == [why, "ok", "ok"]
    assert record["status"] == "ok"
    assert any(why in failure for failure in record["failures"])


def test_one_gpus_counter_is_not_taken_for_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    def work(step: Step) -> Step:
        gpu.run(0.010, 300.0)
        return step

    overrides = ("instrument=steps", "instrument.energy=true", "+engine.options.tensor_parallel_size=2")
    record = run_scripted(Scripted(work), tmp_path / "run", monkeypatch, *overrides)
    assert "several GPUs" in record["traces"]["energy"]
    assert record["status"] == "ok"


def test_without_a_counter_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    overrides = ("instrument=steps", "instrument.energy=true")
    record = run_scripted(Scripted(), tmp_path / "run", monkeypatch, *overrides)
    assert record["traces"]["energy"] == "NVML tells no energy here."
    assert "No energy trace: NVML tells no energy here." in record["warnings"]
    assert record["status"] == "ok"


def test_the_counter_is_nvmls_of_the_first_visible_gpu(monkeypatch: pytest.MonkeyPatch):
    class NvmlError(Exception):
        pass

    fake = SimpleNamespace(
        NVMLError=NvmlError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: f"gpu {index}",
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: {"gpu 2": 123_456}[gpu],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert machine.energy_counter()() == pytest.approx(123.456)

    def refuse(_gpu: str) -> int:
        raise NvmlError("not supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert machine.energy_counter() is None
