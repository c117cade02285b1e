"""CUDA event probes on a GPU: a small model, eager and captured in a graph, with a known delay in one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines.base import NO_LAYER, WHOLE_LAYER, Site, TraceUnsupported, hook
from harness.instruments.events import EventProbe, GraphEventProbe
from harness.instruments.probe import Instrument, StepTrace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HIDDEN = 2048
SLEEP_CYCLES = 200_000
SLOW = 1
REPEATS = 9


class Layer(nn.Module):
    """Two matrix products, and a kernel that does nothing for `sleep_cycles` clock cycles."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.sleep_cycles = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.sleep_cycles:
            torch.cuda._sleep(self.sleep_cycles)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Model(nn.Module):
    """What engines capture: embedding, three layers, norm; the head runs outside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, HIDDEN)
        self.layers: Any = nn.ModuleList([Layer() for _ in range(3)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 512, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Every module that is timed, with its place."""
        sites: list[tuple[Site, nn.Module]] = []
        for i, layer in enumerate(self.layers):
            sites += [(Site(i, WHOLE_LAYER, WHOLE_LAYER), layer), (Site(i, "mlp", "gate_up_proj"), layer.up)]
        outside = [("embed", "embed", self.embed), ("head", "final_norm", self.norm), ("head", "lm_head", self.head)]
        return sites + [(Site(NO_LAYER, block, op), module) for block, op, module in outside]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().to("cuda", torch.bfloat16).eval()


def _capture(model: Model, rows: int) -> tuple[torch.cuda.CUDAGraph, Callable[[], None]]:
    """The graph for `rows` tokens, and a step that replays it and runs the head behind it."""
    tokens = torch.randint(512, (rows,), device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            model.head(model(tokens))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        hidden = model(tokens)

    def step(inputs: Tensor = tokens) -> None:  # the graph reads them at each replay: they must stay alive
        graph.replay()
        with torch.no_grad():
            model.head(hidden)

    return graph, step


def _trace(probe: Instrument, step: Callable[[], None], batch: int) -> tuple[StepTrace, float]:
    """One step's trace, and its GPU time in us from two events of our own, both put behind work that hides the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    probe.start_step("decode", "decode", batch, batch)
    torch.cuda._sleep(2_000_000)
    begin.record()
    step()
    end.record()
    trace = probe.finish_step()
    return trace, begin.elapsed_time(end) * 1e3


def _layer_us(probe: Instrument, step: Callable[[], None], batch: int) -> list[float]:
    """Median time of each whole layer."""
    traces = [_trace(probe, step, batch)[0] for _ in range(REPEATS)]
    times = [[i.latency_us for i in t.intervals if i.op == WHOLE_LAYER] for t in traces]
    return torch.tensor(times).median(dim=0).values.tolist()


def _sleep_us() -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        torch.cuda._sleep(2_000_000)
        begin.record()
        torch.cuda._sleep(SLEEP_CYCLES)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[REPEATS // 2]


def test_graph_intervals_add_up_to_the_step(model: Model) -> None:
    probe = GraphEventProbe()
    hook(model.sites(), probe)
    steps = {rows: _capture(model, rows)[1] for rows in (8, 4)}
    for batch in (7, 3):
        step = steps[8 if batch == 7 else 4]
        _trace(probe, step, batch)
        trace, gpu_us = _trace(probe, step, batch)
        assert trace.mode == "graph"
        names = [(i.layer_index, i.op) for i in trace.intervals]
        assert names == [(-1, "embed"), *((n, "layer") for n in range(3)), (-1, "final_norm"), (-1, "lm_head")]
        assert sum(i.latency_us for i in trace.intervals) == pytest.approx(gpu_us, rel=0.05)
        assert trace.gpu_us == pytest.approx(gpu_us, rel=0.05)


@pytest.mark.parametrize("kind", ["graph", "eager"])
def test_a_delay_shows_in_its_layer_only(model: Model, kind: str) -> None:
    probe: Instrument = GraphEventProbe() if kind == "graph" else EventProbe()
    hook(model.sites(), probe)
    times = []
    for cycles in (0, SLEEP_CYCLES):
        model.layers[SLOW].sleep_cycles = cycles
        graph_step = _capture(model, 8)[1]
        tokens = torch.zeros(8, dtype=torch.long, device="cuda")
        step = graph_step if kind == "graph" else partial(torch.no_grad()(model), tokens)
        times.append(_layer_us(probe, step, 8))
    added_us = [slow - fast for fast, slow in zip(*times, strict=True)]
    sleep_us = _sleep_us()
    assert added_us[SLOW] == pytest.approx(sleep_us, rel=0.10)
    assert all(abs(us) < 0.10 * sleep_us for layer, us in enumerate(added_us) if layer != SLOW)


def test_eager_ops_lie_inside_their_layers(model: Model) -> None:
    probe = EventProbe()
    hook(model.sites(), probe)
    tokens = torch.zeros(8, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(tokens)
        trace, gpu_us = _trace(probe, lambda: model(tokens), 8)
    layers = {i.layer_index: i for i in trace.intervals if i.op == WHOLE_LAYER}
    ops = [i for i in trace.intervals if i.op == "gate_up_proj"]
    assert len(layers) == len(ops) == 3
    for op in ops:
        assert layers[op.layer_index].start_us <= op.start_us
        assert 0 < op.latency_us < layers[op.layer_index].latency_us
    assert trace.gpu_us is not None and trace.gpu_us <= gpu_us * 1.05


def test_prefill_is_eager_and_a_foreign_graph_is_refused(model: Model) -> None:
    bare = _capture(model, 8)[0]
    probe = GraphEventProbe()
    hook(model.sites(), probe)
    step = _capture(model, 8)[1]
    with pytest.raises(TraceUnsupported, match="No graph with events"):
        _trace(probe, bare.replay, 8)  # ours was never replayed
    assert _trace(probe, step, 8)[0].mode == "graph"
    with pytest.raises(TraceUnsupported, match="No graph with events"):
        _trace(probe, bare.replay, 8)  # ours was, but not in this step
    tokens = torch.zeros(64, dtype=torch.long, device="cuda")
    with torch.no_grad():
        assert _trace(probe, lambda: model(tokens), 1)[0].mode == "eager"
