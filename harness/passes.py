"""Single steps of one shape, over and over: prompts go in, the wanted steps come out timed, everything else is checked.

Used by the timed pass, with nothing attached, and by the traced passes, with an instrument.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engines.base import Engine, SamplingParams, Step
from harness.instruments.nvtx import Ranges, step_label
from harness.instruments.probe import Instrument, StepTrace
from harness.workloads import DECODE_WARMUP_STEPS, Prompts, Shape


class UnexpectedStep(RuntimeError):
    """The engine ran another step than the shape asks for; its time would be a wrong row."""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU or the host has no memory left."""
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of a shape: a decode step, or the step (rarely steps) that computed all prompts."""

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
    """Makes samples of any shape on one engine, which must have nothing else to do."""

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        temperature: float,
        instrument: Instrument | None = None,
        ranges: Ranges | None = None,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._temperature = temperature
        self._instrument = instrument
        self._ranges = ranges or Ranges(enabled=False)

    def samples(self, shape: Shape) -> Generator[Sample, None, None]:
        """Samples of `shape` without end; closing the generator leaves the engine idle. UnexpectedStep."""
        batch = self._prefills if shape.phase == "prefill" else self._decodes
        while True:
            ids = self._add(shape)
            try:
                yield from batch(shape)
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

    def _decodes(self, shape: Shape) -> Iterator[Sample]:
        """As many samples as the shape is wide, after the prompts and the warm-up."""
        while (step := self._untimed()).kind != "decode" or step.batch_size != shape.batch_size:
            if step.finished or not self._engine.has_unfinished():
                raise UnexpectedStep(
                    f"Sequences finished before all of them were in decode together ({shape}); the cache or the limits "
                    "may be too small for them."
                )
        for _ in range(DECODE_WARMUP_STEPS - 1):
            self._untimed()
        for _ in range(shape.width):
            sample, step = self._step(shape)
            if step.kind != "decode" or step.batch_size != shape.batch_size:
                raise UnexpectedStep(f"A {step.kind} step of {step.batch_size} sequences came instead ({shape}).")
            yield replace(sample, context_len=step.context_len)

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
    return Sample(wall_us, 0, replace(first, intervals=intervals, gpu_us=total_us))
