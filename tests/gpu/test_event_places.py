"""A delay planted into one layer of captured decode steps shows in that layer's rows, no other's, and in the step."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from statistics import median
from typing import Any

import pytest
import torch

from engines.base import WHOLE_LAYER, EngineConfig, Site
from harness import tables
from harness.config import compose
from harness.engine_classes import start_engine
from harness.instruments.events import GraphEventProbe
from harness.passes import ShapeSteps
from harness.weights import resolve
from harness.workloads import Prompts, Shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS, SLOW = 3, 1
SHAPE = Shape("decode", 4, 128)
SAMPLES = 61
SLEEP_CYCLES = 40_000  # about 20 us
HEAD_START_CYCLES = 4_000_000
"""About 2 ms, for engines that sample outside of the graph to launch that meanwhile. Else a short graph may end sooner,
and the GPU then waits for the host less by as long as the delay is: it would not show in the step."""
OPTIONS: dict[str, dict[str, Any]] = {"nano": {}, "fused": {}, "vllm": {"arm": "eager"}}  # the arm that starts fastest


class DelayingProbe(GraphEventProbe):
    """Its graphs hold a kernel that spins, right behind the event at which layer SLOW begins.

    A long one before the embedding, where a graph begins with one, keeps the host ahead.
    """

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.cycles = cycles

    def begin(self, site: Site, rows: int) -> None:
        super().begin(site, rows)
        if not self._is_capturing():
            return
        if site.op == "embed":
            torch.cuda._sleep(HEAD_START_CYCLES)
        elif self.cycles and (site.layer_index, site.op) == (SLOW, WHOLE_LAYER):
            torch.cuda._sleep(self.cycles)


@pytest.fixture(scope="module", params=OPTIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    name = request.param
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    conf = compose([f"engine={name}", f"model.num_layers={LAYERS}"])
    config = EngineConfig(
        resolve(conf.model, "random", 0).path, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=2048,
        gpu_memory_utilization=0.1, kv_cache_tokens=8192, options=OPTIONS[name],
    )  # fmt: skip
    started = start_engine(conf.engine.target, config)
    yield started
    started.close()


def traced_us(engine: Any, cycles: int) -> tuple[list[float], float]:
    """Medians of each layer's rows, and of the step's after its embedding, where the head start is."""
    probe = DelayingProbe(cycles)
    engine.attach(probe, "graph")
    try:
        with closing(ShapeSteps(engine, Prompts(10_000, 1), 0.6, probe).samples(SHAPE)) as source:
            next(source)
            steps, layers = tables.traced_rows(engine, SHAPE, list(islice(source, SAMPLES)), "graph")
    finally:
        engine.detach()
    assert {row["mode"] for row in (*steps, *layers)} == {"graph"}
    rows = [row for row in layers if row["op"] == WHOLE_LAYER]
    whole = [[row["latency_us"] for row in rows if row["layer_index"] == n] for n in range(LAYERS)]
    assert [len(times) for times in whole] == [SAMPLES] * LAYERS
    embed_us = [row["latency_us"] for row in layers if row["op"] == "embed"] or [0.0] * len(steps)
    rest_us = [row["gpu_us"] - us for row, us in zip(steps, embed_us, strict=True)]
    return [median(times) for times in whole], median(rest_us)


def sleep_us() -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(9):
        torch.cuda._sleep(2_000_000)
        begin.record()
        for _ in range(10):
            torch.cuda._sleep(SLEEP_CYCLES)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 10)
    return median(times)


def test_a_delay_in_a_graph_shows_in_its_layer_and_in_the_step(engine: Any) -> None:
    (fast, fast_step), (slow, slow_step) = traced_us(engine, 0), traced_us(engine, SLEEP_CYCLES)
    expected_us = sleep_us()
    added_us = [after - before for before, after in zip(fast, slow, strict=True)]
    print(f"{engine.name}: {expected_us:.2f} us planted; layers {added_us}, step {slow_step - fast_step:.2f}")
    assert added_us[SLOW] == pytest.approx(expected_us, rel=0.10)
    assert all(abs(us) < 0.10 * expected_us for layer, us in enumerate(added_us) if layer != SLOW)
    assert slow_step - fast_step == pytest.approx(expected_us, rel=0.10)
