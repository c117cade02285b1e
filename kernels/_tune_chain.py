"""The layers of a decode step as one graph, for `python -m kernels.tune`: where its launches are chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels._timing import CANNOT_RUN, time_graph_us
from kernels._tune_attention import Contexts
from kernels._tune_products import Bench, HeadBench, is_tiled
from kernels.decode_linear import decode_linear_half_norm
from kernels.decode_linear_tiled import HalfNormed

Launches = dict[str, Any]
"""How a step's ops are launched, by name; None is cuBLAS with separate kernels."""
PAIRS = (("o", "gate_up"), ("down", "qkv"))
"""Products with a norm between them, of which the tiled kernel can make half in the first, half in the second."""

CAPTURES = 3
"""Of the same launches: the slowest counts, or a choice would rest on the luck of one."""


def in_halves(launches: Launches, first: str, second: str) -> bool:
    """Whether the norm between these two products is made in halves."""
    return is_tiled(launches[first]) and launches[first].halves and is_tiled(launches[second])


class Chain:
    """All layers of a decode step for some rows and contexts, and the head where it is measured: all but embedding and
    sampling. `launches` of its methods name the four products, attention, and the head if there is one."""

    def __init__(self, benches: dict[str, Bench], contexts: Contexts, head: HeadBench | None) -> None:
        """`benches` of the four products, for as many layers as `contexts` has."""
        self.benches, self.contexts, self.head = benches, contexts, head
        self.hidden = torch.randn(contexts.rows, benches["qkv"].op.k, device=contexts.device).bfloat16()
        self.temperatures = torch.full((contexts.rows,), 0.6, device=contexts.device)

    def calls(self, launches: Launches) -> list[Callable[[], Any]]:
        """The step layer by layer, in order."""
        carried: list[HalfNormed | None] = [None]
        last = len(self.contexts.caches) - 1

        def layer(i: int) -> None:
            # As in the engine, nothing makes half of the first layer's norm, and nothing takes one from the last.
            qkv = self._product("qkv", launches, carried[0] if i > 0 else None, i)
            attended = self.contexts.attend(qkv, self.contexts.caches[i], launches["attention"])
            half = self._added("o", launches, attended, i, "gate_up")
            inter = self._product("gate_up", launches, half, i)
            carried[0] = self._added("down", launches, inter, i, "qkv" if i < last else None)

        layers = [partial(layer, i) for i in range(last + 1)]
        return [*layers, partial(self._run_head, launches)] if self.head else list(layers)

    def _product(self, name: str, launches: Launches, half: HalfNormed | None, i: int) -> Tensor:
        """Of the residual stream, whose norm may be half made."""
        bench = self.benches[name]
        if half is not None:
            return bench.rest(half, bench.weights[i], launches[name])
        return bench.whole(self.hidden, bench.weights[i], launches[name], self.hidden)

    def _added(self, name: str, launches: Launches, x: Tensor, i: int, following: str | None) -> HalfNormed | None:
        """Adds to the residual stream; half of the norm before the product that follows, where that is the way."""
        bench, launch = self.benches[name], launches[name]
        if following and in_halves(launches, name, following):
            gamma = self.benches[following].gamma
            return decode_linear_half_norm(x, bench.weights[i], self.hidden, gamma, dependent=True, launch=launch)
        bench.whole(x, bench.weights[i], launch, self.hidden)
        return None

    def _run_head(self, launches: Launches) -> None:
        assert self.head is not None
        self.head.x, self.head.temperatures = self.hidden, self.temperatures
        self.head.whole(launches["head"])

    def time_us(self, launches: Launches) -> float:
        """Of one step; infinity, and a line that says why, where the GPU cannot run it."""
        self.hidden.normal_()
        calls = self.calls(launches)
        try:
            for call in calls:  # compiles and loads what follows what only here, which a capture may not do
                call()
            return time_graph_us(calls, CAPTURES)
        except CANNOT_RUN as reason:
            print(f"{self.contexts.rows:5} chain cannot run, {type(reason).__name__}: {launches}", flush=True)
            return float("inf")
