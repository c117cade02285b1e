"""How the tuners check and time what may run in a captured graph."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels._triton import HAVE_TRITON, triton

REPLAYS = 11
CANNOT_RUN: tuple[type[Exception], ...] = (RuntimeError,)  # the driver's refusals
TOO_LARGE: tuple[type[Exception], ...] = ()
if HAVE_TRITON:
    TOO_LARGE += (triton.runtime.errors.OutOfResources,)
    CANNOT_RUN += (*TOO_LARGE, triton.runtime.errors.PTXASError, triton.CompilationError)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the error over norm of the expected."""
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def poisoned(call: Callable[[], Any]) -> Any:
    """The call's result, where every torch.empty in it was full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


class Bench(Protocol):
    """Data to try launches on."""

    def error(self, launch: Any) -> float:
        """Relative error of all that a launch writes; NaN where it left something unwritten."""


def checked(bench: Bench, launch: Any, where: str, tolerance: float, failures: list[str] | None = None) -> bool:
    """Whether the launch runs and is right. What is not is named, and what is wrong added to `failures`."""
    try:
        error = bench.error(launch)
    except TOO_LARGE:  # some of the candidates are meant for larger GPUs
        return False
    except CANNOT_RUN as reason:
        print(f"{where} left out, {type(reason).__name__}: {launch}", flush=True)
        return False
    if error < tolerance:  # NaN is not
        return True
    told = f"{where} {launch}: relative error {error:.3g}"
    print("WRONG", told, flush=True)
    if failures is not None:
        failures.append(told)
    return False


@contextmanager
def beside_another(device: torch.device) -> Iterator[None]:
    """Inside the `with` block another process has a context on the GPU, and nothing to do there.

    It takes no time itself, but can decide which of its possible paces a chain of dependent kernels runs at.
    """
    if device.type != "cuda":
        yield
        return
    idle = "import sys, torch; torch.zeros(1, device=sys.argv[1]); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", idle, f"cuda:{device.index or 0}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        gone = "the process that was to stand by on the GPU has ended."
        if not other.stdout.readline():
            raise RuntimeError(gone)
        yield
        if other.poll() is not None:
            raise RuntimeError(gone)
    finally:
        other.kill()
        other.communicate()


def time_graph_us(calls: Sequence[Callable[[], Any]], captures: int = 1) -> float:
    """Median µs of one replay of the calls, captured as a graph; the slowest of so many captures.

    Programs of dependent kernels take the room that the kernel before leaves them, and which multiprocessors that is
    can differ from one capture of the same calls to the next, and stay so for as long as the graph lives.
    """
    graphs = [_captured(calls) for _ in range(captures)]  # kept, or the next would take the place of the last
    return max(_replay_us(graph) for graph in graphs)


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) * 1000
