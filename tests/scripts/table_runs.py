"""Runs with chosen numbers for the tests of tables, comparisons of such runs, a small model, and a reader of rows."""

import json
from pathlib import Path
from typing import Any

from harness.compare.contestants import folder_name
from harness.results import RunWriter
from scripts.tables.sources import Model

# 3 query heads on 1 key/value head of 4; qkv rows (3 + 2) × 4 = 20
SMALL = Model(hidden_size=8, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, intermediate_size=10, vocab_size=50)


def cells(markdown: str) -> list[list[str]]:
    """The rows of a table, without its head and the text below it."""
    lines = markdown.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def made_up_run(**more: Any) -> dict[str, Any]:
    """A `run.json`: what tables read of it, and nothing else."""
    return {
        "engine": "nano", "workload": "latency", "model": "qwen3-0.6b", "dtype": "bfloat16",
        "weights": {"source": "random"},
        "provenance": {
            "gpu": {"name": "A GPU", "memory_mib": 1000}, "versions": {"torch": "2.9", "triton": "3.5"},
        },
        "limits": {"gpu_memory_utilization": 0.5},
        "capacity": {"kv_cache_tokens": 2560}, "notes": {"block_size": 256, "version": "0.20"}, "shapes": [],
    } | more  # fmt: skip


def write(
    folder: Path, run: dict[str, Any], layers: list[dict[str, Any]] | None = None,
    host: list[dict[str, Any]] | None = None, steps: list[dict[str, Any]] | None = None,
) -> None:  # fmt: skip
    writer = RunWriter(folder, f"{run['engine']}-{run['workload']}")
    writer.add_layers(layers or [])
    writer.add_host(host or [])
    writer.add_steps(steps or [])
    writer.flush()
    writer.write_run(run)


def layer_rows(mode: str, shape: tuple[str, int, int, int], times: dict[tuple[str, int, str], list[float]]) -> list:
    """Rows of `layers`: times holds (block, layer, op) → latency of each iteration, in µs."""
    phase, batch, new_tokens, context = shape
    return [
        {
            "engine": "nano", "arm": "default", "phase": phase, "batch_size": batch, "new_tokens": new_tokens,
            "context_len": context, "mode": mode, "source": "cuda_event", "iteration": iteration,
            "layer_index": layer, "block": block, "op": op, "kernels": "", "start_us": 0.0, "latency_us": latency,
        }
        for (block, layer, op), latencies in times.items() for iteration, latency in enumerate(latencies)
    ]  # fmt: skip


def cupti(rows: list) -> list:
    """The rows as kernels give them."""
    return [{**row, "source": "cupti"} for row in rows]


def block(label: str, number: int, value: float, **changed: Any) -> dict[str, Any]:
    return {
        "engine": label.partition(":")[0], "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 8,
        "tokens": 128, "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1,
        "value": value, "status": "ok", **changed,
    }  # fmt: skip


def compared(folder: Path, blocks_of: dict[str, list[dict[str, Any]]], launches: int = 1, **settings: Any) -> str:
    """A comparison's folder: blocks of each contestant, in each launch the same."""
    for launch in range(launches):
        for label, its_blocks in blocks_of.items():
            where = folder / f"launch-{launch}" / folder_name(label)
            writer = RunWriter(where, f"{launch}-{label}")
            writer.add_rounds({**block, "launch": launch} for block in its_blocks)
            writer.flush()
            provenance = {"gpu": {"name": "Toy"}, "versions": {"torch": "1", "triton": "2"}}
            engine = label.partition(":")[0]
            ran = {"engine": engine, "model": settings.get("model", {"name": "small"})["name"], "device": "cuda"}
            writer.write_run(ran | {"dtype": "float16", "weights": {"source": "local"}, "provenance": provenance})
    shared = {"engines": list(blocks_of), "baseline": next(iter(blocks_of)), "rounds": 2, "model": {"name": "small"}}
    reasons = settings.pop("reasons", {})
    record = {"settings": shared | settings, "reasons": reasons, "launches": launches}
    (folder / "comparison.json").write_text(json.dumps(record))
    return str(folder)
