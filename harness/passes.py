"""Single steps of one shape, over and over: prompts go in, the wanted steps come out timed, everything else is checked.

Used by the timed pass, with nothing attached, and by the traced passes, with an instrument.

An engine may launch a step before the one before it was read. Whatever is done between two calls of such an engine,
the GPU goes on meanwhile, and a step timed from its own call on would lack that time. So its decode steps are timed in
a row, with nothing between them, each from the end of the one before to its own. Traced steps stand apart: their
instruments wait for the GPU before and after each.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

import torch

from engines.base import Engine, SamplingParams, Step
from harness.instruments.nvtx import Ranges, step_label
from harness.instruments.probe import Instrument, StepTrace
from harness.workloads import DECODE_WARMUP_STEPS, Prompts, Shape

ROW_SECONDS = 1.0
"""After so long a row of steps ends, so that whoever takes the samples may stop: without a GPU steps take seconds."""


class UnexpectedStep(RuntimeError):
    """The engine ran another step than the shape asks for; its time would be a wrong row."""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU or the host has no memory left."""
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a shape: a decode step, or the step (rarely steps) that computed all prompts.

    wall_us: of a decode step in a row, from the end of the step before; else from its own start
    """

    wall_us: float
    context_len: int
    trace: StepTrace | None = None


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class ShapeSteps:
    """Makes samples of any shape on one engine, which must have nothing else to do.

    `takes_no_time`: the instrument does not, and so steps of an engine that launches ahead are timed in a row with it.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        temperature: float,
        instrument: Instrument | None = None,
        ranges: Ranges | None = None,
        takes_no_time: bool = False,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._temperature = temperature
        self._instrument = instrument
        self._ranges = ranges or Ranges(enabled=False)
        self._may_time_in_a_row = takes_no_time or instrument is None

    def samples(self, shape: Shape, width: int | None = None) -> Generator[Sample, None, None]:
        """Samples of `shape` without end; closing the generator leaves the engine idle. UnexpectedStep.

        `width`: how many decode steps to take on one batch of prompts, if not as many as the shape is wide; exactly so
        many samples come of it then, however long they take.
        """
        while True:
            ids = self._add(shape)
            try:
                if shape.phase == "prefill":
                    yield from self._prefills(shape)
                else:
                    yield from self._decodes(shape, width or shape.width, ROW_SECONDS if width is None else inf)
            finally:
                self._engine.abort(ids)

    def _add(self, shape: Shape) -> list[str]:
        output = shape.output_len(self._engine.capacity.max_num_batched_tokens)
        sampling = SamplingParams(self._temperature, max_tokens=output, ignore_eos=True)
        requests = [self._prompts.request(shape.prompt_len, sampling) for _ in range(shape.batch_size)]
        for request in requests:
            self._engine.add(request)
        return [request.request_id for request in requests]

    def _prefills(self, shape: Shape) -> Iterator[Sample]:
        """One sample: all prompts. Those that exceed the engine's tokens per step take several, counted together."""
        parts: list[tuple[Sample, Step]] = []
        while self._engine.has_unfinished():
            sample, step = self._step(shape)
            if step.kind != "prefill":
                raise UnexpectedStep(f"A {step.kind} step came while prompts were computed ({shape}).")
            parts.append((sample, step))
        computed = sum(step.new_tokens for _, step in parts)
        if computed != shape.new_tokens:
            raise UnexpectedStep(f"{computed} tokens were computed instead of {shape.new_tokens} ({shape}).")
        yield _joined([sample for sample, _ in parts])

    def _decodes(self, shape: Shape, width: int, row_seconds: float) -> Iterator[Sample]:
        """`width` samples, after the prompts and the warm-up; each row that ends early, after `row_seconds`, has one
        fewer."""
        while (step := self._untimed()).kind != "decode" or step.batch_size != shape.batch_size:
            if step.finished or not self._engine.has_unfinished():
                raise UnexpectedStep(
                    f"Sequences finished before all of them were in decode together ({shape}); the cache or the limits "
                    "may be too small for them."
                )
        for _ in range(DECODE_WARMUP_STEPS - 2):
            step = self._untimed()
        if self._engine.launches_ahead and self._may_time_in_a_row:
            left = 1 + width
            while left > 1:
                samples, step = self._row(shape, step, left, row_seconds)
                left -= 1 + len(samples)
                yield from samples
            return
        self._untimed()
        for _ in range(width):
            sample, step = self._step(shape)
            if step.kind != "decode" or step.batch_size != shape.batch_size:
                raise UnexpectedStep(f"A {step.kind} step of {step.batch_size} sequences came instead ({shape}).")
            yield replace(sample, context_len=step.context_len)

    def _row(self, shape: Shape, before: Step, count: int, seconds: float) -> tuple[list[Sample], Step]:
        """Up to `count` steps one right after the other, all but the first of them timed, and what the last one was;
        `before` is the step that ran last.

        What the steps were is told after them: each adds one token to a sequence at most, so if all sequences are there
        and longer by as many tokens as there were steps, each was a decode step of all of them.
        """
        label = step_label(shape.phase, shape.batch_size, shape.new_tokens, shape.context_len)
        ends_ns: list[int] = []
        traces: list[StepTrace] = []
        stop_ns = time.perf_counter_ns() + seconds * 1e9
        while len(ends_ns) < count and (len(ends_ns) < 2 or ends_ns[-1] < stop_ns):
            if self._instrument is not None:
                self._instrument.start_step(label, shape.phase, shape.batch_size, shape.new_tokens)
            self._engine.advance()
            if self._instrument is not None:
                traces.append(self._instrument.finish_step())
            ends_ns.append(time.perf_counter_ns())
        last, first = self._engine.last_step(), before.context_len + 2  # the row's first step has no end before it
        grown = _tokens_cached(last) - _tokens_cached(before)
        if (last.kind, last.batch_size, grown) != ("decode", shape.batch_size, shape.batch_size * len(ends_ns)):
            raise UnexpectedStep(
                f"{len(ends_ns)} decode steps of {shape.batch_size} sequences did not follow one another ({shape}): "
                f"the last was a {last.kind} step of {last.batch_size} at {last.context_len} tokens."
            )
        return [
            Sample((end - start) / 1e3, first + i, traces[i + 1] if traces else None)
            for i, (start, end) in enumerate(pairwise(ends_ns))
        ], last

    def _step(self, shape: Shape) -> tuple[Sample, Step]:
        label = step_label(shape.phase, shape.batch_size, shape.new_tokens, shape.context_len)
        trace = None
        with self._ranges.step(label, shape.new_tokens):
            if self._instrument is not None:
                self._instrument.start_step(label, shape.phase, shape.batch_size, shape.new_tokens)
            start_ns = time.perf_counter_ns()
            self._engine.advance()
            wall_us = (time.perf_counter_ns() - start_ns) / 1e3
            if self._instrument is not None:
                trace = self._instrument.finish_step()
        return Sample(wall_us, 0, trace), self._engine.last_step()

    def _untimed(self) -> Step:
        self._engine.advance()
        return self._engine.last_step()


def _tokens_cached(step: Step) -> int:
    """Of all its sequences: their mean is rounded, and could hide that one was left out."""
    return sum(s.context_len for s in step.scheduled)


def _joined(samples: Sequence[Sample]) -> Sample:
    """Consecutive steps as one sample; each step's intervals start after the steps before it."""
    if len(samples) == 1:
        return samples[0]
    wall_us = 0.0
    intervals, gpu_us = [], [s.trace.gpu_us for s in samples if s.trace is not None]
    for sample in samples:
        if sample.trace is not None:
            intervals += [replace(i, start_us=i.start_us + wall_us) for i in sample.trace.intervals]
        wall_us += sample.wall_us
    first = samples[0].trace
    if first is None:
        return Sample(wall_us, 0)
    known = [us for us in gpu_us if us is not None]
    total_us = sum(known) if len(known) == len(gpu_us) else None
    return Sample(wall_us, 0, replace(first, intervals=intervals, gpu_us=total_us, phases_us=None))
