"""The GPUs of this machine, and one of them for each process of a sweep. CUDA is not started.

Slurm and Ray give each job its GPU. joblib and submitit's local executor show all GPUs to all of their processes; there
a process takes the first that no other process of this user holds, and keeps it until it ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
POOL = "HARNESS_GPUS"
"""The GPUs that a sweep was started with, for its processes: submitit's local executor overwrites `VISIBLE`."""
SHARING_LAUNCHERS = ("joblib", "submitit_local")
"""Launchers whose processes share this machine's GPUs."""
POLL_S = 0.5

_held: dict[str, FileLock] = {}
"""This process's GPU. Kept for its life, since CUDA cannot change to another."""


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that CUDA would use; all of the machine's where nothing is said."""
    told = os.environ.get(VISIBLE)
    if told is not None:
        return [name for part in told.split(",") if (name := part.strip()) not in ("", "-1")]
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is no GPU to use
        return []
    try:
        return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def gpu_count(at_least: int = 0) -> int:
    """How many GPUs CUDA would use, or `at_least`; `${gpu_count:1}` in the config."""
    return max(at_least, len(visible_gpus()))


def offer() -> None:
    """Tell the processes that this one starts which GPUs they may take."""
    os.environ[POOL] = ",".join(visible_gpus())


def take_one() -> None:
    """Let CUDA see one of the offered GPUs that no other process has taken; waits for one. Nothing if none is offered.

    To be called before CUDA starts.
    """
    offered = [name for name in os.environ.get(POOL, "").split(",") if name]
    while offered and not _held:
        for name in offered:
            lock = FileLock(_lock_dir() / f"{name}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            _held[name] = lock
            os.environ[VISIBLE] = name
            return
        time.sleep(POLL_S)


def _lock_dir() -> Path:
    folder = Path(tempfile.gettempdir(), f"harness-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    return folder
