"""Calls over all rotations in turn, timed as a whole: a captured graph on a GPU, a loop without.

A graph holds many calls, so that its own launch, some microseconds, does not count; each call finds its inputs and
weights gone from the L2, because the rotations together are several times as large.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from harness.ops.products import Operands
from harness.ops.variants import Call
from harness.roofline.costs import Cost

CACHE_FACTOR = 2.5
"""Rotations hold so many times the L2: what one call leaves there is gone before its buffers' next turn."""
MAX_ROTATIONS = 64
GRAPH_US = 500.0
"""Least time of a graph: two events and its launch, some 3 us, are then under 1 % of it."""
FASTEST_BYTES_PER_S, FASTEST_FLOP_PER_S = 8e12, 2e15
"""No GPU of today is faster, so that a graph of GRAPH_US by these takes at least so long."""
LEAST_US = 2.0
"""No kernel with its start and end is faster."""
MAX_CALLS = 512


def rotations_for(cost: Cost, cache_bytes: int) -> int:
    """How many sets of buffers a product needs to find the L2 cold; at least 2."""
    return max(2, min(MAX_ROTATIONS, math.ceil(CACHE_FACTOR * cache_bytes / cost.bytes)))


def repeats_for(cost: Cost, rotations: int) -> int:
    """How often a graph goes through all rotations."""
    call_us = max(LEAST_US, cost.floor_us(FASTEST_BYTES_PER_S, FASTEST_FLOP_PER_S))
    most = max(1, MAX_CALLS // rotations)
    return max(1, min(most, math.ceil(GRAPH_US / (rotations * call_us))))


class Graph:
    """A variant's calls as one CUDA graph. `outputs` are those of the first time through the rotations."""

    mode, source = "graph", "cuda_event"

    def __init__(self, call: Call, operands: Operands, repeats: int) -> None:
        self._calls = operands.rotations * repeats
        pairs = list(zip(operands.x, operands.weights, strict=True))
        # Compiled, tuned and allocated before the capture, which takes none of it; the second call may compile again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for x, weight in pairs[:2]:
                call(x, weight)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = [call(x, weight) for x, weight in pairs]
            for _ in range(repeats - 1):
                for x, weight in pairs:
                    call(x, weight)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(self) -> list[Tensor]:
        """Run once over NaN; the outputs."""
        for out in self.outputs:
            out.fill_(float("nan"))
        self._graph.replay()
        torch.cuda.synchronize()
        return self.outputs

    def sample_us(self) -> float:
        """Time of one call: that of the graph over the number of calls in it."""
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3 / self._calls


class Loop:
    """The same on the CPU: calls in a row, by the wall clock."""

    mode, source = "eager", "host"

    def __init__(self, call: Call, operands: Operands, repeats: int) -> None:
        self._call = call
        self._pairs = list(zip(operands.x, operands.weights, strict=True))
        self.run()

    def run(self) -> list[Tensor]:
        return [self._call(x, weight) for x, weight in self._pairs]

    def sample_us(self) -> float:
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) * 1e6 / len(self._pairs)
