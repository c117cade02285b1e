"""Rows of `steps` and `layers` from samples, and what a shape's samples say together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from engines.base import NO_LAYER, WHOLE_LAYER, Engine
from harness.instruments.kernels import KernelSample
from harness.instruments.probe import StepTrace
from harness.passes import Sample
from harness.statistics import median_interval
from harness.workloads import Shape


def keys(engine: Engine, shape: Shape, mode: str, source: str, iteration: int) -> dict[str, Any]:
    """The columns that say whose row this is; `run_id` is the writer's."""
    return {
        "engine": engine.name,
        "arm": engine.arm,
        "phase": shape.phase,
        "batch_size": shape.batch_size,
        "new_tokens": shape.new_tokens,
        "context_len": shape.context_len,
        "mode": mode,
        "source": source,
        "iteration": iteration,
    }


def timed_mode(engine: Engine, shape: Shape) -> str:
    """How the engine runs such a step untraced: graphs hold decode steps only."""
    return "eager" if shape.phase == "prefill" and engine.mode == "graph" else engine.mode


def timed_rows(engine: Engine, shape: Shape, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """`steps` of a timed pass."""
    mode = timed_mode(engine, shape)
    return [
        {**keys(engine, shape, mode, "host", i), "wall_us": s.wall_us, "instrumented": False, "status": "ok"}
        for i, s in enumerate(samples)
    ]


def traced_rows(
    engine: Engine, shape: Shape, samples: Sequence[Sample], mode: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`steps` and `layers` of a traced pass in `mode`. A trace that saw how its step ran knows the mode better."""
    steps, layers = [], []
    for i, sample in enumerate(samples):
        trace = sample.trace or StepTrace([])
        key = keys(engine, shape, trace.mode if trace.intervals else mode, trace.source, i)
        host_us = None if trace.gpu_us is None else max(0.0, sample.wall_us - trace.gpu_us)
        times = {"wall_us": sample.wall_us, "gpu_us": trace.gpu_us, "host_us": host_us}
        steps.append({**key, **times, "instrumented": True, "status": "ok"})
        layers += [{**key, **asdict(interval)} for interval in trace.intervals]
    return steps, layers


def host_rows(engine: Engine, shape: Shape, steps: Sequence[dict[str, float]], mode: str) -> list[dict[str, Any]]:
    """`host` of a pass: a row per step and phase."""
    return [
        {**keys(engine, shape, mode, "host", i), "host_phase": phase, "latency_us": latency_us}
        for i, step in enumerate(steps)
        for phase, latency_us in step.items()
    ]


def failed_row(engine: Engine, shape: Shape, mode: str, instrumented: bool, reason: str) -> dict[str, Any]:
    """The row of a shape that has no time."""
    return {**keys(engine, shape, mode, "host", 0), "instrumented": instrumented, "status": reason}


def closure(samples: Iterable[Sample]) -> float | None:
    """Median of (layers + what lies outside them) / step: on the GPU where that is known, else on the host."""
    shares = []
    for sample in samples:
        if sample.trace is None or not sample.trace.intervals:
            continue
        # Whole layers already hold their ops.
        parts = (i for i in sample.trace.intervals if i.op == WHOLE_LAYER or i.layer_index == NO_LAYER)
        shares.append(sum(i.latency_us for i in parts) / (sample.trace.gpu_us or sample.wall_us))
    return statistics.median(shares) if shares else None


def pass_record(engine: Engine, shape: Shape, samples: Sequence[Sample], mode: str) -> dict[str, Any]:
    """What `run.json` says of one pass over one shape. The arm is the one that runs now: engines change it."""
    median = median_interval([s.wall_us for s in samples])
    record = {
        "status": "ok",
        "arm": engine.arm,
        "mode": mode,
        "samples": median.samples,
        "wall_us": median.median,
        "wall_us_low": median.low,
        "wall_us_high": median.high,
    }
    if shape.phase == "decode":
        record["mean_context_len"] = statistics.fmean(s.context_len for s in samples)
    return record


def kernels_record(samples: Sequence[KernelSample]) -> dict[str, Any]:
    """What `run.json` says of a shape's kernels: medians, and the lowest share of kernel time that has a site."""
    names = ("gaps", "overlap", "closure", "kernels", "launches")
    medians = {name: statistics.median(getattr(s, name) for s in samples) for name in names}
    return {"attributed": min(s.attributed for s in samples), **medians}


def throughput_record(engine: Engine, rows: Sequence[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    """What `run.json` says of a served workload; `rows` are those of `requests`."""
    output = sum(row["output_tokens"] for row in rows)
    prompt = sum(row["prompt_tokens"] for row in rows)
    record: dict[str, Any] = {
        "arm": engine.arm,
        "requests": len(rows),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "wall_s": wall_s,
        "output_tok_s": output / wall_s,
        "total_tok_s": (prompt + output) / wall_s,
    }
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        values = sorted(row[name] for row in rows if row[name] is not None)
        if values:
            record[f"{name}_p50"] = statistics.median(values)
            record[f"{name}_p99"] = values[min(len(values) - 1, round(0.99 * (len(values) - 1)))]
    return record
