"""A study from start to end: every product and number of rows, its variants checked, then timed in turns."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engines.base import InputError
from harness import machine
from harness.compare.comparison import turns
from harness.compare.ratios import paired_ratio
from harness.ops.products import Operands, Product, Vectors, expected, products, relative_error
from harness.ops.settings import OpConf, Settings, models
from harness.ops.timing import Graph, Loop, repeats_for, rotations_for
from harness.ops.variants import Call, Variant
from harness.progress import Reporter
from harness.results import RunWriter
from harness.roofline.ceilings import Ceilings, cached_record, from_record
from harness.statistics import StoppingRule, median_interval

ENGINE = "ops"
"""Stands in `run.json` where other runs name their engine."""
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Greatest relative error to float32 throughout; rounding in 16 bits makes 1e-3 to 6e-3."""
WARMUP_S = 0.05
"""Of each shape, over all variants: an idle GPU raises its clocks."""
CPU_CACHE_BYTES = 0
"""Without a GPU the study only shows that it works; two rotations must do."""


class Study:
    """One op in all shapes asked for, written to `run_dir`. `record` is what stands in `run.json`."""

    def __init__(self, settings: Settings, conf: OpConf, run_dir: Path, reporter: Reporter | None = None) -> None:
        self.settings, self.conf, self.run_dir = settings, conf, run_dir
        self.reporter = reporter or Reporter()
        self.device, self.dtype = settings.device_type, settings.dtype_name
        self.products = products(models(settings))
        self._runner: type[Graph] | type[Loop] = Graph if self.device == "cuda" else Loop
        self.rows = settings.rows or (conf.rows if self.device == "cuda" else conf.cpu_rows)
        self.record: dict[str, Any] = {}
        self.failures: list[str] = []
        self.wrong = False

    def run(self) -> dict[str, Any]:
        """Measure all; what was measured is kept, whatever happens. InputError: the folder is taken."""
        self._start_record()
        self.variants = self._variants()
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{ENGINE}-{uuid.uuid4().hex[:8]}"
        self.writer = RunWriter(self.run_dir, run_id)
        status = "failed"
        try:
            with self.reporter.bar(self.conf.name, len(self.products) * len(self.rows)) as done, torch.no_grad():
                for product in self.products:
                    self._product(product, done)
            status = "ok"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except BaseException as error:
            self.record["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._finish(status)
        return self.record

    def _start_record(self) -> None:
        self.record |= {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "engine": ENGINE,
            "contestant": False,
            "model": self.settings.model,
            "workload": self.conf.name,
            "device": self.device,
            "dtype": self.dtype,
            "config": {**asdict(self.settings), "variants": {n: asdict(v) for n, v in self.conf.variants.items()}},
            "provenance": machine.provenance(),
            "gpu_before": machine.gpu_state(),
            "shapes": [],
            "study": [],
        }
        self.record["ceilings"] = cached_record(self.record["provenance"], self.device)

    def _variants(self) -> list[Variant]:
        """Those that this machine has; why the others are left out goes into the record."""
        found: list[Variant] = []
        told: dict[str, Any] = {}
        for name, conf in self.conf.variants.items():
            try:
                found.append(Variant(name, conf, self.conf, self.device))
            except InputError as error:
                told[name] = {"status": str(error)}
                self.reporter.say(f"{name} is left out: {error}")
            else:
                told[name] = {"status": "ok", "version": found[-1].version, "max_rows": conf.max_rows}
        if not found:
            raise InputError(f"This machine has no variant of {self.conf.name} that was asked for.")
        self.record["variants"] = told
        return found

    def _product(self, product: Product, done: Callable[[str], None]) -> None:
        torch.compiler.reset()  # its cache holds few shapes of one function, and each product counts as another
        entry = {**asdict(product), "weight_rows": product.weight_rows, "rows": []}
        self.record["study"].append(entry)
        vectors = Vectors.random(product, getattr(torch, self.dtype), self.device, self.settings.seed)
        calls: dict[Variant, Call] = {}
        # From the most rows on, as in an engine's warm-up: what is compiled for any number of rows keeps the launch
        # that suited one of the first, and a launch for few rows is slow for many.
        for rows in sorted(self.rows, reverse=True):
            entry["rows"].insert(0, self._shape(product, rows, vectors, calls))
            done(product.shape(rows))
        if throttled := (machine.gpu_state() or {}).get("throttled"):
            entry["throttled"] = throttled

    def _shape(self, product: Product, rows: int, vectors: Vectors, calls: dict[Variant, Call]) -> dict[str, Any]:
        """Check and time all variants at one number of rows; what `run.json` says of it."""
        element_bytes = getattr(torch, self.dtype).itemsize
        cost = product.cost(rows, element_bytes)
        rotations = rotations_for(cost, _cache_bytes(self.device))
        repeats = repeats_for(cost, rotations)
        cells: dict[Variant, dict[str, Any]] = {}
        for variant in self.variants:
            if variant.takes(rows):
                saved = variant.saved_bytes(product, rows, element_bytes)
                cells[variant] = {"status": "ok", "error": None, "saved_bytes": saved}
        found: dict[str, Any] = {
            "rows": rows, "bytes": cost.bytes, "operations": cost.flop, "rotations": rotations,
            "calls": rotations * repeats, "variants": {variant.name: cell for variant, cell in cells.items()},
        }  # fmt: skip
        try:
            operands = Operands.random(
                product, rows, rotations, getattr(torch, self.dtype), self.device, self.settings.seed
            )
            right = {n: expected(product, operands.x[n], operands.weights[n], vectors) for n in (0, rotations - 1)}
        except torch.OutOfMemoryError as error:
            for variant, cell in cells.items():
                cell["status"] = self._failed(product, rows, variant, error)
            self._write(product, found, {})
            return found
        runners: dict[Variant, Graph | Loop] = {}
        for variant, cell in cells.items():
            try:
                if variant not in calls:
                    calls[variant] = variant.call(product, vectors)
                runner = self._runner(calls[variant], operands, repeats)
                outputs = runner.run()
                errors = [relative_error(outputs[n], right[n]) for n in right]
                if not all(error <= TOLERANCE[self.dtype] for error in errors):  # NaN is not
                    worst = max(errors, key=lambda error: (math.isnan(error), error))
                    raise _Wrong(f"Its relative error to float32 is {worst:.3g}, above {TOLERANCE[self.dtype]:g}.")
            except Exception as error:
                cell["status"] = self._failed(product, rows, variant, error)
            else:
                cell["error"], runners[variant] = max(errors), runner
        rules = self._timed(runners)
        for variant, rule in rules.items():
            of = median_interval(rule.samples)
            cells[variant] |= {
                "median_us": of.median, "low_us": of.low, "high_us": of.high, "samples": of.samples,
                "stopped": rule.done, **_achieved(cost.bytes, cost.flop, of.median, self.record["ceilings"]),
            }  # fmt: skip
        samples = {variant: rule.samples for variant, rule in rules.items()}
        self._write(product, found, {variant.name: values for variant, values in samples.items()})
        return found | self._verdict(samples)

    def _timed(self, runners: dict[Variant, Graph | Loop]) -> dict[Variant, StoppingRule]:
        """Turns in changing order, one sample each, until every median is known well enough or time is up."""
        deadline = time.perf_counter() + WARMUP_S
        while runners and time.perf_counter() < deadline:
            for runner in runners.values():
                runner.sample_us()
        s = self.settings
        rules = {v: StoppingRule(s.precision, s.min_iterations, s.max_iterations, s.max_seconds_per_shape)
                 for v in runners}  # fmt: skip
        number = 0
        while not all(rule.done for rule in rules.values()):
            for variant in turns(list(runners), number):
                rules[variant].add(runners[variant].sample_us())
            number += 1
        return rules

    def _write(self, product: Product, found: dict[str, Any], samples: dict[str, list[float]]) -> None:
        """`ops`: a row per sample; of a variant without one a row that tells the reason."""
        for name, cell in found["variants"].items():
            shared = {
                "op": product.op, "variant": name, "shape": product.shape(found["rows"]), "rows": found["rows"],
                "dtype": self.dtype, "mode": self._runner.mode, "source": self._runner.source,
                "bytes": found["bytes"], "operations": found["operations"], "saved_bytes": cell["saved_bytes"],
                "error": cell["error"], "status": cell["status"],
            }  # fmt: skip
            times: Sequence[float | None] = samples.get(name) or [None]
            self.writer.add_ops({**shared, "iteration": i, "latency_us": time_us} for i, time_us in enumerate(times))
        self.writer.flush()

    def _verdict(self, samples: dict[Variant, list[float]]) -> dict[str, Any]:
        """The fastest fused variant over the fastest unfused one, and every variant over the baseline, by pairs."""
        by_name = {variant.name: values for variant, values in samples.items()}
        found: dict[str, Any] = {}
        if base := by_name.get(self.conf.baseline):
            found["over_baseline"] = {
                name: _ratio(values, base) for name, values in by_name.items() if name != self.conf.baseline
            }
        sides = [[v for v in samples if v.conf.fused == fused] for fused in (True, False)]
        if all(sides):
            fused, unfused = (min(side, key=lambda v: median(samples[v])) for side in sides)
            found["fused_over_unfused"] = {
                "fused": fused.name, "unfused": unfused.name, **_ratio(samples[fused], samples[unfused])
            }  # fmt: skip
        return found

    def _failed(self, product: Product, rows: int, variant: Variant, error: Exception) -> str:
        """The reason, which also goes into the record."""
        self.wrong |= isinstance(error, _Wrong)
        reason = str(error) if isinstance(error, _Wrong) else f"{type(error).__name__}: {error}"
        reason = reason.strip().splitlines()[0]
        self.failures.append(f"{product.op} {product.shape(rows)}, {variant.name}: {reason}")
        return reason

    def _finish(self, status: str) -> None:
        cells = [c for p in self.record["study"] for r in p["rows"] for c in r["variants"].values()]
        errors = [c["error"] for c in cells if c["error"] is not None]
        self.record |= {
            "status": status,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "verification": {
                "status": "passed" if errors and not self.wrong else "failed",
                "reference": "the same in float32 throughout, in PyTorch",
                "tolerance": TOLERANCE[self.dtype],
                "max_error": max(errors, default=None),
            },
            "failures": self.failures,
            "warnings": list(self._doubts()),
            "gpu_after": machine.gpu_state(),
        }
        self.writer.flush()
        self.writer.write_run(self.record)

    def _doubts(self) -> Iterator[str]:
        if self.record["ceilings"] is None:
            yield "No ceilings are kept of this machine: `python -m harness.roofline` measures them."
        for product in self.record["study"]:
            if product.get("throttled"):
                yield f"The GPU was throttled at the end of {product['op']}, {product['weight_rows']} x {product['k']}."
        if others := (self.record["gpu_before"] or {}).get("other_processes"):
            yield f"{len(others)} other processes were on the GPU (gpu before)."


class _Wrong(Exception):
    """A variant's result that is not what it should be."""


def _cache_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CPU_CACHE_BYTES


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratio = paired_ratio(ours, theirs)
    if ratio.pairs < 2:  # an interval without ends
        return {"ratio": ratio.value, "pairs": ratio.pairs}
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "pairs": ratio.pairs,
            "verdict": ratio.verdict(higher_is_better=False)}  # fmt: skip


def _achieved(moved: int, operations: int, time_us: float, ceilings: dict[str, Any] | None) -> dict[str, float]:
    """Rates, and as shares of what this machine was seen to do."""
    rates = {"gb_per_s": moved / time_us / 1e3, "tflop_per_s": operations / time_us / 1e6}
    if ceilings is None:
        return rates
    limit: Ceilings = from_record(ceilings)
    read, matrix = rates["gb_per_s"] * 1e9, rates["tflop_per_s"] * 1e12
    return {**rates, "of_read": read / limit.read_bytes_per_s, "of_matrix": matrix / limit.matrix_flop_per_s}
