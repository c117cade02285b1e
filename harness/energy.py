"""Energy of steps: the GPU's own counter over a loop of them, less what the GPU takes idle.

The counter (NVML's total energy consumption, of the whole GPU) moves in ticks of up to a tenth of a second, so a loop
begins at a tick and ends at the first one after it; the idle rest of it is taken off with the idle power. A decode
shape's loop holds prompts, too, since contexts may not grow; a loop of prompts alone says how much of it is theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.base import TraceUnsupported

IDLE_S = 2.0
POLL_S, LONGEST_TICK_S = 0.001, 2.0


@dataclass(frozen=True, slots=True)
class Spent:
    """A loop: J beyond idle, whole rounds of its work, and its seconds."""

    joules: float
    rounds: int
    seconds: float


@dataclass
class EnergyMeter:
    """Reads `joules`, a counter that moves in ticks; `idle_w` is measured when it is made: nothing may run then."""

    joules: Callable[[], float]
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    idle_w: float = field(init=False)

    def __post_init__(self) -> None:
        begin_s, begin_j = self._tick()
        self.sleep(IDLE_S)
        end_s, end_j = self._tick()
        self.idle_w = (end_j - begin_j) / (end_s - begin_s)

    def spend(self, work: Callable[[], None], seconds: float) -> Spent:
        """Do `work` over and over for `seconds` at least; each time it must leave the GPU idle."""
        begin_s, begin_j = self._tick()
        rounds = 0
        while rounds == 0 or self.clock() - begin_s < seconds:
            work()
            rounds += 1
        end_s, end_j = self._tick()
        took_s = end_s - begin_s
        return Spent(end_j - begin_j - self.idle_w * took_s, rounds, took_s)

    def _tick(self) -> tuple[float, float]:
        """When the counter moved next, in s, and to what. TraceUnsupported: it does not move."""
        before, deadline_s = self.joules(), self.clock() + LONGEST_TICK_S
        while (now := self.joules()) == before:
            if self.clock() > deadline_s:
                raise TraceUnsupported("The GPU's energy counter does not move.")
            self.sleep(POLL_S)
        return self.clock(), now
