"""The fastest that this machine reads, copies and multiplies, measured once and kept.

Kept in the user's cache folder, beside random checkpoints, by device, driver and version of torch. On a GPU it takes
some seconds. Each ceiling is the best over several ways and sizes of the median over repetitions: what was seen is a
lower bound on what the hardware can do, so a measured kernel may come out a little above it. Values are random, since
products of zeros run faster than real ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import InputError
from harness import machine
from harness.checkpoints import cache_dir
from harness.limits import device_of
from harness.results import write_json

WARMUP_S = 0.05
"""Long enough for an idle GPU to raise its clocks."""
REPETITIONS = 20
MIB = 1 << 20
GPU_ARRAYS = (512 * MIB, 1024 * MIB, 2048 * MIB)
"""Bytes of the arrays that are read and copied: at least ten times the L2 of the largest GPUs."""
CPU_ARRAYS = (128 * MIB, 256 * MIB)
GPU_PRODUCTS = (4096, 8192)
"""Rows and columns of the square matrices."""
CPU_PRODUCTS = (1024, 2048)
ROW = 4096
"""Columns of the matrix that is read by a product with a vector."""


@dataclass(frozen=True)
class Key:
    """What a ceiling holds for."""

    device: str
    driver: str
    torch: str

    @classmethod
    def of(cls, provenance: Mapping[str, Any], device: str) -> Key:
        """Of the machine that `run.json`'s provenance describes; `device` is cuda or cpu.

        InputError: it names no GPU, so that no ceiling can be looked up.
        """
        version = provenance["versions"]["torch"]
        if device == "cpu":
            cpu = provenance["cpu"]
            return cls(f"{cpu['model']}, {cpu['usable_cores']} cores", "", version)
        if not provenance["gpu"]:
            raise InputError("The run does not say on which GPU it ran.")
        return cls(provenance["gpu"]["name"], provenance["gpu"]["driver"] or "", version)

    @classmethod
    def here(cls, device: str) -> Key:
        """Of this machine's GPU (cuda) or processor (cpu)."""
        return cls.of(machine.provenance(), device)

    @property
    def path(self) -> Path:
        """Where its ceilings are kept."""
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        return cache_dir() / "ceilings" / f"{name}-{digest}.json"


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device. `copy_bytes_per_s` counts bytes read plus bytes written (0: not known); `matrix_dtype` is
    that of the product. `ways` says which measurement gave each, `measured` when."""

    device: str
    driver: str
    torch: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    matrix_flop_per_s: float
    matrix_dtype: str
    ways: dict[str, str]
    measured: str

    def __str__(self) -> str:
        copy = f"copy {self.copy_bytes_per_s / 1e12:.3g} TB/s, " if self.copy_bytes_per_s else ""
        return (
            f"{self.device}: read {self.read_bytes_per_s / 1e12:.3g} TB/s, {copy}"
            f"{self.matrix_dtype} products {self.matrix_flop_per_s / 1e12:.3g} TFLOP/s"
        )


def given(read_bytes_per_s: float, matrix_flop_per_s: float) -> Ceilings:
    """Ceilings that somebody says; InputError unless both are above 0."""
    if not min(read_bytes_per_s, matrix_flop_per_s) > 0:
        raise InputError("Ceilings must be above 0.")
    return Ceilings("as given", "", "", read_bytes_per_s, 0.0, matrix_flop_per_s, "matrix", {}, "")


def cached(key: Key) -> Ceilings | None:
    """What was measured before, None if nothing readable is kept."""
    try:
        return from_record(json.loads(key.path.read_text()))
    except (OSError, ValueError):
        return None


def cached_record(provenance: Mapping[str, Any], device: str) -> dict[str, Any] | None:
    """The kept ceilings of a run's machine, ready for `run.json`. Measures nothing: a run should not take longer."""
    found = cached(Key.of(provenance, device)) if device == "cpu" or provenance["gpu"] else None
    return asdict(found) if found else None


def from_record(record: Mapping[str, Any]) -> Ceilings:
    """From what stands in a file or in `run.json`; ValueError if it is something else."""
    names = {field.name for field in fields(Ceilings)}
    if not isinstance(record, Mapping) or set(record) != names:
        raise ValueError("not a record of ceilings")
    if not all(isinstance(record[name], int | float) and record[name] > 0 for name in names if name.endswith("_s")):
        raise ValueError("a ceiling is not above 0")
    return Ceilings(**record)


def ceilings(device: str = "auto", again: bool = False) -> Ceilings:
    """Those of this machine's cuda or cpu (auto: the GPU if there is one): kept ones, or measured now and kept.

    InputError: there is no such device, others use the GPU, or the cache folder cannot be written.
    """
    device = device_of(device)
    key = Key.here(device)
    found = None if again else cached(key)
    if found is None:
        # Asked before CUDA starts: inside a container our own process may look like another.
        if device == "cuda" and (machine.gpu_state() or {}).get("other_processes"):
            raise InputError("Other processes are on the GPU; its ceilings would come out too low.")
        found = measured(key, torch.device(device))
        try:
            write_json(key.path, asdict(found))
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"Ceilings cannot be kept in {key.path.parent}: {reason}; set HARNESS_CACHE.") from None
    return found


def measured(key: Key, device: torch.device, arrays: tuple[int, ...] = (), products: tuple[int, ...] = ()) -> Ceilings:
    """Measure `device` with arrays of so many bytes and square matrices of so many rows (default: what suits it).

    InputError: its memory holds none of the arrays.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    arrays = _fitting(arrays or (GPU_ARRAYS if on_gpu else CPU_ARRAYS), device)
    products = products or (GPU_PRODUCTS if on_gpu else CPU_PRODUCTS)
    reads, copies = {}, {}
    for size in arrays:
        memory = torch.randn(size // 4, device=device)  # float32
        for way, read in _reads(memory, dtype):
            reads[f"{way}, {size / MIB:.0f} MiB"] = size / _seconds(read, device)
        target = torch.empty_like(memory)
        copies[f"{size / MIB:.0f} MiB"] = 2 * size / _seconds(partial(target.copy_, memory), device)
        del memory, target
    rates = {}
    for n in products:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _seconds(partial(torch.matmul, a, b, out=out), device)
        rates[f"{n} x {n} x {n}"] = 2 * n**3 / seconds
    best = {name: max(found, key=found.__getitem__) for name, found in
            (("read", reads), ("copy", copies), ("matrix", rates))}  # fmt: skip
    return Ceilings(
        **asdict(key),
        read_bytes_per_s=reads[best["read"]],
        copy_bytes_per_s=copies[best["copy"]],
        matrix_flop_per_s=rates[best["matrix"]],
        matrix_dtype=str(dtype).removeprefix("torch."),
        ways=best,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fitting(arrays: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """Those of which two, and a copy in the other dtype, fit free memory."""
    if device.type == "cpu":
        return arrays
    free, _ = torch.cuda.mem_get_info()
    fitting = tuple(size for size in arrays if 3 * size < free)
    if not fitting:
        raise InputError(f"The GPU has {free / MIB:.0f} MiB free, too little to measure its ceilings.")
    return fitting


def _reads(memory: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to read all of `memory` [n] float32 once and write next to nothing."""
    yield "sum", partial(torch.sum, memory)
    rows = memory.view(-1, ROW)
    yield "sum of rows", partial(torch.sum, rows, -1)
    # The same values twice in half the width: the bits of random float32 are no random bfloat16.
    narrow = memory if dtype == torch.float32 else memory.to(dtype).repeat(2)
    matrix, vector = narrow.view(-1, ROW), narrow[:ROW].clone()
    yield f"{str(dtype).removeprefix('torch.')} matrix times vector", partial(torch.mv, matrix, vector)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median time of one call, on the device's own clock."""
    on_gpu = device.type == "cuda"
    deadline = time.perf_counter() + WARMUP_S
    while time.perf_counter() < deadline:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        times = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    # All are queued before the first one ends, so that no gap of the host is in them.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPETITIONS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))
