"""Baseline latency per layer, and the memory that batches and lengths need."""

from __future__ import annotations

from typing import Any

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, model, rows_of, run_of, runs
from scripts.tables.traces import CUPTI, KEYS, WHOLE_LAYER, keys_of, trace_of

BATCHES = (1, 8, 32, 64, 128, 256)
LENGTHS = (128, 512, 1024, 2048, 4096)
GIB = 2**30


@table("layer-times")
def layer_times(folder: str = REFERENCE, engines: str = "vllm,nano,fused") -> str:
    """µs of one whole layer inside decode graphs: the median over iterations and layers, and the range of layers."""
    found = runs(folder)
    cells: dict[tuple[str, int, int, int], dict[str, str]] = {}
    sources: dict[str, str] = {}
    for engine in engines.split(","):
        run = run_of(found, engine)
        layers = rows_of(found.layers, run)
        for shape in [shape for shape in run["shapes"] if shape["phase"] == "decode"]:
            trace = trace_of(layers, shape, "graph")
            if trace is not None:
                whole = trace.rows[trace.rows["op"] == WHOLE_LAYER]
                sources[engine] = "CUPTI" if trace.source == CUPTI else "events"
                each = whole.groupby("layer_index")["latency_us"].median()
                text = f"{each.median():.1f} ({each.min():.1f} to {each.max():.1f})"
                cells.setdefault(keys_of(shape), {})[engine] = text
    place = {name: KEYS.index(name) for name in ("batch_size", "context_len")}
    rows = [
        [str(key[place["batch_size"]]), str(key[place["context_len"]]), *(of.get(e, "") for e in engines.split(","))]
        for key, of in cells.items()
    ]
    heads = [f"{engine}, µs ({sources.get(engine, 'not traced')})" for engine in engines.split(",")]
    return markdown(["batch", "context", *heads], rows, left=0)


@table("memory-need")
def memory_need(name: str = "qwen3-0.6b") -> str:
    """GiB of a model's matrices and cache for each batch and length, bfloat16, blocks of 256 tokens filled."""
    config = model(name)
    rows = []
    for batch in BATCHES:
        needs = [config.weight_bytes + batch * -(-length // 256) * 256 * config.token_bytes for length in LENGTHS]
        rows.append([str(batch), *(f"{need / GIB:.2f}" for need in needs)])
    return markdown(["batch", *(f"{length} tokens each" for length in LENGTHS)], rows, left=0)


@table("grid")
def grid(folder: str = REFERENCE, engines: str = "vllm,nano", workload: str = "grid") -> str:
    """Each step of the grid: ms with its 95 % interval, and MiB that it takes for as long as it runs, beside weights
    and cache. Without such a run, a sentence that says so."""
    measured = {run["engine"]: run for run in runs(folder).runs if run["workload"] == workload}
    shown = [engine for engine in engines.split(",") if engine in measured]
    if not shown:
        return f"Not measured yet: `{folder}` has no `{workload}` run."
    cells: dict[tuple[str, int, int], dict[str, list[str]]] = {}
    for engine in shown:
        for shape in measured[engine]["shapes"]:
            key = (shape["phase"], shape["batch_size"], shape["tokens"])
            cells.setdefault(key, {})[engine] = _timed(shape.get("timed", {"status": "not reached"}))
    rows = [
        [phase, str(batch), f"{tokens:,}", *(cell for e in shown for cell in of.get(e, ["", ""]))]
        for (phase, batch, tokens), of in cells.items()
    ]
    head = [name for engine in shown for name in (f"{engine}, ms", f"{engine}, MiB")]
    absent = [engine for engine in engines.split(",") if engine not in shown]
    note = "\n\nMiB: what the step takes while it runs, beside weights and cache, as PyTorch counts it."
    note += f" Not measured: {', '.join(absent)}." if absent else ""
    return markdown(["phase", "batch", "tokens", *head], rows, left=1) + note


def _timed(timed: dict[str, Any]) -> list[str]:
    """[ms with interval, MiB], or the reason why there is no time."""
    if timed["status"] != "ok":
        return [timed["status"], ""]
    ms = [timed[name] / 1e3 for name in ("wall_us", "wall_us_low", "wall_us_high")]
    memory = timed.get("memory")
    mib = f"{(memory['peak_allocated_bytes'] - memory['allocated_bytes']) / 2**20:,.0f}" if memory else ""
    return [f"{ms[0]:.2f} ({ms[1]:.2f} to {ms[2]:.2f})", mib]
