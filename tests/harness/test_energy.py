"""Energy by a counter that follows a closed form: known power of each kind of step, ticks of a tenth of a second."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.base import Step, TraceUnsupported
from harness import machine, measurement
from harness.energy import EnergyMeter
from tests.harness.test_runner import Scripted, run_scripted

IDLE_W = 100.0
TICK_S = 0.1


class Gpu:
    """Its clock moves as it works or waits; `counter` is the energy up to the last tick."""

    def __init__(self) -> None:
        self.now_s = 0.03  # between two ticks
        self.work: list[tuple[float, float, float]] = []  # from, to, W

    def run(self, seconds: float, watts: float) -> None:
        self.work.append((self.now_s, self.now_s + seconds, watts))
        self.now_s += seconds

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def joules(self) -> float:
        tick_s = math.floor(self.now_s / TICK_S) * TICK_S
        return IDLE_W * tick_s + sum((w - IDLE_W) * max(0.0, min(e, tick_s) - b) for b, e, w in self.work if b < tick_s)

    def meter(self) -> EnergyMeter:
        return EnergyMeter(self.joules, clock=lambda: self.now_s, sleep=self.sleep)


@pytest.mark.parametrize("round_s", [0.003, 0.25, 7.0])
def test_a_loop_spends_its_power_less_idle(round_s):
    gpu = Gpu()
    meter = gpu.meter()
    assert meter.idle_w == pytest.approx(IDLE_W, rel=1e-3)
    spent = meter.spend(lambda: gpu.run(round_s, 350.0), 3.0)
    assert spent.rounds == pytest.approx(max(1, 3.0 / round_s), abs=1)
    assert spent.joules / spent.rounds == pytest.approx(250.0 * round_s, rel=1e-2)


def test_a_counter_that_stands_still_is_refused():
    gpu = Gpu()
    with pytest.raises(TraceUnsupported, match="does not move"):
        EnergyMeter(lambda: 5.0, clock=lambda: gpu.now_s, sleep=gpu.sleep)


def test_decode_is_told_from_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts: 40 ms at 600 W. Decode: 10 ms at 100 W over idle for the step and 10 W for each sequence."""
    gpu = Gpu()

    def take(step: Step) -> Step:
        if step.kind == "prefill":
            gpu.run(0.040, 600.0)
        else:
            gpu.run(0.010, IDLE_W + 100.0 + 10.0 * step.batch_size)
        return step

    monkeypatch.setattr(machine, "energy_counter", lambda: gpu.joules)
    monkeypatch.setattr(measurement, "EnergyMeter", lambda joules: gpu.meter())
    of_cpu = measurement.Measurement.measure_energy

    def on_gpu(self):
        monkeypatch.setattr(self, "device", "cuda")
        of_cpu(self)
        monkeypatch.setattr(self, "device", "cpu")

    monkeypatch.setattr(measurement.Measurement, "measure_energy", on_gpu)
    record = run_scripted(Scripted(take), tmp_path / "run", monkeypatch, "instrument=steps", "instrument.energy=true")
    assert record["traces"]["energy"] == "ok"
    for shape in record["shapes"]:
        found, batch = shape["energy"], shape["batch_size"]
        assert found["idle_w"] == pytest.approx(IDLE_W, rel=1e-3)
        if shape["phase"] == "prefill":
            step_j, tokens = 0.040 * 500.0, batch * shape["tokens"]
        else:
            step_j, tokens = 0.010 * (100.0 + 10.0 * batch), batch
        assert found["j_per_step"] == pytest.approx(step_j, rel=0.05)
        assert found["j_per_token"] == pytest.approx(step_j / tokens, rel=0.05)


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
