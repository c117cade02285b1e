"""Event and host probes, with a pretend GPU: a clock that work moves on, and graphs that record events anew."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from engines.base import NO_LAYER, WHOLE_LAYER, Probe, Site, TraceUnsupported, hook
from harness.instruments.events import EventProbe, GraphEventProbe
from harness.instruments.host import HostProbe
from harness.instruments.nvtx import NvtxProbe
from harness.instruments.probe import Instrument, Interval, StepTrace, Tee

EMBED = Site(NO_LAYER, "embed", "embed")
NORM = Site(NO_LAYER, "head", "final_norm")
HEAD = Site(NO_LAYER, "head", "lm_head")
LAYERS = [Site(i, WHOLE_LAYER, WHOLE_LAYER) for i in range(2)]
QKV = [Site(i, "attention", "qkv_proj") for i in range(2)]
MODEL = [EMBED, LAYERS[0], QKV[0], LAYERS[1], QKV[1], NORM]


Graph: TypeAlias = "list[Event | float]"


class Device:
    """A GPU with one stream: time in us, and either eager work or a graph that collects what to do at replay."""

    def __init__(self) -> None:
        self.now_us = 1000.0
        self.graph: Graph | None = None
        self.created = 0
        self.synced = False

    def event(self, external: bool = False) -> Event:
        self.created += 1
        return Event(self, external)

    def work(self, us: float) -> None:
        if self.graph is None:
            self.now_us += us
        else:
            self.graph.append(us)

    def replay(self, graph: Graph) -> None:
        for node in graph:
            if isinstance(node, Event):
                node.at_us = self.now_us
            else:
                self.now_us += node

    def capturing(self) -> bool:
        return self.graph is not None

    def synchronize(self) -> None:
        self.synced = True


class Event:
    """As `torch.cuda.Event`: an ordinary one must not be recorded in a capture, an external one only there."""

    def __init__(self, device: Device, external: bool) -> None:
        self.device, self.external = device, external
        self.at_us: float | None = None

    def record(self) -> None:
        assert self.external == self.device.capturing()
        if self.device.graph is not None:
            self.device.graph.append(self)
        else:
            self.at_us = self.device.now_us

    def elapsed_time(self, end_event: Event) -> float:
        assert self.device.synced
        if self.at_us is None or end_event.at_us is None:
            raise RuntimeError("both events must be recorded")
        return (end_event.at_us - self.at_us) / 1e3


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def eager(device: Device) -> EventProbe:
    probe = EventProbe(event_factory=device.event, synchronize=device.synchronize)
    assert all(probe.wants(site) for site in MODEL)
    return probe


@pytest.fixture
def graph(device: Device) -> GraphEventProbe:
    probe = GraphEventProbe(
        event_factory=device.event,
        external_factory=lambda: device.event(external=True),
        is_capturing=device.capturing,
        synchronize=device.synchronize,
    )
    assert [probe.wants(s) for s in MODEL] == [True, True, False, True, False, True]
    return probe


def _run(device: Device, probe: Probe, site: Site, us: float, rows: int = 4) -> None:
    probe.begin(site, rows)
    device.work(us)
    probe.end(site)


def _model(device: Device, probe: Probe, rows: int, scale: float = 1.0, embed: bool = True) -> None:
    """Embedding 5 us, layers 10 and 20 us of which 4 is qkv in the eager case, norm 3 us, 1 us between all of them."""
    wanted = [s for s in MODEL if probe.wants(s) and (embed or s != EMBED)]
    times = {EMBED: 5.0, LAYERS[0]: 10.0, LAYERS[1]: 20.0, NORM: 3.0}
    for site in (s for s in MODEL if s in times):
        if site in wanted:
            probe.begin(site, rows)
        inner = [q for q in QKV if q in wanted and site in LAYERS and q.layer_index == site.layer_index]
        for op in inner:
            _run(device, probe, op, 4.0 * scale, rows)
        device.work((times[site] - 4.0 * len(inner)) * scale)
        if site in wanted:
            probe.end(site)
        device.work(1.0)


def _capture(device: Device, probe: Probe, rows: int, **model: Any) -> Graph:
    graph: Graph = []
    device.graph = graph
    _model(device, probe, rows, **model)
    device.graph = None
    return graph


def _rows(trace: StepTrace) -> list[tuple[int, str, float, float]]:
    return [(i.layer_index, i.op, round(i.start_us, 6), round(i.latency_us, 6)) for i in trace.intervals]


def _decode(device: Device, probe: GraphEventProbe, graph: Graph, batch: int, **finish: int) -> StepTrace:
    probe.start_step("decode", "decode", batch, batch)
    device.now_us += 50.0  # the host prepares
    device.replay(graph)
    _run(device, probe, HEAD, 7.0)
    return probe.finish_step(**finish)


def test_all_are_instruments(eager: EventProbe, graph: GraphEventProbe) -> None:
    for probe in (eager, graph, HostProbe(), NvtxProbe(), Tee([HostProbe()])):
        assert isinstance(probe, Instrument)


def test_eager_events_time_layers_and_their_ops(device: Device, eager: EventProbe) -> None:
    eager.start_step("prefill", "prefill", 1, 4)
    device.now_us += 100.0  # the host prepares: not GPU time of the step
    _model(device, eager, 4)
    trace = eager.finish_step()
    assert (trace.mode, trace.source) == ("eager", "cuda_event")
    assert _rows(trace) == [
        (-1, "embed", 100, 5),
        (0, "layer", 106, 10),
        (0, "qkv_proj", 106, 4),
        (1, "layer", 117, 20),
        (1, "qkv_proj", 117, 4),
        (-1, "final_norm", 138, 3),
    ]
    assert trace.gpu_us == pytest.approx(5 + 1 + 10 + 1 + 20 + 1 + 3)


def test_eager_events_are_used_again(device: Device, eager: EventProbe) -> None:
    for _ in range(3):
        eager.start_step("s", "decode", 1, 1)
        _model(device, eager, 1)
        trace = eager.finish_step()
    assert len(trace.intervals) == len(MODEL)
    assert device.created == 1 + 2 * len(MODEL)


def test_eager_ignores_calls_outside_steps_and_forgets_a_broken_step(device: Device, eager: EventProbe) -> None:
    created = device.created
    _model(device, eager, 1)
    assert device.created == created
    eager.start_step("s", "decode", 1, 1)
    eager.begin(LAYERS[0], 1)  # then an exception, and no finish_step
    eager.start_step("s", "decode", 1, 1)
    _model(device, eager, 1)
    assert [i.op for i in eager.finish_step().intervals] == [s.op for s in MODEL]
    assert eager.wants(QKV[0]) and not EventProbe(False, event_factory=device.event).wants(QKV[0])


def test_graph_intervals_run_to_the_next_boundary(device: Device, graph: GraphEventProbe) -> None:
    created = device.created
    _model(device, graph, 8)  # warm-up before the capture
    assert device.created == created
    captured = _capture(device, graph, 8)
    for _ in range(2):
        trace = _decode(device, graph, captured, batch=6)
        assert (trace.mode, trace.source) == ("graph", "cuda_event")
        # The 1 us behind each site counts to it, except behind the last, which ends at its own end.
        assert _rows(trace) == [
            (-1, "embed", 50, 6),
            (0, "layer", 56, 11),
            (1, "layer", 67, 21),
            (-1, "final_norm", 88, 3),
            (-1, "lm_head", 92, 7),
        ]
        assert trace.gpu_us == pytest.approx(49)
    events = [node for node in captured if isinstance(node, Event)]
    assert len(events) == 4 + 2  # begins, and ends where the graph may end: the last layer and the norm


def test_graph_of_the_replayed_bucket_is_read(device: Device, graph: GraphEventProbe) -> None:
    """Buckets are captured one after another, largest first and each after a warm-up, as engines do."""
    captured = {}
    for rows in (8, 4, 2):
        _model(device, graph, rows)
        captured[rows] = _capture(device, graph, rows, scale=rows)
    assert _rows(_decode(device, graph, captured[4], batch=3))[1] == (0, "layer", 71, 41)
    assert _rows(_decode(device, graph, captured[8], batch=8))[1] == (0, "layer", 91, 81)
    # Batch 1 padded to 8 although 2 would do: only the graph that ran in this step counts.
    assert _rows(_decode(device, graph, captured[8], batch=1))[1] == (0, "layer", 91, 81)
    assert _rows(_decode(device, graph, captured[2], batch=1, rows_bucket=2))[1] == (0, "layer", 61, 21)
    with pytest.raises(TraceUnsupported, match="8 rows"):
        _decode(device, graph, captured[2], batch=1, rows_bucket=8)


def test_a_graph_without_events_is_not_read_as_an_older_one(device: Device, graph: GraphEventProbe) -> None:
    old = _capture(device, graph, 8)
    _decode(device, graph, old, batch=8)
    with pytest.raises(TraceUnsupported, match="for 8 rows was replayed"):
        _decode(device, graph, [30.0], batch=8)


def test_graph_captured_anew_replaces_the_first(device: Device, graph: GraphEventProbe) -> None:
    _capture(device, graph, 8)
    again = _capture(device, graph, 8, scale=2.0)
    assert _rows(_decode(device, graph, again, batch=8))[1] == (0, "layer", 61, 21)


def test_graph_without_embedding_or_norm(device: Device) -> None:
    probe = GraphEventProbe(
        event_factory=device.event,
        external_factory=lambda: device.event(external=True),
        is_capturing=device.capturing,
        synchronize=device.synchronize,
    )
    for layer in LAYERS:
        probe.wants(layer)
    graphs = []
    for rows in (4, 2):
        device.graph = []
        for layer in LAYERS:
            _run(device, probe, layer, 10.0 * rows, rows)
        graphs.append(device.graph)
        device.graph = None
    probe.start_step("decode", "decode", 2, 2)
    device.replay(graphs[1])
    assert _rows(probe.finish_step()) == [(0, "layer", 0, 20), (1, "layer", 20, 20)]


def test_head_inside_the_graph_belongs_to_its_chain(device: Device, graph: GraphEventProbe) -> None:
    captured: Graph = []
    device.graph = captured
    _model(device, graph, 4)
    _run(device, graph, HEAD, 7.0)
    device.graph = None
    graph.start_step("decode", "decode", 4, 4)
    device.replay(captured)
    assert _rows(graph.finish_step())[-2:] == [(-1, "final_norm", 38, 4), (-1, "lm_head", 42, 7)]


def test_prefill_under_the_graph_probe_is_eager(device: Device, graph: GraphEventProbe) -> None:
    captured = _capture(device, graph, 8)
    _decode(device, graph, captured, batch=8)
    graph.start_step("prefill", "prefill", 1, 64)
    _model(device, graph, 64)
    trace = graph.finish_step()
    assert trace.mode == "eager"
    assert _rows(trace)[1] == (0, "layer", 6, 10)
    assert len(trace.intervals) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_events_are_refused() -> None:
    for probe in (EventProbe, GraphEventProbe):
        with pytest.raises(TraceUnsupported, match="GPU"):
            probe()


def test_old_torch_is_named() -> None:
    def no_external() -> Event:
        raise TypeError("unexpected keyword argument 'external'")

    with pytest.raises(TraceUnsupported, match=r"torch 2\.8"):
        GraphEventProbe(external_factory=no_external)


def test_host_probe_counts_from_the_step() -> None:
    ticks = iter([1_000_000, 1_002_000, 1_003_000, 1_007_000, 1_012_000])
    probe = HostProbe(clock_ns=lambda: next(ticks))
    probe.begin(LAYERS[0], 1)  # outside a step: not even the clock is read
    probe.end(LAYERS[0])
    probe.start_step("s", "decode", 1, 1)
    probe.begin(LAYERS[0], 1)
    probe.begin(QKV[0], 1)
    probe.end(QKV[0])
    probe.end(LAYERS[0])
    trace = probe.finish_step()
    assert trace.intervals == [Interval(0, "layer", "layer", 2, 10), Interval(0, "attention", "qkv_proj", 3, 4)]
    assert (trace.gpu_us, trace.source) == (None, "host")


@pytest.mark.parametrize("kind", ["host", "eager"])
def test_crossed_sites_are_an_error(kind: str, eager: EventProbe) -> None:
    probe = eager if kind == "eager" else HostProbe()
    probe.start_step("s", "decode", 1, 1)
    probe.begin(LAYERS[0], 1)
    probe.begin(QKV[0], 1)
    with pytest.raises(RuntimeError, match="ended inside"):
        probe.end(LAYERS[0])


def test_host_probe_on_real_modules() -> None:
    """Hooks see each call of each module, with the layer around its op, and no more once they are off."""
    layer = nn.Sequential(nn.Linear(8, 8))
    probe = HostProbe()
    remove = hook([(LAYERS[0], layer), (QKV[0], layer[0])], probe)
    probe.start_step("s", "decode", 2, 2)
    layer(torch.ones(2, 8))
    outer, inner = probe.finish_step().intervals
    assert (outer.op, inner.op) == ("layer", "qkv_proj")
    assert outer.start_us <= inner.start_us
    assert inner.start_us + inner.latency_us <= outer.start_us + outer.latency_us
    remove()
    probe.start_step("s", "decode", 2, 2)
    layer(torch.ones(2, 8))
    assert probe.finish_step().intervals == []


def test_tee_tells_each_what_it_wants(device: Device, graph: GraphEventProbe) -> None:
    host = HostProbe()
    tee = Tee([NvtxProbe(), graph, host])
    assert tee.wants(QKV[0]) and tee.wants(LAYERS[0])
    tee.start_step("s", "prefill", 1, 1)
    tee.begin(LAYERS[0], 1)
    _run(device, tee, QKV[0], 4.0)
    tee.end(LAYERS[0])
    trace = tee.finish_step()
    assert [(i.op, i.latency_us) for i in trace.intervals] == [("layer", 4.0)]
    assert trace.source == "cuda_event"
    assert Tee([]).finish_step() == StepTrace([])
