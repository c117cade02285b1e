"""The passes over a started engine: served requests, timed steps, traced steps; each writes its rows when it ends.

What goes wrong with one shape becomes a row with the reason, and the next shape runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from engines.base import Engine, Request, RequestResult, SamplingParams, TraceMode, TraceUnsupported
from harness import machine, tables
from harness.config import Config
from harness.instruments.events import EventProbe, GraphEventProbe
from harness.instruments.host import HostProbe
from harness.instruments.nvtx import NvtxProbe, Ranges
from harness.instruments.probe import Instrument, Tee
from harness.passes import Sample, ShapeSteps, UnexpectedStep, undisturbed
from harness.progress import Reporter
from harness.results import RunWriter, request_row
from harness.statistics import StoppingRule, warmup_count
from harness.workloads import Prompts, Shape

PREFILL_WARMUP, TRACED_WARMUP = 2, 1
"""Prefills left out before the first sample of a shape; kernels are compiled in the first one."""
SERVE_WARMUP_REQUESTS, SERVE_WARMUP_TOKENS = 4, 16
TIMED = "timed"


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU or the host has no memory left."""
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


class Measurement:
    """All passes of one run. `passes` holds what `run.json` says of each shape, by pass: timed, eager, graph."""

    def __init__(
        self, config: Config, engine: Engine, device: str, shapes: Iterable[Shape], writer: RunWriter, ranges: Ranges,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self.config = config
        self.engine = engine
        self.device = device
        self.writer = writer
        self.ranges = ranges
        self.reporter = reporter
        # Another seed than the verification's: no prompt comes twice.
        self.prompts = Prompts(config.model.vocab_size, config.seed + 1)
        self.passes: dict[Shape, dict[str, dict[str, Any]]] = {shape: {} for shape in shapes}
        self.traces: dict[str, str] = {}
        self.failures: list[str] = []

    def serve(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Serve all of `requests` at once, after a warm-up; returns what `run.json` says of it."""
        sampling = SamplingParams(self.config.workload.temperature, SERVE_WARMUP_TOKENS, ignore_eos=True)
        room = self.engine.capacity.max_model_len - SERVE_WARMUP_TOKENS
        length = max(1, min(len(requests[0].prompt_token_ids), room))
        self.engine.serve([self.prompts.request(length, sampling) for _ in range(SERVE_WARMUP_REQUESTS)])
        finished: list[RequestResult] = []
        start_s = time.perf_counter()
        wall_s = 0.0
        try:
            with self.reporter.bar("serving", len(requests)) as done, undisturbed():

                def on_finish(result: RequestResult) -> None:
                    finished.append(result)
                    done(result.request_id)

                start_s = time.perf_counter()
                results = self.engine.serve(requests, on_finish)
                wall_s = time.perf_counter() - start_s
        finally:
            rows = [request_row(self.engine.name, self.engine.arm, r, start_s) for r in finished]
            self.writer.add_requests(rows)
            self.writer.flush()
        rows = [request_row(self.engine.name, self.engine.arm, r, start_s) for r in results]
        record = tables.throughput_record(self.engine, rows, wall_s)
        wanted = sum(r.sampling.max_tokens for r in requests)
        if record["output_tokens"] != wanted:
            self.failures.append(f"{record['output_tokens']} tokens came instead of {wanted}.")
        return record

    def time_all(self) -> None:
        """Time every shape, with no instrument attached."""
        with self.reporter.bar("timing", len(self.passes)) as done:
            for shape in self.passes:
                self._time(shape)
                self.writer.flush()
                done(str(shape))

    def _time(self, shape: Shape) -> None:
        conf = self.config.instrument
        source = ShapeSteps(self.engine, self.prompts, self.config.workload.temperature).samples(shape)
        samples: list[Sample] = []
        stop: str = "interrupted"
        try:
            with self._failing(shape, TIMED), undisturbed():
                for _ in range(PREFILL_WARMUP if shape.phase == "prefill" else 0):
                    next(source)
                fewest = min(conf.min_iterations, conf.max_iterations)
                rule = StoppingRule(conf.precision, fewest, conf.max_iterations, conf.max_seconds_per_shape)
                while (reason := rule.done) is None:
                    samples.append(next(source))
                    rule.add(samples[-1].wall_us)
                stop = reason
        finally:
            source.close()
            if TIMED not in self.passes[shape] and samples:
                cut = warmup_count([s.wall_us for s in samples])
                samples = samples[cut:]
                self.writer.add_steps(tables.timed_rows(self.engine, shape, samples))
                mode = tables.timed_mode(self.engine, shape)
                record = tables.pass_record(self.engine, shape, samples, mode) | {"stop": stop, "warmup_left_out": cut}
                if self.device != "cpu":
                    record["gpu"] = machine.gpu_state()
                self.passes[shape][TIMED] = record

    def trace(self, mode: TraceMode, timers: bool) -> None:
        """Trace every shape in `mode` (decode only in graphs), with timers, and with NVTX ranges if a tool listens."""
        shapes = [s for s in self.passes if mode == "eager" or s.phase == "decode"]
        try:
            instruments = self._instruments(mode, timers) if shapes else []
            if not instruments:
                return
            probe = Tee(instruments)
            self.engine.attach(probe, mode)
        except TraceUnsupported as reason:
            self.traces[mode] = str(reason)
            return
        self.traces[mode] = "ok"
        try:
            with self.reporter.bar(f"tracing ({mode})", len(shapes)) as done:
                for shape in shapes:
                    self._trace_shape(shape, mode, probe)
                    self.writer.flush()
                    done(str(shape))
        finally:
            self.engine.detach()

    def _instruments(self, mode: TraceMode, timers: bool) -> list[Instrument]:
        instruments: list[Instrument] = []
        if timers and mode == "graph":
            instruments.append(GraphEventProbe())
        elif timers:
            instruments.append(HostProbe() if self.device == "cpu" else EventProbe())
        if self.ranges.enabled:
            instruments.append(NvtxProbe())
        return instruments

    def _trace_shape(self, shape: Shape, mode: TraceMode, probe: Instrument) -> None:
        conf = self.config.instrument
        steps = ShapeSteps(self.engine, self.prompts, self.config.workload.temperature, probe, self.ranges)
        source = steps.samples(shape)
        samples: list[Sample] = []
        try:
            with self._failing(shape, mode), undisturbed():
                for _ in range(TRACED_WARMUP):
                    next(source)
                deadline = time.perf_counter() + conf.max_seconds_per_shape
                while len(samples) < conf.traced_iterations and (not samples or time.perf_counter() < deadline):
                    samples.append(next(source))
        finally:
            source.close()
            if mode not in self.passes[shape] and samples:
                step_rows, layer_rows = tables.traced_rows(self.engine, shape, samples, mode)
                self.writer.add_steps(step_rows)
                self.writer.add_layers(layer_rows)
                record = tables.pass_record(self.engine, shape, samples, mode)
                if timed_us := self.passes[shape].get(TIMED, {}).get("wall_us"):
                    record["overhead"] = record["wall_us"] / timed_us
                if (share := tables.closure(samples)) is not None:
                    record["closure"] = share
                self.passes[shape][mode] = record

    @contextmanager
    def _failing(self, shape: Shape, name: str) -> Iterator[None]:
        """Turns what may happen to one shape into its row with a reason, so that the next shape runs."""
        try:
            yield
        except (UnexpectedStep, TraceUnsupported, RuntimeError, MemoryError) as error:
            if not isinstance(error, UnexpectedStep | TraceUnsupported) and not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            if out_of_memory(error):
                reason = f"out of memory: {reason}"
                if self.device != "cpu":
                    torch.cuda.empty_cache()
            mode = tables.timed_mode(self.engine, shape) if name == TIMED else name
            self.writer.add_steps([tables.failed_row(self.engine, shape, mode, name != TIMED, reason)])
            self.passes[shape][name] = {"status": reason}
            self.failures.append(f"{shape}, {name}: {reason}")
