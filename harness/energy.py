"""Energy of steps: the GPU's own counter over a loop of them, less what the GPU takes idle.

The counter (NVML's total energy consumption, of the whole GPU) moves in ticks of up to a tenth of a second, and at a
tick it may still lack what ran just before. So a loop begins and ends at a tick that has a whole quiet one before it.
What the GPU takes idle depends on its clocks and temperature; it is measured after each loop, when both are the loop's,
and taken off for the gaps as well as for the ends. A decode shape's loop holds prompts, too, since contexts may not
grow; a loop of the same prompts with fewer decode steps is taken off it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.base import TraceUnsupported
from harness.passes import ShapeSteps
from harness.workloads import Shape

IDLE_S = 1.0
"""Ten ticks at least: found to a millisecond each, its ends are then off by a few thousandths."""
POLL_S, LONGEST_TICK_S = 0.001, 2.0


@dataclass(frozen=True, slots=True)
class Spent:
    """A loop: J beyond idle, whole rounds of its work, its seconds, and W of the idle GPU after it."""

    joules: float
    rounds: int
    seconds: float
    idle_w: float


@dataclass
class EnergyMeter:
    """Reads `joules`, a counter that moves in ticks. TraceUnsupported: this one does not."""

    joules: Callable[[], float]
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._tick()

    def spend(self, work: Callable[[], None], seconds: float) -> Spent:
        """Do `work` over and over for `seconds` at least; each time it must leave the GPU idle. TraceUnsupported."""
        begin_s, begin_j = self._quiet_tick()
        rounds = 0
        while rounds == 0 or self.clock() - begin_s < seconds:
            work()
            rounds += 1
        end_s, end_j = self._quiet_tick()
        self.sleep(IDLE_S)
        idle_s, idle_j = self._tick()
        idle_w = (idle_j - end_j) / (idle_s - end_s)
        took_s = end_s - begin_s
        return Spent(end_j - begin_j - idle_w * took_s, rounds, took_s, idle_w)

    def _quiet_tick(self) -> tuple[float, float]:
        """A tick before which nothing has run for a whole one. TraceUnsupported."""
        self._tick()
        return self._tick()

    def _tick(self) -> tuple[float, float]:
        """When the counter moved next, in s, and to what. TraceUnsupported: it does not move."""
        before, deadline_s = self.joules(), self.clock() + LONGEST_TICK_S
        while (now := self.joules()) == before:
            if self.clock() > deadline_s:
                raise TraceUnsupported("The GPU's energy counter does not move.")
            self.sleep(POLL_S)
        return self.clock(), now


def step_energy(steps: ShapeSteps, shape: Shape, meter: EnergyMeter, seconds: float) -> dict[str, float]:
    """J beyond idle of a step of `shape`, and how that was found. TraceUnsupported: the shape's prompts hide its steps.

    An engine may launch steps ahead, also one whose tokens nobody wants any more. So steps are not counted up from the
    first one: two loops whose rounds begin and end alike differ by steps that all ran.
    """
    samples, counted, before_j = 1, 1, 0.0
    if shape.phase == "decode":
        samples, counted = shape.width, shape.width - 1
        few = meter.spend(_rounds_of(steps, shape, 1), seconds)
        before_j = few.joules / few.rounds
    spent = meter.spend(_rounds_of(steps, shape, samples), seconds)
    step_j = (spent.joules / spent.rounds - before_j) / counted
    if step_j <= 0:
        raise TraceUnsupported("Its steps take no more than idle, or less than their prompts can be told to.")
    return {
        "j_per_step": step_j, "idle_w": spent.idle_w, "subtracted_share": before_j * spent.rounds / spent.joules,
        "rounds": spent.rounds, "seconds": spent.seconds,
    }  # fmt: skip


def _rounds_of(steps: ShapeSteps, shape: Shape, samples: int) -> Callable[[], None]:
    """What takes so many samples of `shape` and leaves the engine idle; once done already."""

    def once() -> None:
        source = steps.samples(shape, width=samples)
        try:
            for _ in range(samples):
                next(source)
        finally:
            source.close()

    once()
    return once
