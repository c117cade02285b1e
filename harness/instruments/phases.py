"""Host time per step by phase: the engine names the methods in which each phase happens, and they are timed.

Phases are exclusive: a method called inside another one's is charged to its own phase only. What no method covers is
`rest`: mostly waiting for the GPU's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engines.base import HostPhases, Site, StepKind
from harness.instruments.probe import StepTrace

REST = "rest"
_US_PER_NS = 1e-3


class PhaseTimer:
    """An instrument whose traces hold the microseconds of every phase and of `rest`."""

    def __init__(self, phases: HostPhases, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._phases = phases
        self._clock_ns = clock_ns
        self._open: list[str] = []
        self._since_ns = 0
        self._spent_ns: dict[str, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The engine's methods are timed inside."""
        restore: list[Callable[[], None]] = []
        try:
            for phase, methods in self._phases.items():
                for owner, name in methods:
                    restore.append(self._wrap(phase, owner, name))
            yield
        finally:
            for put_back in reversed(restore):
                put_back()

    def _wrap(self, phase: str, owner: Any, name: str) -> Callable[[], None]:
        original, own = getattr(owner, name), name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(phase)
            try:
                return original(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        setattr(owner, name, timed)
        return (lambda: setattr(owner, name, original)) if own else (lambda: delattr(owner, name))

    def _switch(self) -> None:
        """Charge the time since the last switch to the phase that was running."""
        now_ns = self._clock_ns()
        running = self._open[-1] if self._open else REST
        self._spent_ns[running] = self._spent_ns.get(running, 0) + now_ns - self._since_ns
        self._since_ns = now_ns

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        self._open.clear()
        self._spent_ns = dict.fromkeys((*self._phases, REST), 0)
        self._since_ns = self._clock_ns()

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        self._switch()
        return StepTrace([], phases_us={phase: spent * _US_PER_NS for phase, spent in self._spent_ns.items()})

    def wants(self, site: Site) -> bool:
        return False

    def begin(self, site: Site, rows: int) -> None: ...

    def end(self, site: Site) -> None: ...
