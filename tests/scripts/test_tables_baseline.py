"""Tables of the baseline: steps of a grid, the memory that batches need, and times per layer."""

from pathlib import Path

from harness.results import RunWriter
from scripts.tables import baseline
from scripts.tables.sources import MODELS
from tests.scripts.table_runs import cells, made_up_run, write


def test_grid_by_hand(tmp_path: Path) -> None:
    memory = {"peak_allocated_bytes": 30 * 2**20, "allocated_bytes": 10 * 2**20}
    timed = {"status": "ok", "wall_us": 1500.0, "wall_us_low": 1400.0, "wall_us_high": 1600.0, "memory": memory}
    shapes = [
        {"phase": "decode", "batch_size": 8, "tokens": 4000, "timed": timed},
        {"phase": "decode", "batch_size": 256, "tokens": 4000, "timed": {"status": "out of memory"}},
        {"phase": "decode", "batch_size": 9, "tokens": 4000},
    ]
    write(tmp_path / "nano", made_up_run(workload="grid", shapes=shapes))
    made = baseline.grid(str(tmp_path))
    assert cells(made) == [
        ["decode", "8", "4,000", "1.50 (1.40 to 1.60)", "20"],
        ["decode", "256", "4,000", "out of memory", ""],
        ["decode", "9", "4,000", "not reached", ""],
    ]
    assert made.endswith("Not measured: vllm.")
    assert baseline.grid(str(tmp_path), workload="latency").startswith("Not measured yet")


def test_memory_that_batches_need() -> None:
    rows = {row[0]: row[1:] for row in cells(baseline.memory_need("qwen3-0.6b"))}
    # 15,728,640 elements in each of 28 layers, 151,936 × 1,024 in the tied head; 114,688 bytes per token
    weights = (28 * 15_728_640 + 151_936 * 1024) * 2
    for batch, length, place in ((1, 128, 0), (256, 4096, 4)):
        tokens = batch * max(length, 256)  # whole blocks
        assert rows[str(batch)][place] == f"{(weights + tokens * 114_688) / 2**30:.2f}"


def test_layer_times_are_medians_over_iterations_then_layers(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    key = {
        "engine": "nano", "arm": "default", "phase": "decode", "batch_size": 2, "new_tokens": 2, "context_len": 16,
        "mode": "graph", "source": "cuda_event", "block": "layer", "op": "layer", "kernels": "", "start_us": 0.0,
    }  # fmt: skip
    times = {0: (10.0, 11.0, 90.0), 1: (20.0, 21.0, 22.0), 2: (30.0, 31.0, 32.0)}
    writer.add_layers(
        {**key, "layer_index": layer, "iteration": i, "latency_us": us}
        for layer, each in times.items()
        for i, us in enumerate(each)
    )
    writer.flush()
    shape = {"phase": "decode", "batch_size": 2, "tokens": 16}
    writer.write_run({"engine": "nano", "workload": "latency", "model": MODELS[0], "shapes": [shape]})
    assert cells(baseline.layer_times(str(tmp_path), "nano")) == [["2", "16", "21.0 (11.0 to 31.0)"]]
