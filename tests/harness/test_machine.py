"""What is said of the machine: with a pretend NVML, a pretend nvidia-smi, and without either."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from harness import machine

STATE_KEYS = {
    "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "utilization_percent", "throttle_reasons",
    "throttled", "other_processes",
}  # fmt: skip


class NvmlError(Exception):
    """Stands for pynvml.NVMLError."""


def _fake_nvml(**changed: Any) -> ModuleType:
    """An H200 that is slowed by heat and shared with process 1; `changed` replaces functions, None removes them."""

    def refuse(*_: Any) -> None:
        raise NvmlError("not supported")

    functions: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda gpu: "NVIDIA H200",
        "nvmlDeviceGetUUID": lambda gpu: f"uuid of {gpu}".encode(),
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=141 << 30),
        "nvmlDeviceGetClockInfo": lambda gpu, clock: {1: 1980, 2: 3201}[clock],
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
        "nvmlDeviceGetPowerUsage": lambda gpu: 345_600,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=97),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x20 | 0x1,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=1 << 30),
            SimpleNamespace(pid=1, usedGpuMemory=3 << 30),
            SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None),
        ],
        "refuse": refuse,
    }
    module = ModuleType("pynvml")
    vars(module).update(NVMLError=NvmlError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0)
    for name, function in {**functions, **changed}.items():
        if function is not None:
            setattr(module, name, refuse if function == "refuse" else function)
    return module


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test starts without NVML and without nvidia-smi, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    git = Path(next(p for p in os.environ["PATH"].split(":") if (Path(p) / "git").exists())) / "git"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def _smi(tmp_path: Path, gpu: str, apps: str = "", known: str = "event") -> None:
    """An nvidia-smi that knows the reasons as `known` and fails when asked in other words."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in\n  *query-gpu*clocks_{known}_reasons*) echo "{gpu}" ;;\n'
        f'  *query-gpu*) exit 2 ;;\n  *query-compute-apps*) printf "{apps}" ;;\nesac\n'
    )
    script.chmod(0o755)


def test_without_a_gpu() -> None:
    found = machine.provenance()
    assert found["gpu"] is None and machine.gpu_state() is None and machine.machine_slug() == "cpu"
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= found["cpu"]["usable_cores"] >= 1 and found["cpu"]["model"]
    assert found["memory_mib"] > 100
    assert socket.gethostname() not in json.dumps(found)


def test_nvml_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml())
    assert machine.gpu_state() == {
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
        "temperature_c": 61,
        "power_w": 345.6,
        "utilization_percent": 97,
        "throttle_reasons": ["gpu_idle", "sw_thermal_slowdown"],
        "throttled": True,
        "other_processes": [{"pid": 1, "memory_mib": 3072}, {"pid": 2**22 + 1, "memory_mib": None}],
    }
    assert machine.provenance()["gpu"] == {
        "name": "NVIDIA H200",
        "uuid": "uuid of gpu0",
        "driver": "580.95.05",
        "cuda": "13.0",
        "memory_mib": 141 * 1024,
    }
    assert machine.machine_slug() == "h200"


@pytest.mark.parametrize(
    ("visible", "uuid"), [("3,1", "uuid of gpu3"), ("GPU-abc", "uuid of GPU-abc"), ("", None), ("-1", None)]
)
def test_the_first_visible_gpu_is_meant(monkeypatch: pytest.MonkeyPatch, visible: str, uuid: str | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = machine.provenance()["gpu"]
    assert (gpu and gpu["uuid"]) == uuid


@pytest.mark.parametrize(
    ("mask", "throttled", "names"),
    [
        (0, False, []),
        (0x1 | 0x2, False, ["gpu_idle", "applications_clocks_setting"]),
        (0x4, True, ["sw_power_cap"]),
        (0x40 | 0x8, True, ["hw_slowdown", "hw_thermal_slowdown"]),
        (0x80, True, ["hw_power_brake_slowdown"]),
    ],
)
def test_throttle_reasons(monkeypatch: pytest.MonkeyPatch, mask: int, throttled: bool, names: list[str]) -> None:
    # Older packages know them by the older name only.
    fake = _fake_nvml(
        nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: mask
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    state = machine.gpu_state()
    assert state is not None
    assert (state["throttled"], state["throttle_reasons"]) == (throttled, names)


def test_values_that_the_driver_hides_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [n for n in vars(_fake_nvml()) if n.startswith("nvmlDeviceGet") and "Handle" not in n and "Name" not in n]
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml(**dict.fromkeys(hidden, "refuse")))
    state = machine.gpu_state()
    assert state is not None and state.keys() == STATE_KEYS
    assert state.pop("other_processes") == []
    assert set(state.values()) == {None}


def test_broken_nvml_falls_back_to_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _fake_nvml(nvmlInit="refuse"))
    assert machine.gpu_state() is None
    _smi(tmp_path, "NVIDIA H100 80GB HBM3, GPU-1, 580.1, 81559, 1980, 2619, 45, 120.51, 3, 0x0000000000000004")
    assert machine.machine_slug() == "h100"


@pytest.mark.parametrize("known", ["event", "throttle"])
def test_nvidia_smi(tmp_path: Path, known: str) -> None:
    gpu = "NVIDIA GeForce RTX 4070 Laptop GPU, GPU-1, 550.1, 8188, 210, 405, 45, [N/A], 3, 0x0000000000000005"
    _smi(tmp_path, gpu, apps=f"{os.getpid()}, 100\\n1, 512\\n[N/A], [N/A]\\n", known=known)
    state = machine.gpu_state()
    assert state == {
        "sm_clock_mhz": 210,
        "memory_clock_mhz": 405,
        "temperature_c": 45,
        "power_w": None,
        "utilization_percent": 3,
        "throttle_reasons": ["gpu_idle", "sw_power_cap"],
        "throttled": True,
        "other_processes": [{"pid": 1, "memory_mib": 512}],
    }
    assert state.keys() == STATE_KEYS
    assert machine.provenance()["gpu"]["memory_mib"] == 8188
    assert machine.machine_slug() == "rtx-4070-laptop"


def test_children_are_ours() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert machine._is_ours(child.pid) and machine._is_ours(os.getpid())
        assert not machine._is_ours(1) and not machine._is_ours(os.getppid())
    finally:
        child.communicate(b"\n")


def test_a_copy_can_be_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_GIT_COMMIT", "abc123")
    assert machine._git_state(tmp_path) == {"commit": "abc123", "dirty": None}


def test_git_state(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    assert machine._git_state(checkout) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    git = ["git", "-C", str(checkout), *identity]
    subprocess.run([*git, "init", "-q"], check=True)
    (checkout / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    state = machine._git_state(checkout)
    assert state is not None and len(state["commit"]) == 40 and not state["dirty"]
    (checkout / "new").write_text("1")
    assert machine._git_state(checkout) == state
    (checkout / "file").write_text("2")
    assert machine._git_state(checkout) == {**state, "dirty": True}
