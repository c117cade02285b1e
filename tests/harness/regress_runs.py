"""Runs for the tests of harness.regress: folders with chosen samples, and samples drawn from recorded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from harness.results import RunWriter, load
from harness.schema import STEPS
from harness.workloads import Shape as Workload

Shape = tuple[str, int, int]
"""Phase, batch size, tokens."""
REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "h200"
DECODE: Shape = ("decode", 8, 128)
NEAR = 3


def step_rows(run_id: str, engine: str, shape: Shape, samples_us: Sequence[float] | NDArray[np.float64]) -> pa.Table:
    """Rows of `steps` without pandas, which takes ten times as long to repeat a string."""
    phase, batch_size, tokens = shape
    new_tokens, context_len = (batch_size * tokens, 0) if phase == "prefill" else (batch_size, tokens)
    same = {"run_id": run_id, "engine": engine, "arm": "default", "phase": phase, "batch_size": batch_size,
            "new_tokens": new_tokens, "context_len": context_len, "mode": "graph", "source": "host",
            "instrumented": False, "gpu_us": None, "host_us": None, "status": "ok"}  # fmt: skip
    n = len(samples_us)
    columns = {name: pa.repeat(pa.scalar(value, STEPS.field(name).type), n) for name, value in same.items()}
    columns |= {"iteration": np.arange(n, dtype=np.int32), "wall_us": np.asarray(samples_us, dtype=np.float64)}
    return pa.table(columns, schema=STEPS)


def round_row(number: int, value: float | None, metric: str = "tpot_ms", **changed: Any) -> dict:
    return {
        "engine": "nano", "arm": "default", "metric": metric, "phase": "decode", "batch_size": 8, "tokens": 128,
        "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1, "value": value,
        "status": "ok", **changed,
    }  # fmt: skip


def record(**changed: Any) -> dict[str, Any]:
    return {
        "status": "ok", "engine": "nano", "arm": "default", "model": "qwen3-0.6b", "workload": "latency",
        "device": "cuda", "dtype": "bfloat16", "verification": {"status": "passed"},
        "provenance": {"versions": {"torch": "2.11.0"}, "gpu": {"name": "NVIDIA H200", "driver": "580"}},
        **changed,
    }  # fmt: skip


def write(
    folder: Path, steps: Mapping[Shape, Sequence[float] | NDArray[np.float64]] | None = None,
    rounds: Sequence[Mapping[str, Any]] = (), **changed: Any,
) -> Path:  # fmt: skip
    """A run in `folder`, whose id is the folder's last two names."""
    run_id = "-".join(folder.parts[-2:])
    writer = RunWriter(folder, run_id)
    run = record(**changed)
    writer.add_rounds(rounds)
    writer.flush()
    writer.write_run(run)
    if steps:  # as a whole: row by row, a thousand runs would take minutes
        table = pa.concat_tables([step_rows(run_id, run["engine"], shape, us) for shape, us in steps.items()])
        pq.write_table(table, folder / "steps.parquet")
    return folder


def two_sides(tmp_path: Path, factor: float = 1.0, launches: int = 3) -> tuple[str, str]:
    """Folders of launches that hardly differ, the candidate's slower by `factor`."""
    for side, times in (("base", 1.0), ("cand", factor)):
        for launch in range(launches):
            steps = 1000 * times * (1 + 0.0005 * launch + 0.001 * np.sin(np.arange(30)))
            write(tmp_path / side / str(launch), {DECODE: steps})
    return str(tmp_path / "base"), str(tmp_path / "cand")


@dataclass(frozen=True)
class Recorded:
    """Recorded step times of one shape in us, in the order in which they were taken, of a launch that took `count`.

    places: of each sample among the `width` decode steps on one batch of prompts, whose contexts grow; None in prefill
    """

    samples: NDArray[np.float64]
    count: int
    places: NDArray[np.int64] | None = None
    width: int = 1

    def launch(self, rng: np.random.Generator, noise: float, slowdown: float = 0.0) -> NDArray[np.float64]:
        """Another launch of as many steps, all of them off by one draw of launch noise (standard deviation of the
        logarithm) and slower by the share `slowdown`.

        Of prefill, blocks of neighbours drawn from the samples. Of decode, at each place in turn one of the NEAR
        samples that were taken nearest to it: each launch goes through the same contexts, and a step takes longer with
        more.
        """
        n = len(self.samples)
        if self.places is None:
            block = int(np.ceil(n ** (1 / 3)))
            starts = rng.integers(n, size=-(-self.count // block))
            index = ((starts[:, None] + np.arange(block)) % n).ravel()[: self.count]
        else:
            apart = np.abs(self.places[None, :] - np.arange(self.width)[:, None])
            nearest = np.argsort(np.minimum(apart, self.width - apart), axis=1, kind="stable")[:, :NEAR]
            index = nearest[np.arange(self.count) % self.width, rng.integers(nearest.shape[1], size=self.count)]
        return self.samples[index] * np.exp(rng.normal(0, noise)) * (1 + slowdown)


@cache
def recorded(engine: str = "fused") -> dict[Shape, Recorded]:
    """What the committed `latency` run holds, which keeps some of the steps of each launch."""
    runs = load(REFERENCE / f"{engine}-qwen3-0.6b-latency")
    counts = {(s["phase"], s["batch_size"], s["tokens"]): s["timed"]["samples"] for s in runs.runs[0]["shapes"]}
    steps = runs.steps[~runs.steps["instrumented"] & (runs.steps["status"] == "ok")]
    found = {}
    for (phase, batch, new, context), group in steps.groupby(["phase", "batch_size", "new_tokens", "context_len"]):
        shape = (phase, batch, new // batch if phase == "prefill" else context)
        group = group.sort_values("iteration")
        width = Workload(*shape).width  # type: ignore[arg-type]
        places = None if phase == "prefill" else group["iteration"].to_numpy() % width
        found[shape] = Recorded(group["wall_us"].to_numpy(), counts[shape], places, width)
    return found
