"""Kernels of real engines on a GPU: places against markers around each module, and a known delay in one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from engines.base import WHOLE_LAYER, Site
from harness.attribution import attribute
from harness.config import compose
from harness.engine_classes import start_engine
from harness.instruments.kernels import KernelProbe, KernelSample, read
from harness.limits import Work, device_of, engine_config
from harness.passes import ShapeSteps
from harness.weights import resolve
from harness.workloads import Prompts, Shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = 3
SHAPES = [Shape("prefill", 1, 512), Shape("decode", 1, 128), Shape("decode", 32, 128)]
SAMPLES = 5
SLEEP_CYCLES = 40_000  # about 20 us
SLOW = 1


class Markers:
    """A range of the profiler around each site."""

    def __init__(self) -> None:
        self.open: list[Any] = []

    def wants(self, site: Site) -> bool:
        return site.op != WHOLE_LAYER

    def begin(self, site: Site, rows: int) -> None:
        self.open.append(record_function(f"site {site.layer_index} {site.block} {site.op}"))
        self.open[-1].__enter__()

    def end(self, site: Site) -> None:
        self.open.pop().__exit__(None, None, None)


@pytest.fixture(scope="module", params=["nano", "fused"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    overrides = [
        f"engine={request.param}", f"model.num_layers={LAYERS}", "workload.prefill=[[1,512]]",
        "workload.decode=[[32,128]]", "limits.gpu_memory_utilization=0.3",
    ]  # fmt: skip
    config = compose(overrides)
    device = device_of(config.device)
    checked = engine_config(config, Work.of(config, device), Path(), device)
    weights = resolve(config.model, "random", 0)
    started = start_engine(config.engine.target, replace(checked, checkpoint=weights.path))
    yield started
    started.close()


def steps_of(engine: Any, instrument: Any = None) -> ShapeSteps:
    return ShapeSteps(engine, Prompts(151_936, 1), 0.6, instrument)


def recorded(engine: Any, shape: Shape) -> list[KernelSample]:
    probe = KernelProbe()
    source = steps_of(engine, probe).samples(shape)
    for _ in range(2):
        next(source)
    with probe.window():
        for _ in range(SAMPLES):
            next(source)
    source.close()
    return [read([step], LAYERS, True, "graph") for step in probe.steps]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_are_the_markers_sites(engine: Any, shape: Shape) -> None:
    """In eager steps, where a kernel's launch lies inside the range of its module."""
    engine.attach(Markers(), "eager")
    try:
        source = steps_of(engine).samples(shape)
        for _ in range(2):
            next(source)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
            next(source)
            torch.cuda.synchronize()
        source.close()
    finally:
        engine.detach()
    events = [e for e in found.events() if not (e.is_user_annotation and e.device_type == DeviceType.CUDA)]
    on_gpu = sorted((e for e in events if e.device_type == DeviceType.CUDA), key=lambda e: e.time_range.start)
    calls = {e.id: e.time_range.start for e in events if e.name.startswith(("cuda", "cuL"))}
    ranges = [e for e in events if e.name.startswith("site ")]
    assert len(on_gpu) > 4 * LAYERS
    sites = attribute([e.name for e in on_gpu], LAYERS, True)
    marked = 0
    for kernel, site in zip(on_gpu, sites, strict=True):
        launch = calls[kernel.id]
        true = [r.name for r in ranges if r.time_range.start <= launch <= r.time_range.end]
        assert site is not None
        if true:
            _, layer, block, op = true[0].split()
            if "tile_stats" in kernel.name:  # the sampler's, also where the head's module launches it
                assert block in ("head", "sample") and site.block == "sample"
            else:  # a module may launch several kernels, each of which does a part of its operation
                assert (str(site.layer_index), site.block) == (layer, block), kernel.name
                assert set(site.op.split("+")) <= set(op.split("+")), kernel.name
            marked += 1
    assert marked > 4 * LAYERS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_as_they_are_timed_close(engine: Any, shape: Shape) -> None:
    samples = recorded(engine, shape)
    assert len(samples) == SAMPLES
    assert len({s.sequence for s in samples}) == 1
    for sample in samples:
        assert sample.attributed >= 0.98
        assert 0.98 <= sample.closure <= 1.02
        assert sum(i.op == WHOLE_LAYER for i in sample.trace.intervals) == LAYERS


def test_a_delay_in_a_graph_shows_in_its_layer_only(engine: Any) -> None:
    """Graphs are captured anew with a delay before layer 1."""
    runner, shape = engine.runner, Shape("decode", 1, 128)
    fast = layer_us(recorded(engine, shape))
    handle = runner.model.layers[SLOW].register_forward_pre_hook(lambda *_: torch.cuda._sleep(SLEEP_CYCLES))
    plain = runner.graphs
    try:
        runner.graphs = runner._capture()
        slow_samples = recorded(engine, shape)
    finally:
        handle.remove()
        runner.graphs = plain
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    begin.record()
    for _ in range(10):
        torch.cuda._sleep(SLEEP_CYCLES)
    end.record()
    torch.cuda.synchronize()
    sleep_us = begin.elapsed_time(end) * 1e3 / 10
    added_us = [after - before for before, after in zip(fast, layer_us(slow_samples), strict=True)]
    assert added_us[SLOW] == pytest.approx(sleep_us, rel=0.10)
    assert all(abs(us) < 0.10 * sleep_us for layer, us in enumerate(added_us) if layer != SLOW)


def layer_us(samples: list[KernelSample]) -> list[float]:
    """Median time of each whole layer."""
    times = [[i.latency_us for i in s.trace.intervals if i.op == WHOLE_LAYER] for s in samples]
    return torch.tensor(times).median(dim=0).values.tolist()
