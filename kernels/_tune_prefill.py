"""Times prefill's products with their ends, beside cuBLAS and the separate kernels, for `python -m kernels.tune`.

Candidates are compiled first, by many processes, into Triton's cache. Each is checked against the reference (its
outputs full of NaN before), then timed as a captured graph over as many weight matrices as the model has layers, on
random data. What cannot be compiled or is wrong is named and left out, what does not fit the GPU left out.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import prefill_gate_up, prefill_qkv_rope, qk_norm_rope_cache, silu_mul
from kernels._timing import checked, poisoned, relative_error, time_graph_us
from kernels._tune_models import Model
from kernels.prefill_gate_up import reference as gate_up_reference
from kernels.prefill_linear import Launch, shape_key
from kernels.prefill_qkv_rope import fits
from kernels.prefill_qkv_rope import reference as qkv_reference

ROWS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_ROWS = (1024,)
SHOWN = 5
"""Of the fastest launches of an op and number of rows, so many are printed."""
COMPILED_ROWS = 256
"""A kernel is the same for all numbers of rows."""
BLOCK_SIZE = 256
EPS = 1e-6
MAX_POSITION = 4096
TOLERANCE = 1e-2
WORKERS = 14

# Sums of 64 or 128 registers a thread, and 64 to 256 columns to an instruction. Tiles large enough to feed the tensor
# cores leave room for one program on a multiprocessor, whose end nothing overlaps but the loads for its next tile; of
# half as large ones there are two, each at work while the other ends, and fewer multiprocessors idle in the last round.
GATE_UP = (
    Launch(128, 128, 64, 8, 3),
    Launch(128, 128, 64, 8, 4),
    Launch(128, 128, 64, 8, 4, pieces=2),
    Launch(128, 128, 64, 8, 4, group_m=16, pieces=2),
    Launch(128, 128, 64, 8, 4, per_sm=0),
    Launch(128, 128, 128, 8, 2, pieces=2),
    Launch(128, 64, 64, 8, 4),
    Launch(128, 64, 64, 4, 3, per_sm=2, pieces=2),
    Launch(128, 64, 64, 4, 3, per_sm=0),
    Launch(64, 128, 64, 4, 4),
    Launch(64, 128, 64, 4, 2, per_sm=2),
    Launch(64, 128, 64, 4, 2, per_sm=0),
    Launch(64, 128, 32, 4, 4, per_sm=2),
    Launch(64, 64, 64, 4, 3, per_sm=0),
)
QKV = (
    Launch(128, 256, 64, 8, 3),
    Launch(128, 256, 64, 8, 4),
    Launch(128, 256, 64, 8, 3, group_m=16),
    Launch(128, 256, 64, 8, 3, per_sm=0),
    Launch(128, 256, 64, 8, 4, per_sm=0),
    Launch(128, 128, 64, 8, 4),
    Launch(128, 128, 64, 8, 4, per_sm=0),
    Launch(64, 256, 64, 4, 2, per_sm=2),
    Launch(64, 256, 64, 4, 2, per_sm=0),
    Launch(64, 256, 32, 4, 4, per_sm=2),
    Launch(64, 128, 64, 4, 4, per_sm=2),
    Launch(64, 128, 64, 4, 3, per_sm=0),
)


def random_weights(layers: int, out: int, k: int, device: torch.device) -> list[Tensor]:
    """As many matrices as there are layers, so that the L2 does not hold them."""
    return [torch.randn(out, k, device=device).mul_(k**-0.5).bfloat16() for _ in range(layers)]


class Bench(ABC):
    """Random data of one product with its end, and the ways to run them."""

    weights: list[Tensor]
    expected: tuple[Tensor, ...]

    @abstractmethod
    def fused(self, launch: Launch, weight: Tensor) -> Any:
        """In one kernel."""

    @abstractmethod
    def written(self, call: Callable[[], Any]) -> tuple[Tensor, ...]:
        """All that a call writes, and NaN where it does not."""

    def error(self, launch: Launch) -> float:
        """Sum of the relative errors of all that a launch writes: max() would lose a NaN."""
        written = self.written(partial(self.fused, launch, self.weights[0]))
        return sum(relative_error(ours, theirs) for ours, theirs in zip(written, self.expected, strict=True))

    def time_us(self, call: Callable[[Tensor], Any]) -> float:
        """µs per call over all weights in turn."""
        return time_graph_us([partial(call, weight) for weight in self.weights]) / len(self.weights)


class GateUp(Bench):
    """Of one model's gate and up projections."""

    kernel, name = "prefill_gate_up", "gate_up_proj+silu_mul"
    beside = "cuBLAS + silu_mul"

    def __init__(self, model: Model, layers: int, device: torch.device) -> None:
        self.out, self.k, self.device = 2 * model.inter, model.hidden, device
        self.weights = random_weights(layers, self.out, self.k, device)
        self.candidates = GATE_UP

    def prepare(self, rows: int) -> None:
        """Fresh x, and what the first weights make of it."""
        self.x = torch.randn(rows, self.k, device=self.device).bfloat16()
        self.expected = (gate_up_reference(self.x, self.weights[0]),)

    def fused(self, launch: Launch, weight: Tensor) -> Any:
        return prefill_gate_up(self.x, weight, launch, dependent=True)

    def apart(self, weight: Tensor) -> Any:
        """As the engine runs it where nothing is chosen."""
        return silu_mul(F.linear(self.x, weight), dependent=True)

    def written(self, call: Callable[[], Any]) -> tuple[Tensor, ...]:
        return (poisoned(call),)


class QkvRope(Bench):
    """Of the QKV projection; keys and values are wanted apart from the cache too, as of new prompts."""

    kernel, name = "prefill_qkv_rope", "qkv_proj+qk_norm+rope+kv_write"
    beside = "cuBLAS + qk_norm_rope_cache"

    def __init__(self, model: Model, layers: int, device: torch.device) -> None:
        self.heads = (model.heads, model.kv_heads, model.head_dim)
        self.out, self.k, self.device = (model.heads + 2 * model.kv_heads) * model.head_dim, model.hidden, device
        self.weights = random_weights(layers, self.out, self.k, device)
        self.candidates = tuple(launch for launch in QKV if fits(launch, *self.heads))
        self.gammas = torch.rand(2, model.head_dim, device=device).add_(0.5).bfloat16()
        angle = torch.rand(MAX_POSITION, model.head_dim // 2, device=device) * 6
        self.cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)

    def prepare(self, rows: int) -> None:
        """Fresh x, prompts' positions and slots, and what the first weights make of them."""
        _, kv_heads, head_dim = self.heads
        self.x = torch.randn(rows, self.k, device=self.device).bfloat16()
        blocks = -(-rows // BLOCK_SIZE)
        size = (2, blocks, BLOCK_SIZE, kv_heads, head_dim)
        self.caches = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        self.positions = torch.arange(rows, device=self.device, dtype=torch.int32) % MAX_POSITION
        slots = torch.arange(blocks * BLOCK_SIZE, device=self.device, dtype=torch.int32).view(blocks, BLOCK_SIZE)
        self.slots = slots[torch.randperm(blocks)].flatten()[:rows].contiguous()
        result: Any = qkv_reference(self.x, self.weights[0], **self._behind())
        self.expected = (*result, self._cached())

    def _behind(self) -> dict[str, Any]:
        """What the arguments of both ways have in common."""
        heads, kv_heads, head_dim = self.heads
        return {
            "q_weight": self.gammas[0], "k_weight": self.gammas[1], "cos_sin": self.cos_sin,
            "positions": self.positions, "slot_mapping": self.slots, "k_cache": self.caches[0],
            "v_cache": self.caches[1], "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "eps": EPS,
            "return_kv": True,
        }  # fmt: skip

    def fused(self, launch: Launch, weight: Tensor) -> Any:
        return prefill_qkv_rope(self.x, weight, **self._behind(), launch=launch, dependent=True)

    def apart(self, weight: Tensor) -> Any:
        """As the engine runs it where nothing is chosen."""
        return qk_norm_rope_cache(F.linear(self.x, weight), **self._behind(), dependent=True)

    def written(self, call: Callable[[], Any]) -> tuple[Tensor, ...]:
        """q, k, v and the cache's slots, and NaN where the call does not write."""
        self.caches.fill_(float("nan"))
        result = poisoned(call)
        return (*result, self._cached())

    def _cached(self) -> Tensor:
        return self.caches.flatten(1, 2)[:, self.slots.long()]


OPS: dict[str, type[GateUp] | type[QkvRope]] = {"gate_up": GateUp, "qkv": QkvRope}


def time_candidates(
    bench: GateUp | QkvRope, rows: int, deadline: float, failures: list[str]
) -> list[tuple[float, Launch]]:
    """Those that run and are right, the fastest first; `failures` gets what is wrong."""
    found = []
    for i, launch in enumerate(bench.candidates):
        if time.perf_counter() > deadline:
            print(f"{rows:6} {bench.name}: no time for {len(bench.candidates) - i} candidates")
            break
        if checked(bench, launch, f"{bench.name} rows {rows}", TOLERANCE, failures):
            found.append((bench.time_us(partial(bench.fused, launch)), launch))
    return sorted(found, key=lambda timed: timed[0])


def measure(bench: GateUp | QkvRope, rows: int, deadline: float, failures: list[str]) -> dict[str, Any]:
    """Print the fastest launches for so many rows; the entry for the table of choices, empty where none was timed."""
    bench.prepare(rows)
    tflop = 2 * rows * bench.out * bench.k / 1e12
    apart_us = bench.time_us(bench.apart)
    product_us = bench.time_us(partial(F.linear, bench.x))
    print(
        f"{rows:6} {bench.name}: {bench.beside} {apart_us:.1f} µs, of which the product {product_us:.1f} "
        f"({tflop / product_us * 1e6:.0f} TFLOP/s)"
    )
    found = time_candidates(bench, rows, deadline, failures)
    for us, launch in found[:SHOWN]:
        print(f"{us:14.1f} µs {us / apart_us:5.2f} {tflop / us * 1e6:5.0f} TFLOP/s  {brief(launch)}", flush=True)
    beside = {"cublas_us": round(apart_us, 2)}
    if not found:
        return {}  # nothing is known
    if found[0][0] >= apart_us:
        return {"path": "cublas"} | beside
    us, launch = found[0]
    return {"launch": asdict(launch), "us": round(us, 2)} | beside


def brief(launch: Launch) -> str:
    """A launch in one line."""
    return " ".join(f"{name}={value}" for name, value in asdict(launch).items())


def _compile(jobs: list[tuple[str, Model, Launch]]) -> None:
    """In a process of its own: launch each job once, which leaves its kernel in Triton's cache."""
    benches: dict[str, GateUp | QkvRope] = {}
    for name, model, launch in jobs:
        if name not in benches:
            benches[name] = OPS[name](model, 1, torch.device("cuda"))
            benches[name].prepare(COMPILED_ROWS)
        with suppress(Exception):  # found again, and named, when it is timed
            benches[name].fused(launch, benches[name].weights[0])
    torch.cuda.synchronize()


def compile_all(model: Model, benches: dict[str, GateUp | QkvRope]) -> int:
    """Fill Triton's cache from several processes at once; how many kernels were asked for."""
    jobs = [(name, model, launch) for name, bench in benches.items() for launch in bench.candidates]
    workers = min(WORKERS, len(jobs), max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, [jobs[i::workers] for i in range(workers)], chunksize=1)
    return len(jobs)


def measured(
    model: Model, device: torch.device, rows: Sequence[int], seconds: float, failures: list[str]
) -> dict[str, dict[str, Any]]:
    """Print what runs fastest; the entries for the table of choices, by kernel and shape.

    `failures` gets what is wrong.
    """
    start = time.perf_counter()
    benches = {name: kind(model, model.layers, device) for name, kind in OPS.items()}
    print(
        f"{compile_all(model, benches)} kernels of prefill compiled in {time.perf_counter() - start:.0f} s", flush=True
    )
    table: dict[str, dict[str, Any]] = {}
    for count in rows:
        for bench in benches.values():
            if entry := measure(bench, count, start + seconds, failures):
                table.setdefault(bench.kernel, {})[shape_key(bench.out, bench.k, count)] = entry
    return table
