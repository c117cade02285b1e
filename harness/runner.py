"""One run from start to end: weights, engine, verification, timed pass, traced passes, `run.json`.

Timing and tracing are separate passes, and nothing is timed on an engine whose output was not checked first.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from engines.base import Engine, EngineConfig
from harness import machine
from harness.config import Config
from harness.engine_classes import start_engine
from harness.errors import RunFailed
from harness.instruments.nvtx import Ranges
from harness.limits import Work, check_capacity, device_of, engine_config, too_large
from harness.measurement import KERNELS, TIMED, Measurement
from harness.pace import slowdowns
from harness.progress import Reporter
from harness.results import RunWriter
from harness.roofline.ceilings import cached_record
from harness.rounds import items
from harness.summary import print_summary
from harness.verify import verify
from harness.weights import resolve
from harness.workloads import Shape

LOWEST_CLOSURE, HIGHEST_CLOSURE = 0.98, 1.02
"""Closure outside these is told as a doubt."""
LOWEST_ATTRIBUTED = 0.98
"""So is a smaller share of kernel time with a place in the model."""


def run(config: Config, run_dir: Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run `config`, write the results to `run_dir`, print the summary; returns what stands in `run.json`.

    InputError: it cannot be done, and nothing was written. RunFailed: verification failed, or nothing could be timed.
    KeyboardInterrupt: what was measured is kept.
    """
    session = Session(config, run_dir, reporter)
    with session.started():
        session.measure()
    print_summary(run_dir)
    return session.record


class Session:
    """One engine and the folder that its results go to. Inside `started` the engine runs, its output verified."""

    def __init__(self, config: Config, run_dir: Path, reporter: Reporter | None = None) -> None:
        self.config = config
        self.run_dir = run_dir
        self.reporter = reporter or Reporter()
        self.device = device_of(config.device)
        self.work = Work.of(config, self.device)
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{config.engine.name}-{uuid.uuid4().hex[:8]}"
        self.ranges = Ranges(config.instrument.nvtx)
        self.phases_s: dict[str, float] = {}
        self.warnings: list[str] = []
        self.record: dict[str, Any] = {}

    @contextmanager
    def started(self) -> Iterator[None]:
        """The engine from its start to its end. What was measured is written at the end, whatever happened."""
        checked = engine_config(self.config, self.work, Path(), self.device)  # before gigabytes are written
        self._start_record(checked)
        with self._phase("weights"):
            weights = resolve(self.config.model, self.config.weights, self.config.seed)
        self.record["weights"] = {**asdict(weights), "path": str(weights.path)}
        if weights.notice:
            self.warnings.append(weights.notice)
            self.reporter.say(weights.notice)
        self.reporter.say(f"Starting {self.config.engine.name} on {self.device}, {checked.dtype}")
        if self.device == "cpu":
            self.reporter.say("Without a GPU, the workload's values that begin with cpu_ count.")
        with self._phase("engine_start"), self.reporter.relaying("engines"):
            engine = start_engine(self.config.engine.target, replace(checked, checkpoint=weights.path))
        try:
            self.reporter.say(f"Ready after {self.phases_s['engine_start']:.1f} s")
            self.record |= {"arm": engine.arm, "mode": engine.mode}  # of its steps; other passes may run other arms
            self.record["memory"] = None if self.device == "cpu" else machine.torch_memory()
            shapes = self._fitting(engine)
            writer = RunWriter(self.run_dir, self.run_id)
            self.measured = Measurement(self.config, engine, self.device, shapes, writer, self.ranges, self.reporter)
            status = "failed"
            try:
                with self.ranges.run(f"{engine.name} {self.config.model.name} {self.config.workload.name}"):
                    self._verify(weights.path, checked.dtype)
                    yield
                status = "ok"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            except BaseException as error:
                self.record["error"] = f"{type(error).__name__}: {error}"
                raise
            finally:
                self._finish(status)
        finally:
            engine.close()

    def _start_record(self, limits: EngineConfig) -> None:
        config = asdict(self.config)
        # Where results go does not change them.
        hashed = json.dumps({k: v for k, v in config.items() if k != "results"}, sort_keys=True, default=str)
        self.record |= {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "engine": self.config.engine.name,
            "contestant": self.config.engine.contestant,
            "model": self.config.model.name,
            "workload": self.config.workload.name,
            "device": self.device,
            "dtype": limits.dtype,
            "config": config,
            "config_hash": hashlib.sha256(hashed.encode()).hexdigest()[:16],
            "limits": {k: v for k, v in asdict(limits).items() if k not in ("checkpoint", "options")},
            "provenance": machine.provenance(),
            "gpu_before": machine.gpu_state(),
        }
        self.record["ceilings"] = cached_record(self.record["provenance"], self.device)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - start

    def _fitting(self, engine: Engine) -> list[Shape]:
        """The shapes to run. InputError for work that the engine cannot hold; of a served workload, whose steps are
        only examples, those that do not fit are left out."""
        check_capacity(self.work, engine.capacity)
        reasons = {shape: too_large(shape, engine.capacity) for shape in self.work.shapes}
        self.warnings += [f"{reason} It is left out." for reason in reasons.values() if reason]
        return [shape for shape, reason in reasons.items() if not reason]

    def measure(self) -> None:
        """All passes of the config's workload. RunFailed: no shape, or no call, could be timed."""
        measured = self.measured
        if self.work.calls:
            with self._phase("timed"):
                rounds = self.record["rounds"] = measured.time_rounds(items(self.work), self.work.requests)
            if not any("median" in record for record in rounds):
                raise RunFailed(f"No call could be timed; the first failure: {measured.failures[0]}")
            return
        if self.work.loads:
            records = self.record["serving"] = []
            with self._phase("serve"):
                measured.warm_up_serving(self.work.served)
                for load in self.work.loads:
                    records.append(measured.serve_load(load))
            return
        if self.work.requests:
            with self._phase("serve"):
                self.record["throughput"] = measured.serve(self.work.requests)
        with self._phase("timed"):
            measured.time_all()
        if not self.work.requests and all(passes[TIMED]["status"] != "ok" for passes in measured.passes.values()):
            raise RunFailed(f"No shape could be timed; the first failure: {measured.failures[0]}")
        conf = self.config.instrument
        if conf.host:
            with self._phase("trace_host"):
                measured.trace_host()
        if conf.kernels:
            with self._phase("trace_kernels"):
                measured.trace_kernels()
        if conf.energy:
            with self._phase("energy"):
                measured.measure_energy()
        with self._cuda_profiler():
            with self._phase("trace_eager"):
                measured.trace("eager", timers=conf.eager)
            with self._phase("trace_graph"):
                measured.trace("graph", timers=conf.graph)

    @contextmanager
    def _cuda_profiler(self) -> Iterator[None]:
        """The traced passes are what `nsys profile --capture-range=cudaProfilerApi` waits for."""
        if self.device == "cpu" or not self.config.instrument.nvtx:
            yield
            return
        torch.cuda.profiler.start()
        try:
            yield
        finally:
            torch.cuda.profiler.stop()

    def _verify(self, checkpoint: Path, dtype: str) -> None:
        if not self.config.verify:
            self.record["verification"] = {"status": "skipped", "reason": "verify=false"}
            self.warnings.append("The engine's output was not verified (verify=false).")
            return
        self.reporter.say("Comparing its logits with transformers")
        with self._phase("verify"):
            vocab_size, seed = self.config.model.vocab_size, self.config.seed
            found = verify(self.measured.engine, checkpoint, dtype, self.device, vocab_size, seed)
        self.record["verification"] = found.record()
        sentence = found.sentence(self.config.engine.name)
        if not found.passed:
            raise RunFailed(f"Nothing was timed, since {sentence}")
        self.reporter.say(sentence)

    def _finish(self, status: str) -> None:
        """Write everything, whatever happened."""
        measured = self.measured
        self.record |= {
            "status": status,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "notes": measured.engine.notes,
            "capacity": asdict(measured.engine.capacity),
            "shapes": [{**asdict(shape), **passes} for shape, passes in measured.passes.items()],
            "traces": measured.traces,
            "failures": measured.failures,
            "gpu_after": machine.gpu_state(),
            "phases_s": self.phases_s,
        }
        self.record["warnings"] = [*self.warnings, *self._doubts()]
        measured.writer.flush()
        measured.writer.write_run(self.record)

    def _doubts(self) -> Iterator[str]:
        """What makes the numbers less believable."""
        yield from self.measured.engine.notes.get("notices", [])
        for mode, outcome in self.measured.traces.items():
            if outcome != "ok":
                yield f"No {mode} trace: {outcome}"
        passes = self.measured.passes
        for name in ("eager", "graph", KERNELS):
            shares = [found["closure"] for p in passes.values() if "closure" in (found := p.get(name, {}))]
            off = [share for share in shares if not LOWEST_CLOSURE <= share <= HIGHEST_CLOSURE]
            if off:
                least, most = f"{min(off):.1%}", f"{max(off):.1%}"
                yield (
                    f"In the {name} trace of {len(off)} of {len(shares)} shapes, layers and what lies outside them add "
                    f"up to {least if least == most else f'{least} to {most}'} of the step."
                )
        for shape, found in ((shape, p.get(KERNELS, {})) for shape, p in passes.items()):
            if (share := found.get("attributed", 1.0)) < LOWEST_ATTRIBUTED:
                yield f"{shape}: only {share:.1%} of kernel time has a place in the model."
            if refused := found.get("refused"):
                yield f"{shape}: {len(refused)} samples with other kernels are left out of the trace. {refused[0]}"
        for shape, found in ((shape, p.get(TIMED, {}).get("gpu") or {}) for shape, p in passes.items()):
            if found.get("throttled"):
                yield f"{shape}: the GPU was throttled ({', '.join(found['throttle_reasons'])})."
        if held := [reasons for reasons in self.measured.throttled_blocks if reasons]:
            names = ", ".join(sorted(set().union(*held)))
            yield f"After {len(held)} of {len(self.measured.throttled_blocks)} blocks the GPU was throttled ({names})."
        paces = {shape: pace for shape, p in passes.items() if (pace := p.get(TIMED, {}).get("host_pace"))}
        for shape, times in slowdowns(paces).items():
            yield f"{shape}: the host was {times:.1f} times slower than at its best in this run (host_pace)."
        for state in ("gpu_before", "gpu_after"):
            if others := (self.record[state] or {}).get("other_processes"):
                yield f"{len(others)} other processes were on the GPU ({state.replace('_', ' ')})."
