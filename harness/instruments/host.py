"""Host timers, for machines without a GPU: there the work is done when the call returns."""

from __future__ import annotations

import time
from collections.abc import Callable

from engines.base import Site, StepKind
from harness.instruments.probe import Interval, StepTrace

_US_PER_NS = 1e-3


class HostProbe:
    """Times every site with `time.perf_counter_ns` (`clock_ns` replaces it in tests)."""

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock_ns = clock_ns
        self._start_ns = 0
        self._in_step = False
        self._open: list[tuple[Site, int]] = []
        self._intervals: list[Interval] = []

    def wants(self, site: Site) -> bool:
        return True

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        self._open.clear()
        self._intervals = []
        self._in_step = True
        self._start_ns = self._clock_ns()

    def begin(self, site: Site, rows: int) -> None:
        if self._in_step:
            self._open.append((site, self._clock_ns()))

    def end(self, site: Site) -> None:
        if not self._in_step:
            return
        now_ns = self._clock_ns()
        begun, begun_ns = self._open.pop()
        if begun != site:
            raise RuntimeError(f"{site} ended inside {begun}")
        start_us, latency_us = (begun_ns - self._start_ns) * _US_PER_NS, (now_ns - begun_ns) * _US_PER_NS
        self._intervals.append(Interval(site.layer_index, site.block, site.op, start_us, latency_us))

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        """Intervals in the order in which they started (a layer before its ops)."""
        self._in_step = False
        self._intervals.sort(key=lambda i: (i.start_us, -i.latency_us))
        return StepTrace(self._intervals, gpu_us=None, mode="eager", source="host")
