"""The passes over a started engine: served requests, timed steps, traced steps; each writes its rows when it ends.

What goes wrong with one shape becomes a row with the reason, and the next shape runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice, pairwise
from typing import Any

import torch

from engines.base import Engine, Request, RequestResult, SamplingParams, TraceMode, TraceUnsupported
from harness import machine, tables
from harness.config import Config
from harness.energy import EnergyMeter, step_energy
from harness.instruments.events import EventProbe, GraphEventProbe
from harness.instruments.host import HostProbe
from harness.instruments.kernels import KernelProbe, KernelSample, disagreeing, read
from harness.instruments.nvtx import NvtxProbe, Ranges
from harness.instruments.phases import PhaseTimer
from harness.instruments.probe import Instrument, StepTrace, Tee
from harness.pace import host_pace
from harness.passes import Sample, ShapeSteps, UnexpectedStep, out_of_memory, undisturbed
from harness.progress import Reporter
from harness.results import RunWriter, request_row
from harness.rounds import BlockFailed, Blocks, Item
from harness.serving import Load, load_record
from harness.statistics import StoppingRule, median_interval, warmup_count
from harness.workloads import Prompts, Shape

PREFILL_WARMUP, TRACED_WARMUP = 2, 1
"""Prefills left out before the first sample of a shape; kernels are compiled in the first one."""
MIN_BLOCKS = 5
"""Fewest blocks of an item in a run of one engine."""
SERVE_WARMUP_REQUESTS, SERVE_WARMUP_TOKENS = 4, 16
TIMED, HOST, KERNELS, ENERGY = "timed", "host", "kernels", "energy"


class Measurement:
    """All passes of one run. `passes` holds what `run.json` says of shapes, by pass: timed, host, ... ."""

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
        self.throttled_blocks: list[list[str]] = []  # of each block, the reasons at its end; none: it was not
        self._blocks: Blocks | None = None

    def blocks(self, requests: Sequence[Request]) -> Blocks:
        """What measures blocks on this engine: always the same one, so that no prompt comes twice."""
        if self._blocks is None:
            self._blocks = Blocks(self.engine, self.prompts, self.config.workload.temperature, requests)
        return self._blocks

    def block(
        self, item: Item, launch: int, number: int, started_s: float, requests: Sequence[Request]
    ) -> dict[str, Any]:
        """Measure one block; its row, which is kept for the table, and whether the GPU was throttled at its end."""
        row = self.blocks(requests).row(item, launch, number, started_s)
        state = (machine.gpu_state() if self.device != "cpu" else None) or {}
        self.throttled_blocks += [state["throttle_reasons"] if state.get("throttled") else []]
        row["throttled"] = state.get("throttled")
        self.writer.add_rounds([row])
        return row

    def time_rounds(self, timed: Sequence[Item], requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Blocks of each item until its median is known; returns what `run.json` says of them."""
        conf, blocks, begun_s = self.config.instrument, self.blocks(requests), time.perf_counter()
        records = []
        with self.reporter.bar("timing", len(timed)) as done:
            for item in timed:
                with suppress(BlockFailed):  # the block itself will say so
                    blocks.warm_up(item)
                rule = StoppingRule(conf.precision, MIN_BLOCKS, conf.max_iterations, conf.max_seconds_per_shape)
                reason = ""
                while rule.done is None and not reason:
                    row = self.block(item, 0, len(rule.samples), time.perf_counter() - begun_s, requests)
                    if row["status"] == "ok":
                        rule.add(row["value"])
                    else:
                        reason = row["status"]
                        self.failures.append(f"{item}: {reason}")
                told = {**item.key, "arm": self.engine.arm, "status": reason or "ok"}
                if rule.samples:
                    told |= {"stopped": rule.done, **asdict(median_interval(rule.samples))}
                records.append(told)
                self.writer.flush()
                done(str(item))
        return records

    def serve(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Serve all of `requests` at once, after a warm-up; returns what `run.json` says of it."""
        self.warm_up_serving(requests)
        rows, wall_s = self._served(requests)
        return tables.throughput_record(self.engine, rows, wall_s)

    def serve_load(self, load: Load) -> dict[str, Any]:
        """Serve the requests of `load` as they arrive; returns what `run.json` says of it."""
        rows, _ = self._served(load.requests, load.arrivals_s, load.rate)
        record = {"arm": self.engine.arm, **load_record(load.rate, rows, self.config.workload.slo)}
        if (late_ms := self.engine.notes.get("max_handover_ms")) is not None:
            record["max_handover_ms"] = late_ms
        return record

    def warm_up_serving(self, requests: Sequence[Request]) -> None:
        """A few short requests, for whatever happens only once."""
        sampling = SamplingParams(self.config.workload.temperature, SERVE_WARMUP_TOKENS, ignore_eos=True)
        room = self.engine.capacity.max_model_len - SERVE_WARMUP_TOKENS
        length = max(1, min(len(requests[0].prompt_token_ids), room))
        self.engine.serve([self.prompts.request(length, sampling) for _ in range(SERVE_WARMUP_REQUESTS)])

    def _served(
        self, requests: Sequence[Request], arrivals_s: Sequence[float] | None = None, rate: float | None = None
    ) -> tuple[list[dict[str, Any]], float]:
        """Rows of `requests`, written as far as they came, and the seconds that serving took."""
        finished: list[RequestResult] = []
        start_s = time.perf_counter()

        def row(result: RequestResult) -> dict[str, Any]:
            return request_row(self.engine.name, self.engine.arm, result, start_s, rate)

        try:
            with self.reporter.bar(f"serving {rate:g}/s" if rate else "serving", len(requests)) as done, undisturbed():

                def on_finish(result: RequestResult) -> None:
                    finished.append(result)
                    done(f"request {result.request_id}")

                start_s = time.perf_counter()
                results = self.engine.serve(requests, on_finish, arrivals_s)
                wall_s = time.perf_counter() - start_s
        finally:
            self.writer.add_requests([row(result) for result in finished])
            self.writer.flush()
        came, wanted = sum(len(r.token_ids) for r in results), sum(r.sampling.max_tokens for r in requests)
        if came != wanted:
            self.failures.append(f"{came} tokens came instead of {wanted}.")
        return [row(result) for result in results], wall_s

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
            if self.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
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
                    record["memory"] = machine.torch_memory()
                record["host_pace"] = host_pace(self.device)
                self.passes[shape][TIMED] = record

    def trace_kernels(self) -> None:
        """Record the kernels of every shape, on the engine as it is timed."""
        try:
            if self.ranges.enabled:
                raise TraceUnsupported("Another tool is attached, and CUPTI serves one at a time.")
            probe = KernelProbe()
        except TraceUnsupported as reason:
            self.traces[KERNELS] = str(reason)
            return
        self.traces[KERNELS] = "ok"
        with self.reporter.bar("recording kernels", len(self.passes)) as done:
            for shape in self.passes:
                self._record_kernels(shape, probe)
                self.writer.flush()
                done(str(shape))

    def trace_host(self) -> None:
        """Time the host's phases in the steps of every shape, on the engine as it is timed."""
        if not self.engine.host_phases():
            self.traces[HOST] = f"{self.engine.name} names no phases of its steps."
            return
        self.traces[HOST] = "ok"
        with self.reporter.bar("timing host phases", len(self.passes)) as done:
            for shape in self.passes:
                self._time_host(shape)
                self.writer.flush()
                done(str(shape))

    def _time_host(self, shape: Shape) -> None:
        timer = PhaseTimer(self.engine.host_phases())
        steps = ShapeSteps(self.engine, self.prompts, self.config.workload.temperature, timer, takes_no_time=True)
        source = steps.samples(shape)
        try:
            with self._failing(shape, HOST), undisturbed(), timer.attached():
                next(source)
                samples = list(islice(source, self.config.instrument.traced_iterations))
                phases = [s.trace.phases_us for s in samples if s.trace is not None and s.trace.phases_us]
                if len(phases) != len(samples):
                    raise TraceUnsupported("Its prompts take several steps.")
                mode = tables.timed_mode(self.engine, shape)
                self.writer.add_host(tables.host_rows(self.engine, shape, phases, mode))
                medians = {phase: statistics.median(step[phase] for step in phases) for phase in phases[0]}
                record = tables.pass_record(self.engine, shape, samples, mode) | {"phases_us": medians}
                self._keep_traced(shape, HOST, record)
        finally:
            source.close()

    def measure_energy(self) -> None:
        """Take the energy of the steps of every shape, with no instrument attached."""
        joules = machine.energy_counter() if self.device != "cpu" else None
        try:
            if joules is None:
                raise TraceUnsupported("NVML tells no energy here.")
            if self.config.engine.options.get("tensor_parallel_size", 1) > 1:
                raise TraceUnsupported("The energy counter is one GPU's; this engine runs on several GPUs.")
            meter = EnergyMeter(joules)
        except TraceUnsupported as reason:
            self.traces[ENERGY] = str(reason)
            return
        self.traces[ENERGY] = "ok"
        with self.reporter.bar("measuring energy", len(self.passes)) as done:
            for shape in self.passes:
                with self._failing(shape, ENERGY), undisturbed():
                    self.passes[shape][ENERGY] = self._energy(shape, meter)
                done(str(shape))

    def _energy(self, shape: Shape, meter: EnergyMeter) -> dict[str, Any]:
        """What `run.json` says of it. TraceUnsupported: the shape's prompts hide its steps."""
        source = ShapeSteps(self.engine, self.prompts, self.config.workload.temperature)
        found = step_energy(source, shape, meter, self.config.instrument.energy_seconds)
        return {
            "status": "ok", "arm": self.engine.arm, "mode": tables.timed_mode(self.engine, shape),
            **found, "j_per_token": found["j_per_step"] / shape.new_tokens,
        }  # fmt: skip

    def _record_kernels(self, shape: Shape, probe: KernelProbe) -> None:
        conf, model = self.config.instrument, self.config.model
        source = ShapeSteps(self.engine, self.prompts, self.config.workload.temperature, probe).samples(shape)
        mode = tables.timed_mode(self.engine, shape)
        try:
            with self._failing(shape, KERNELS), undisturbed():
                next(source)
                samples: list[Sample] = []
                ends = [0]
                with probe.window():
                    deadline = time.perf_counter() + conf.max_seconds_per_shape
                    # The first one pays for the profiler's buffers, and is left out.
                    while len(samples) <= conf.traced_iterations and (
                        len(samples) < 2 or time.perf_counter() < deadline
                    ):
                        samples.append(next(source))
                        ends.append(probe.marked)
                read_samples = [
                    read(probe.steps[begin:end], model.num_layers, model.architecture == "qwen3", mode)
                    for begin, end in pairwise(ends[1:])
                ]
                self._keep_kernels(shape, mode, samples[1:], read_samples)
        finally:
            source.close()

    def _keep_kernels(self, shape: Shape, mode: str, samples: list[Sample], found: list[KernelSample]) -> None:
        """Rows and record of the samples that ran the same kernels; the others are told."""
        refused = disagreeing([kernels.sequence for kernels in found])
        pairs = [pair for i, pair in enumerate(zip(samples, found, strict=True)) if i not in refused]
        samples = [_with_kernels(sample, kernels.trace) for sample, kernels in pairs]
        step_rows, layer_rows = tables.traced_rows(self.engine, shape, samples, mode)
        self.writer.add_steps(step_rows)
        self.writer.add_layers(layer_rows)
        record = tables.pass_record(self.engine, shape, samples, mode)
        record |= tables.kernels_record([kernels for _, kernels in pairs]) | {"refused": list(refused.values())}
        self._keep_traced(shape, KERNELS, record)

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
                if (share := tables.closure(samples)) is not None:
                    record["closure"] = share
                self._keep_traced(shape, mode, record)

    def _keep_traced(self, shape: Shape, name: str, record: dict[str, Any]) -> None:
        """As the shape's pass of that name, with what it cost beside the timed one, if there is one."""
        if timed_us := self.passes[shape].get(TIMED, {}).get("wall_us"):
            record["overhead"] = record["wall_us"] / timed_us
        self.passes[shape][name] = record

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
            mode = tables.timed_mode(self.engine, shape) if name in (TIMED, HOST, KERNELS, ENERGY) else name
            self.writer.add_steps([tables.failed_row(self.engine, shape, mode, name != TIMED, reason)])
            self.passes[shape][name] = {"status": reason}
            self.failures.append(f"{shape}, {name}: {reason}")


def _with_kernels(sample: Sample, trace: StepTrace) -> Sample:
    """`sample` with what its kernels say.

    The instrument waits for the GPU before and after each step. An engine that launches steps ahead finds the tokens of
    the step before ready then, and returns while the one that it launched still runs: the step is as long as that.
    """
    return replace(sample, trace=trace, wall_us=max(sample.wall_us, trace.gpu_us or 0.0))
