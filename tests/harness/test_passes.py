"""Steps in a row: an engine whose GPU goes on between two calls, made of a clock."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from itertools import islice, pairwise
from typing import Any

import pytest

from engines.base import Capacity, Request, Scheduled, Step
from harness import passes
from harness.instruments.phases import PhaseTimer
from harness.instruments.probe import StepTrace
from harness.passes import ShapeSteps, UnexpectedStep
from harness.workloads import Prompts, Shape

STEP_US, LOOK_US = 500, 90
"""What the GPU takes for a decode step; what the host takes to look at a step's tokens."""
SHAPE = Shape("decode", 2, 128)


class Clock:
    """Instead of the module `time`, in which only these calls pass any."""

    now_us = 0

    def perf_counter_ns(self) -> int:
        return self.now_us * 1000


class Ahead:
    """Decode steps of STEP_US, the next one launched before the tokens of the last one are looked at."""

    launches_ahead = True

    def __init__(self, clock: Clock, skips: int = 0, look_us: int = LOOK_US) -> None:
        self.clock, self.look_us = clock, look_us
        self.capacity = Capacity(1024, 8, 16384, 10_000)
        self.lengths: dict[str, int] = {}
        self.steps = self.ready_us = 0
        self.prompts: list[Request] = []
        self.skips = skips  # the step in which one of the sequences is left out

    def add(self, request: Request) -> None:
        self.prompts.append(request)

    def has_unfinished(self) -> bool:
        return True

    def advance(self) -> None:
        if self.prompts:
            scheduled = tuple(Scheduled(r.request_id, len(r.prompt_token_ids), 0) for r in self.prompts)
            self.lengths = {r.request_id: len(r.prompt_token_ids) for r in self.prompts}
            self.prompts, self.last = [], Step("prefill", scheduled)
            self.ready_us = self.clock.now_us + STEP_US  # of the first decode step
            return
        self.steps += 1
        self.clock.now_us = max(self.clock.now_us, self.ready_us)
        self.ready_us = self.clock.now_us + STEP_US
        self.clock.now_us += self.look_us
        names = list(self.lengths)[self.steps == self.skips :]
        self.last = Step("decode", tuple(Scheduled(name, 1, self.lengths[name]) for name in names))
        for name in names:
            self.lengths[name] += 1

    def last_step(self) -> Step:
        return self.last

    def abort(self, request_ids: Iterable[str]) -> None:
        self.lengths = {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(passes, "time", clock)
    return clock


def samples(engine: Any, clock: Clock, count: int, pause_us: int, instrument: Any = None) -> list[passes.Sample]:
    """`count` samples by someone who does something else for `pause_us` after each."""
    found = []
    steps = ShapeSteps(engine, Prompts(1000, 0), 0.6, instrument, takes_no_time=instrument is not None)
    with closing(steps.samples(SHAPE)) as source:
        for sample in islice(source, count):
            found.append(sample)
            clock.now_us += pause_us
    return found


@pytest.mark.parametrize("pause_us", [0, 300, 2000])
def test_a_pause_between_samples_makes_no_step_of_the_gpu_shorter(clock: Clock, pause_us: int) -> None:
    found = samples(Ahead(clock), clock, 2 * SHAPE.width, pause_us)
    assert [s.wall_us for s in found] == [STEP_US] * 2 * SHAPE.width
    contexts = [s.context_len for s in found[: SHAPE.width]]
    first = SHAPE.tokens - SHAPE.width // 2
    assert contexts == list(range(first, first + SHAPE.width))
    assert [s.context_len for s in found[SHAPE.width :]] == contexts


def test_a_host_that_is_slower_than_the_gpu_is_in_the_step(clock: Clock) -> None:
    assert {s.wall_us for s in samples(Ahead(clock, look_us=800), clock, 9, 100)} == {800.0}


def test_phases_of_steps_in_a_row_and_the_rest_are_the_step(clock: Clock) -> None:
    engine = Ahead(clock)
    timer = PhaseTimer({"look": [(engine, "last_step")]}, clock.perf_counter_ns)
    with timer.attached():
        found = samples(engine, clock, 5, 250, timer)
    assert [s.trace.phases_us for s in found if s.trace] == [{"look": 0.0, "rest": STEP_US}] * 5


def test_a_long_row_ends_early_and_the_next_one_goes_on_where_it_ended(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ROW_SECONDS", 4.5 * STEP_US / 1e6)
    found = samples(Ahead(clock), clock, 12, 2000)
    assert {s.wall_us for s in found} == {STEP_US}
    contexts = [s.context_len for s in found]
    assert contexts == sorted(set(contexts))
    assert max(b - a for a, b in pairwise(contexts)) == 2  # a row's first step is not timed


def test_a_step_of_fewer_sequences_within_a_row_is_no_sample(clock: Clock) -> None:
    with pytest.raises(UnexpectedStep, match="did not follow one another"):
        samples(Ahead(clock, skips=9), clock, 1, 0)


def test_an_engine_that_launches_nothing_ahead_is_timed_from_its_own_call(clock: Clock) -> None:
    engine = Ahead(clock)
    engine.launches_ahead = False
    # Between its calls the harness asks what the step was, and that is no part of the next one.
    told = engine.last_step

    def last_step() -> Step:
        clock.now_us += 40
        return told()

    engine.last_step = last_step  # type: ignore[method-assign]
    assert {s.wall_us for s in samples(engine, clock, 5, 0)} == {STEP_US - 40}


def test_rows_of_a_given_width_are_not_cut(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "ROW_SECONDS", 4.5 * STEP_US / 1e6)
    engine = Ahead(clock)
    with closing(ShapeSteps(engine, Prompts(1000, 0), 0.6).samples(SHAPE, width=20)) as source:
        found = list(islice(source, 20))
    contexts = [s.context_len for s in found]
    assert contexts == list(range(contexts[0], contexts[0] + 20))  # of one batch of prompts


def test_steps_counted_together_have_no_phases(clock: Clock) -> None:
    traces = [StepTrace([], phases_us={"launch": us}) for us in (1.0, 2.0)]
    joined = passes._joined([passes.Sample(5.0, 0, trace) for trace in traces])
    assert joined.wall_us == 10.0 and joined.trace is not None and joined.trace.phases_us is None


def test_a_sequence_left_out_is_seen_also_where_lengths_differ(clock: Clock) -> None:
    engine = Ahead(clock, skips=9)
    advance = engine.advance

    def uneven() -> None:
        first = bool(engine.prompts)
        advance()
        if first:  # the last prompt was computed a step later
            engine.lengths[list(engine.lengths)[1]] += 1

    engine.advance = uneven  # type: ignore[method-assign]
    with pytest.raises(UnexpectedStep, match="did not follow one another"):
        samples(engine, clock, 1, 0)
