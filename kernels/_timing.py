"""How the tuners check and time what may run in a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels._triton import HAVE_TRITON, triton

REPLAYS = 11
CANNOT_RUN: tuple[type[Exception], ...] = (RuntimeError,)  # the driver's refusals
if HAVE_TRITON:
    CANNOT_RUN += (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError)


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


def time_graph_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Median µs of one replay of the calls, captured as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) * 1000
