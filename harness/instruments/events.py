"""CUDA events: `EventProbe` for eager steps (ops and layers), `GraphEventProbe` for layers inside CUDA graphs.

An event costs about 2 us on the GPU, so these are for traced passes, never for timed ones. Method for graphs: an
external event (torch >= 2.8) recorded while a graph is captured becomes a node of it, and each replay records it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engines.base import NO_LAYER, WHOLE_LAYER, Site, StepKind, TraceUnsupported
from harness.instruments.probe import Interval, StepTrace

_US_PER_MS = 1e3
_SOURCE = "cuda_event"


class Event(Protocol):
    """The part of `torch.cuda.Event` that is used here."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this event to `end_event`, negative if that came earlier."""
        ...


def _ordinary_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


def _external_event() -> Event:
    return torch.cuda.Event(enable_timing=True, external=True)


def _checked_event(factory: Callable[[], Event]) -> Event:
    """A first event, or TraceUnsupported where this machine or this torch has none of its sort."""
    try:
        return factory()
    except TypeError:
        raise TraceUnsupported(f"External CUDA events need torch 2.8 or newer, this is {torch.__version__}.") from None
    except RuntimeError:
        raise TraceUnsupported("CUDA events need a GPU that torch can use.") from None


def _us(begin: Event, end: Event) -> float:
    return begin.elapsed_time(end) * _US_PER_MS


def _interval(site: Site, start_us: float, latency_us: float) -> Interval:
    return Interval(site.layer_index, site.block, site.op, start_us, latency_us)


def _span_us(intervals: Iterable[Interval]) -> float | None:
    """From the first start to the last end."""
    ends = [(i.start_us, i.start_us + i.latency_us) for i in intervals]
    return max(e for _, e in ends) - min(s for s, _ in ends) if ends else None


class _EagerSpans:
    """Begin and end events of the sites that run eagerly in one step; events are kept and used again."""

    def __init__(self, new_event: Callable[[], Event]) -> None:
        self._new_event = new_event
        self._pool = [_checked_event(new_event)]
        self._used = 0
        self._open: list[int] = []
        self.spans: list[tuple[Site, Event, Event]] = []

    def start(self) -> None:
        """Forget the step before and record where this one starts."""
        self._used = 0
        self._open.clear()
        self.spans.clear()
        self.origin = self._next()
        self.origin.record()

    def begin(self, site: Site) -> None:
        begin, end = self._next(), self._next()
        self._open.append(len(self.spans))
        self.spans.append((site, begin, end))
        begin.record()

    def end(self, site: Site) -> None:
        begun, _, end = self.spans[self._open.pop()]
        if begun != site:
            raise RuntimeError(f"{site} ended inside {begun}")
        end.record()

    def read(self) -> list[Interval]:
        """Intervals in the order in which they started; the device must have been waited for."""
        return [_interval(site, _us(self.origin, begin), _us(begin, end)) for site, begin, end in self.spans]

    def _next(self) -> Event:
        if self._used == len(self._pool):
            self._pool.append(self._new_event())
        self._used += 1
        return self._pool[self._used - 1]


class EventProbe:
    """Times each site of eager steps (`ops=False`: no ops inside layers). TraceUnsupported: no GPU."""

    def __init__(
        self,
        ops: bool = True,
        *,
        event_factory: Callable[[], Event] = _ordinary_event,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._ops = ops
        self._spans = _EagerSpans(event_factory)
        self._synchronize = synchronize
        self._in_step = False

    def wants(self, site: Site) -> bool:
        return self._ops or _is_boundary(site)

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        self._spans.start()
        self._in_step = True

    def begin(self, site: Site, rows: int) -> None:
        if self._in_step:
            self._spans.begin(site)

    def end(self, site: Site) -> None:
        if self._in_step:
            self._spans.end(site)

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        self._in_step = False
        self._synchronize()
        intervals = self._spans.read()
        return StepTrace(intervals, gpu_us=_span_us(intervals), mode="eager", source=_SOURCE)


def _is_boundary(site: Site) -> bool:
    return site.op == WHOLE_LAYER or site.layer_index == NO_LAYER


@dataclass
class _Recording:
    """The events of one captured graph: where each site begins, and where those end that may be the graph's last."""

    rows: int
    begins: dict[Site, Event] = field(default_factory=dict)
    ends: dict[Site, Event] = field(default_factory=dict)

    def read(self, origin: Event) -> list[Interval] | None:
        """Each site from its begin to the next one's; None if this graph was not replayed since `origin`."""
        sites = list(self.begins)
        if not sites or sites[-1] not in self.ends:
            return None
        events = [*self.begins.values(), self.ends[sites[-1]]]
        try:
            starts_us = [_us(origin, event) for event in events[:-1]]
            if starts_us[0] < 0:
                return None
            spans = zip(sites, starts_us, events[:-1], events[1:], strict=True)
            return [_interval(site, start_us, _us(begin, end)) for site, start_us, begin, end in spans]
        except RuntimeError:  # never replayed: its events hold no time
            return None


class GraphEventProbe:
    """Times whole layers, and what lies outside them, where decode steps replay CUDA graphs.

    A site inside a graph lasts until the next one begins, so no gap is lost. Sites that a step runs outside its graph
    (`lm_head` and `sample` of some engines; all in a prefill) get ordinary events; warm-up before capture is ignored.
    TraceUnsupported: no GPU, or a torch without external events.
    """

    def __init__(
        self,
        *,
        event_factory: Callable[[], Event] = _ordinary_event,
        external_factory: Callable[[], Event] = _external_event,
        is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        _checked_event(external_factory)
        self._spans = _EagerSpans(event_factory)
        self._new_external = external_factory
        self._is_capturing = is_capturing
        self._synchronize = synchronize
        self._recordings: list[_Recording] = []
        self._capturing: _Recording | None = None
        self._last_layer = NO_LAYER
        self._in_step = False
        self._batch = 0

    def wants(self, site: Site) -> bool:
        if not _is_boundary(site):
            return False
        self._last_layer = max(self._last_layer, site.layer_index)
        return True

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        self._capturing = None
        self._batch = batch
        self._spans.start()
        self._in_step = True

    def begin(self, site: Site, rows: int) -> None:
        if self._is_capturing():
            # A site comes once in a graph, so seeing it again means that the next graph is being captured.
            if self._capturing is None or site in self._capturing.begins:
                self._capturing = _Recording(rows)
                self._recordings.append(self._capturing)
            self._capturing.begins[site] = event = self._new_external()
            event.record()
        elif self._in_step:
            self._spans.begin(site)

    def end(self, site: Site) -> None:
        if self._is_capturing():
            if self._capturing is not None and self._may_be_last(site):
                self._capturing.ends[site] = event = self._new_external()
                event.record()
        elif self._in_step:
            self._spans.end(site)

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        """The replayed graph is the one of `rows_bucket` rows, or the smallest that holds the step's batch.

        TraceUnsupported: the step ran no layers eagerly, and no captured graph that fits was replayed in it.
        """
        self._in_step = False
        self._synchronize()
        eager = self._spans.read()
        if any(i.op == WHOLE_LAYER for i in eager):
            return StepTrace(eager, gpu_us=_span_us(eager), mode="eager", source=_SOURCE)
        intervals = sorted([*self._replayed(rows_bucket), *eager], key=lambda i: i.start_us)
        return StepTrace(intervals, gpu_us=_span_us(intervals), mode="graph", source=_SOURCE)

    def _replayed(self, rows_bucket: int | None) -> list[Interval]:
        least, most = (self._batch, math.inf) if rows_bucket is None else (rows_bucket, rows_bucket)
        for recording in sorted(self._recordings, key=lambda r: r.rows):
            intervals = recording.read(self._spans.origin) if least <= recording.rows <= most else None
            if intervals is not None:
                return intervals
        raise TraceUnsupported(f"No graph with events for {least} rows was replayed in this step.")

    def _may_be_last(self, site: Site) -> bool:
        """Only these get an end event: each event costs time in every replay."""
        return site.op != "embed" and site.layer_index in (NO_LAYER, self._last_layer)
