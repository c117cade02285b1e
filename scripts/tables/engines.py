"""The engines beside each other."""

from __future__ import annotations

from typing import Any

from engines.base import InputError
from harness.results import Runs
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, rows_of, run_of, runs

ENGINES = ("vllm", "nano", "fused")


@table("engines")
def engines(folder: str = REFERENCE) -> str:
    """Step times and throughput of each engine, from the medians that each run's `run.json` holds of all its samples,
    and the sentence that says where they come from."""
    found = runs(folder).runs
    latency = [r for r in found if r["workload"] == "latency"]
    throughput = [r for r in found if r["workload"] == "throughput"]
    first = latency[0]
    rows = step_rows(latency) + ([throughput_row(throughput)] if throughput else [])
    versions = first["provenance"]["versions"]
    vllm = next((r["notes"]["version"] for r in latency if r["engine"] == "vllm"), "none")
    source = (
        f"One {first['provenance']['gpu']['name']}, {first['weights']['source']} weights, torch {versions['torch']}, "
        f"Triton {versions['triton']}, vLLM {vllm}. Steps: median wall time of one engine step with its 95 % interval; "
        "vLLM's run in process, one scheduler step at a time, so that its host work is not hidden behind the GPU; its "
        "requests run in its own default way. Each engine was measured in a run of its own, not interleaved. "
        f"Runs: `{folder}`; table: `python scripts/doc_tables.py --write`."
    )
    return markdown([f"{first['model']}, {first['dtype']}", *ENGINES], rows) + "\n\n" + source


def step_rows(latency: list[dict[str, Any]]) -> list[list[str]]:
    """One row per shape of the latency runs: milliseconds per step of each engine."""
    times: dict[tuple[str, int, int], dict[str, str]] = {}
    for run in latency:
        for shape in run["shapes"]:
            key = (shape["phase"], shape["batch_size"], shape["tokens"])
            timed = shape.get("timed", {"status": "not reached"})
            if timed["status"] == "ok":
                low, high = timed["wall_us_low"] / 1e3, timed["wall_us_high"] / 1e3
                cell = f"{timed['wall_us'] / 1e3:.2f} ({low:.2f} to {high:.2f})"
            else:
                cell = timed["status"]
            times.setdefault(key, {})[run["engine"]] = cell
    rows = []
    for (phase, batch, tokens), cells in times.items():
        size = f"{batch} × {tokens} tokens" if phase == "prefill" else f"batch {batch}, context {tokens}"
        rows.append([f"{phase}, {size}, ms", *(cells.get(engine, "") for engine in ENGINES)])
    return rows


def throughput_row(throughput: list[dict[str, Any]]) -> list[str]:
    """Output tokens per second of the throughput runs."""
    cells = {run["engine"]: f"{run['throughput']['output_tok_s']:,.0f}" for run in throughput}
    served = throughput[0]["throughput"]
    what = f"{served['requests']} requests, {served['output_tokens']:,} output tokens, tok/s"
    return [what, *(cells.get(engine, "") for engine in ENGINES)]


@table("step-history")
def step_history(folders: str, engine: str = "fused") -> str:
    """Step times of one engine in latency runs on GPUs of one kind: of each of `folders` (joined by commas), oldest
    first, the last one's over the first one's beside them. Decode steps by CUPTI: until 2026-11-28 an engine that
    launches ahead was timed too short. InputError: they are of several kinds."""
    found = [run_of(runs(folder), engine) for folder in folders.split(",")]
    gpus = {run["provenance"]["gpu"]["name"] for run in found}
    if len(gpus) > 1:
        raise InputError(f"Steps on different GPUs are no history: {', '.join(sorted(gpus))}.")
    times = [_medians(run, runs(folder)) for run, folder in zip(found, folders.split(","), strict=True)]
    rows = [
        [
            what, *(f"{one[what] / 1e3:.3f}" if what in one else "–" for one in times),
            f"{times[-1][what] / times[0][what]:.2f}×",
        ]
        for what in times[-1]
        if what in times[0]
    ]  # fmt: skip
    days = [run["started"][:10] for run in found]
    named = ", ".join(f"{day} `{folder}`" for day, folder in zip(days, folders.split(","), strict=True))
    last = found[-1]
    source = (
        f"{engine}, {last['model']}, {last['dtype']}, one {last['provenance']['gpu']['name']} for each run: ms per "
        f"step, medians, not interleaved; prefill by the host's clock, decode by CUPTI, from the first kernel to the "
        f"last. Runs: {named}."
    )
    return "\n\n".join([markdown(["step", *days, "last / first"], rows), source])


def _medians(run: dict[str, Any], found: Runs) -> dict[str, float]:
    """µs by shape: prefill as it was timed, decode as CUPTI saw it."""
    prefill = {
        f"prefill {shape['batch_size']} × {shape['tokens']:,}": shape["timed"]["wall_us"]
        for shape in run["shapes"]
        if shape["phase"] == "prefill" and shape.get("timed", {}).get("status") == "ok"
    }
    steps = rows_of(found.steps, run)
    traced = steps[(steps["phase"] == "decode") & (steps["source"] == "cupti") & (steps["status"] == "ok")]
    decode = traced.groupby(["context_len", "batch_size"])["gpu_us"].median()
    return prefill | {f"decode {batch} × {context:,}": us for (context, batch), us in decode.items()}
