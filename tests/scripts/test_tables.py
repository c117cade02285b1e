"""What the tables' functions compute, on cases small enough to do by hand."""

import json
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import InputError, Request, SamplingParams
from engines.nano.graphs import DecodeBuffers
from engines.nano.sequence import Sequence
from harness.compare.contestants import folder_name
from harness.results import RunWriter
from scripts.tables import (
    attention,
    baseline,
    blocks,
    cache,
    choices,
    comparison,
    costs,
    engines,
    goals,
    pairs,
    traces,
    verification,
)
from scripts.tables.registry import TABLES, made
from scripts.tables.sources import MODELS, REFERENCE, ROOT, Model, floor_us, model, runs

# 3 query heads on 1 key/value head of 4; qkv rows (3 + 2) × 4 = 20
SMALL = Model(hidden_size=8, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, intermediate_size=10, vocab_size=50)


def cells(markdown: str) -> list[list[str]]:
    """The rows of a table, without its head and the text below it."""
    lines = markdown.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- models, pairs, attention ---


def test_models_are_those_of_conf() -> None:
    small = model("qwen3-0.6b")
    assert (small.hidden_size, small.num_layers, small.num_heads, small.num_kv_heads) == (1024, 28, 16, 8)
    assert set(MODELS) | {"tiny"} == {p.stem for p in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")}
    with pytest.raises(InputError, match="no model gpt"):
        model("gpt")


def test_layer_bytes() -> None:
    # qkv 20×8, o 8×12, gate and up 20×8, down 8×10: 496 elements of 2 bytes
    assert SMALL.layer_weight_bytes == 992
    assert SMALL.layer_token_bytes == torch.empty(2, 1, 4, dtype=torch.bfloat16).nbytes
    # qkv 8.39, o 4.19, gate and up 12.58, down 6.29 MB
    assert model("qwen3-0.6b").layer_weight_bytes == (4096 + 2048 + 6144 + 3072) * 1024 * 2


def test_a_pair_by_hand() -> None:
    pair = pairs.Pair(SMALL, "input_norm", "qkv_proj", rows=2)
    x = residual = total = normalised = torch.empty(2, 8, dtype=torch.bfloat16).nbytes  # 32 bytes
    y = torch.empty(2, 20, dtype=torch.bfloat16).nbytes  # 80
    assert pair.weight_shape == (20, 8) and pair.one.weight_bytes == 320
    assert pair.two.activation_bytes == (x + residual + total + normalised) + (normalised + y) == 240
    assert pair.one.activation_bytes == x + residual + total + y == 176
    assert pair.saved_bytes == 64
    assert pair.saved_share == pytest.approx(64 / 560)
    assert pair.one.flop == 640  # 2 × 20 outputs of 8 multiplications and 8 additions
    assert pair.one.bytes == 496


def test_pairs_of_a_model() -> None:
    found = {pair.name: (*pair.weight_shape, pair.rows) for pair in pairs.pairs_of(SMALL, 3)}
    assert found == {
        "input_norm + qkv_proj": (20, 8, 3),
        "post_norm + gate_up_proj": (20, 8, 3),
        "final_norm + lm_head": (50, 8, 3),
    }
    assert [p.name for p in pairs.pairs_of(SMALL, 257)] == ["input_norm + qkv_proj", "post_norm + gate_up_proj"]


def test_pairs_table_of_qwen3() -> None:
    rows = cells(pairs.pairs("qwen3-0.6b"))
    assert len(rows) == 5 + 5 + 3
    # 4096 × 1024 × 2 B = 8.389 MB; 256 rows: (5 × 1024 + 4096) × 256 × 2 B = 4.719 MB, saved 2 × 256 × 1024 × 2 B;
    # 2 × 256 × 4096 × 1024 = 2.147 GFLOP over 8.389 + 3.670 MB; those bytes at 4.8 TB/s take 2.51 µs
    assert rows[2] == [
        "input_norm + qkv_proj", "4096 × 1024", "256", "8.39", "4.719", "3.670", "1.049", "8.0%",
        "2.147", "178.1", "2.5",
    ]  # fmt: skip


def test_pairs_of_the_other_models() -> None:
    rows = cells(pairs.pairs_by_model())
    assert len(rows) == 5 * 3
    assert rows[0][:3] == ["qwen3-1.7b", "input_norm + qkv_proj", "4096 × 2048<br>16.78 MB"]
    # one row: (5 × 2048 + 4096) × 2 B, (3 × 2048 + 4096) × 2 B; 2 × 4096 × 2048 operations; 16.80 MB at 4.8 TB/s
    assert rows[0][3] == "0.029 → 0.020 MB<br>−0.008 MB (0.0%)<br>0.017 GFLOP<br>1.0 FLOP/B<br>3.5 µs"
    assert (rows[2][1], rows[2][6], rows[2][7]) == ("final_norm + lm_head", "", "")


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert floor_us(4.8e6, 0) == pytest.approx(1.0)
    assert floor_us(0, 989e6) == pytest.approx(1.0)
    assert floor_us(4.8e6, 2 * 989e6) == pytest.approx(2.0)


def test_attention_counts_each_score_once() -> None:
    tokens, flop = 7, 0
    for _head in range(SMALL.num_heads):
        for query in range(tokens):
            for _key in range(query + 1):
                flop += 2 * SMALL.head_dim  # score
                flop += 2 * SMALL.head_dim  # weighted sum
    assert attention.prefill(SMALL, tokens).flop == flop
    assert attention.decode(SMALL, tokens).flop == 2 * 2 * 4 * 3 * 7


def test_attention_bytes_are_its_tensors() -> None:
    def size(*shape: int) -> int:
        return torch.empty(*shape, dtype=torch.bfloat16).nbytes

    assert attention.decode(SMALL, 7).bytes == 2 * size(3, 4) + 2 * size(7, 1, 4)
    assert attention.prefill(SMALL, 7).bytes == 2 * size(7, 3, 4) + 2 * size(7, 1, 4)


def test_attention_table_counts_all_layers() -> None:
    row = next(r for r in cells(attention.attention()) if r[0] == "qwen3-0.6b, qwen3-1.7b" and r[2] == "1,024")
    # decode: 28 × (2 × 4096 + 1024 × 4096) B = 117.7 MB; 28 × 4 × 16 × 128 × 1024 = 234.9 MFLOP; 24.5 µs at 4.8 TB/s
    assert row[1:7] == ["16 : 8", "1,024", "117.7", "234.9", "2.00", "24.5"]


def test_break_even() -> None:
    row = cells(attention.break_even())[0]
    assert row == ["qwen3-0.6b", "881", "114,688", "7,680"]  # 28 × 31,457,280 B over 28 × 4,096 B


# --- the cache ---


def test_cache_bytes() -> None:
    row = next(r for r in cells(cache.cache_bytes()) if r[0] == "llama-3.2-1b")
    # 2 × 16 layers × 8 heads × 64 × 2 B = 32,768; × 256 = 8 MiB; × 4096 = 128 MiB; a GiB holds 32,768
    assert row == ["llama-3.2-1b", "16 × 8 × 64", "32,768", "8.00", "128", "32,768"]


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


def test_cache_size(tmp_path: Path) -> None:
    write(tmp_path / "run", made_up_run())
    # half of 1000 MiB; 2560 tokens × 114,688 B = 280 MiB
    assert cells(cache.cache_size(str(tmp_path))) == [
        ["the GPU's memory", "1,000"],
        ["50% of it", "500"],
        ["cache: 10 blocks × 256 tokens × 114,688 bytes", "280"],
        ["left for weights, the largest step, graphs and CUDA itself", "220"],
    ]
    with pytest.raises(InputError, match="no latency run of engine fused"):
        cache.cache_size(str(tmp_path), "fused")


def test_memory_beside_by_hand(tmp_path: Path) -> None:
    """Of qwen3-0.6b a layer's matrices have 15,728,640 elements, the head 151,936 × 1,024."""
    known = (28 * 15_728_640 + 151_936 * 1024) * 2 + 2560 * 114_688

    def memory(allocated: int, peak: int, reserved: int, device: int) -> dict[str, int]:
        sizes = {"allocated": allocated, "peak_allocated": peak, "reserved": reserved, "device_used": device}
        return {f"{name}_bytes": known + size * 2**20 for name, size in sizes.items()}

    shapes = [
        {"timed": {"status": "ok", "memory": memory(10, 30, 40, 70)}},
        {"timed": {"status": "ok", "memory": memory(10, 20, 50, 60)}},
        {"timed": {"status": "out of memory"}},
    ]
    write(tmp_path / "run", made_up_run(shapes=shapes))
    assert cells(cache.memory_beside(str(tmp_path), "nano")) == [["nano", "2,560", "10", "30", "50", "70"]]


# --- blocks ---


def test_slots_are_those_that_a_decode_step_writes() -> None:
    sequence = Sequence(Request("a", tuple(range(7)), SamplingParams()))
    sequence.block_table = [5, 2]
    assert blocks.slots_of(sequence, 2, 7) == (22, 23, 8, 9, 10)
    buffers = DecodeBuffers(1, 2, 16, torch.device("cpu"))
    buffers.fill([sequence], blocks.BLOCK_SIZE)
    assert blocks.slots_of(sequence, 6, 7) == (int(buffers.numbers[2, 0]),)


def test_the_worked_example_shows_what_the_text_says_of_it() -> None:
    events = blocks.play()
    by_name = [{share.name: share for share in event.shares} for event in events]
    kinds = [event.kind for event in events]
    assert kinds == ["prefill"] * 2 + ["decode"] * 3 + ["prefill"] + ["decode"] * 4 + ["prefill"]
    # the budget of 12 tokens cuts B's prompt after 5
    assert [(s.name, s.start, s.end) for s in events[0].shares] == [("A", 0, 7), ("B", 0, 5)]
    assert by_name[1]["B"].slots == (13,)
    # A and B computed the same first block in one step: only A's is known by its hash, neither is shared
    assert [block for block, _ in events[0].hashes] == [0]
    assert (events[4].finished, events[4].ref_counts, events[4].free) == (("A",), (0, 0, 1, 1, 0, 1), (4, 1, 0))
    # C starts behind A's first block, which is its again; its second block differs from A's in its last token
    assert (by_name[5]["C"].start, by_name[5]["C"].block_table) == (4, (0, 4, 1))
    assert dict(events[5].hashes)[0] == dict(events[4].hashes)[0]
    # B needs a block and none is free: C, which came last, gives way and comes back behind its first two blocks
    assert (events[8].free, events[9].preempted, by_name[9]["B"].block_table) == ((), ("C",), (2, 3, 5, 1))
    assert (by_name[10]["C"].start, by_name[10]["C"].block_table) == (8, (0, 4, 1, 5))
    assert sorted(events[-1].free) == list(range(blocks.NUM_BLOCKS))


def test_the_worked_example_as_a_table() -> None:
    rows = cells(blocks.blocks())
    assert rows[1][:6] == ["1", "prefill:<br>B token 5", "B [2, 3]", "B 13", "1 1 1 1 0 0", "4, 5"]
    assert rows[9][1] == "decode:<br>B token 12<br>preempts C<br>ends B"


# --- measured times ---


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


def test_decode_steps_by_hand(tmp_path: Path) -> None:
    ok = {"status": "ok"}
    shape = {
        "phase": "decode", "batch_size": 4, "tokens": 16,
        "timed": {**ok, "wall_us": 800.0}, "graph": {**ok, "wall_us": 1000.0},
    }  # fmt: skip
    untraced = {"phase": "decode", "batch_size": 9, "tokens": 16, "timed": {**ok, "wall_us": 1.0}}
    rows = layer_rows(
        "graph",
        ("decode", 4, 4, 16),
        {
            ("layer", 0, "layer"): [300.0, 310.0, 390.0],  # median 310
            ("layer", 1, "layer"): [200.0, 190.0, 270.0],  # median 200
            ("embed", -1, "embed"): [20.0],
            ("head", -1, "final_norm"): [10.0],
            ("head", -1, "lm_head"): [60.0],
            ("sample", -1, "sample"): [100.0],
        },
    )
    rows += layer_rows("eager", ("decode", 4, 4, 16), {("layer", 0, "layer"): [9999.0]})
    write(tmp_path / "run", made_up_run(shapes=[shape, untraced]), rows)
    # 1000 − 510 − 90 − 100 = 300
    assert cells(traces.decode_steps(str(tmp_path))) == [
        ["4", "16", "0.80", "1.00", "0.51", "0.09", "0.10", "0.30", "30%"]
    ]
    # 510 µs over the model's 28 layers; 31.457 MB of matrices and 4 × 16 × 4096 B of cache at 4.8 TB/s: 6.61 µs
    assert cells(traces.layer_floors(str(tmp_path))) == [["4", "16", "18.2", "31.5", "0.3", "6.6", "2.8"]]
    assert "`rest` is of the traced step" in traces.decode_steps(str(tmp_path))


def cupti(rows: list) -> list:
    """The rows as kernels give them."""
    return [{**row, "source": "cupti"} for row in rows]


def test_where_kernels_were_recorded_tables_read_them_and_no_events(tmp_path: Path) -> None:
    ok = {"status": "ok"}
    shape = {
        "phase": "decode", "batch_size": 4, "tokens": 16, "timed": {**ok, "wall_us": 800.0},
        "graph": {**ok, "wall_us": 1000.0}, "kernels": {**ok, "wall_us": 900.0},
    }  # fmt: skip
    where = ("decode", 4, 4, 16)
    rows = layer_rows("graph", where, {("layer", 0, "layer"): [9999.0], ("sample", -1, "sample"): [9999.0]})
    kernels = {
        ("layer", 0, "layer"): [100.0, 100.0, 130.0],
        ("layer", 1, "layer"): [200.0, 210.0, 200.0],
        ("head", -1, "final_norm+lm_head"): [50.0],
        ("embed", -1, "embed+input_norm"): [10.0],
        ("sample", -1, "sample"): [40.0, 40.0, 40.0],
        ("step", -1, "prepare"): [7.0],
    }
    rows += cupti(layer_rows("compiled", where, kernels))
    rows += cupti(layer_rows("compiled", where, {("sample", -1, "sample"): [20.0, 20.0, 20.0]}))  # a second kernel
    write(tmp_path / "run", made_up_run(shapes=[shape]), rows)
    # layers 100 + 200, head 60, sampling 40 + 20 in each step; of the untraced 800: 800 − 420
    made = traces.decode_steps(str(tmp_path))
    assert cells(made)[0] == ["4", "16", "0.80", "0.90", "0.30", "0.06", "0.06", "0.38", "48%"]
    assert "CUPTI; `rest` is of the untraced step" in made
    layer = baseline.layer_times(str(tmp_path), "nano")
    assert cells(layer) == [["4", "16", "150.0 (100.0 to 200.0)"]]
    assert "nano, µs (CUPTI)" in layer


def test_a_change_of_steps_by_hand(tmp_path: Path) -> None:
    times = {"first": (2000.0, 1000.0), "second": (1500.0, None), "third": (1000.0, 1200.0)}
    prefill_us = {"first": 9000.0, "second": 9500.0, "third": 3000.0}
    for name, us in times.items():
        shapes = [
            {"phase": "prefill", "batch_size": 1, "tokens": 1024, "timed": {"status": "failed"}},
            {
                "phase": "prefill", "batch_size": 2, "tokens": 64,
                "timed": {"status": "ok", "wall_us": prefill_us[name]},
            },
        ]  # fmt: skip
        row = {
            "engine": "nano", "arm": "default", "phase": "decode", "batch_size": 4, "new_tokens": 4, "mode": "graph",
            "wall_us": 1.0, "host_us": 0.0, "status": "ok",
        }  # fmt: skip
        steps = [
            row
            | {"context_len": 16 * (i + 1), "source": source, "iteration": at, "gpu_us": off * at + time_us}
            | {"instrumented": source == "cupti"}
            for i, time_us in enumerate(us)
            if time_us is not None
            for at in (-1, 0, 1)
            for source, off in (("cupti", 90.0), ("cuda_event", 500.0))
            if (source, at) != ("cuda_event", -1)
        ]
        provenance = {"gpu": {"name": "Toy"}}
        run = made_up_run(shapes=shapes, started=f"2030-01-0{len(name)}T00:00:00", provenance=provenance)
        write(tmp_path / name, run, steps=steps)
    made = engines.step_history(f"{tmp_path / 'first'},{tmp_path / 'second'},{tmp_path / 'third'}", engine="nano")
    assert "| step | 2030-01-05 | 2030-01-06 |" in made
    assert cells(made) == [
        ["prefill 2 × 64", "9.000", "9.500", "3.000", "0.33×"],
        ["decode 4 × 16", "2.000", "1.500", "1.000", "0.50×"],
        ["decode 4 × 32", "1.000", "–", "1.200", "1.20×"],
    ]


def test_steps_of_different_gpus_are_no_history(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path / name, made_up_run(started="2030-01-01", provenance={"gpu": {"name": f"The {name} one"}}))
    with pytest.raises(InputError, match="The new one, The old one"):
        engines.step_history(f"{tmp_path / 'old'},{tmp_path / 'new'}", engine="nano")


def test_step_costs_by_hand(tmp_path: Path) -> None:
    shape = {
        "phase": "decode", "batch_size": 2, "tokens": 16, "timed": {"wall_us": 1000.0},
        "kernels": {"gaps": 0.1, "attributed": 0.99},
    }  # fmt: skip
    where = ("decode", 2, 2, 16)
    kernels = {
        ("layer", 0, "layer"): [9999.0] * 3,
        ("attention", 0, "input_norm+qkv_proj"): [10.0, 11.0, 12.0],
        ("attention", 1, "qkv_proj"): [30.0, 30.0, 30.0],
        ("attention", 0, "qk_norm+rope+kv_write+attention"): [5.0, 50.0, 6.0],
        ("attention", 0, "o_proj"): [3.0, 3.0, 3.0],
        ("mlp", 1, "silu_mul"): [2.0, 2.0, 2.0],
        ("attention", 1, "qk_norm+rope"): [1.5, 1.5, 1.5],
        ("embed", -1, "embed+input_norm"): [4.0, 4.0, 4.0],
        ("head", -1, "lm_head"): [70.0, 71.0, 72.0],
        ("sample", -1, "sample"): [20.0, 20.0, 20.0],
        ("step", -1, "read_back"): [8.0, 8.0, 8.0],
    }
    rows = cupti(layer_rows("graph", where, kernels))
    rows += layer_rows("graph", where, {("layer", 0, "layer"): [1e4]})  # events, which say nothing here
    key = {
        name: rows[0][name] for name in ("engine", "arm", "phase", "batch_size", "new_tokens", "context_len", "mode")
    }
    phases = {"schedule": (10.0, 12.0, 90.0), "rest": (600.0, 700.0, 800.0)}
    host = [
        {**key, "source": "host", "iteration": i, "host_phase": phase, "latency_us": us}
        for phase, times in phases.items() for i, us in enumerate(times)
    ]  # fmt: skip
    steps = [
        {
            **key,
            "source": "cupti",
            "iteration": i,
            "wall_us": 1100.0,
            "gpu_us": us,
            "instrumented": True,
            "status": "ok",
        }
        for i, us in enumerate((790.0, 800.0, 810.0))
    ]
    write(tmp_path / "nano", made_up_run(shapes=[shape]), rows, host, steps)
    write(tmp_path / "fused", made_up_run(engine="fused", shapes=[shape]))
    made = costs.step_costs(str(tmp_path), shapes="2x16")
    # projections: 10 + 30 + 3, 11 + 30 + 3, ...; gaps: 10 % of 800 µs; no place: 1 % of the 720 µs that are busy
    assert cells(made) == [
        ["2", "16", "step", "1,000"],
        ["2", "16", "host: schedule", "12"],
        ["2", "16", "host: rest", "700"],
        ["2", "16", "GPU: attention", "6"],
        ["2", "16", "GPU: projections", "44"],
        ["2", "16", "GPU: norms and small ops", "4"],
        ["2", "16", "GPU: embedding and head", "75"],
        ["2", "16", "GPU: sampling", "20"],
        ["2", "16", "GPU: copies, inputs", "8"],
        ["2", "16", "GPU: no place known", "7"],
        ["2", "16", "GPU: gaps", "80"],
        ["2", "16", "GPU: first to last", "800"],
    ]
    assert made.endswith("Not measured: vllm, fused.")
    assert costs.step_costs(str(tmp_path), workload="grid").startswith("Not measured yet: no `grid` run")
    # what the step of 1,000 µs takes beyond the 800 - 80 µs in which its kernels ran
    assert cells(costs.difference_costs(str(tmp_path), engines="nano", shapes="2x16,4x16")) == [
        ["scheduler", "host: schedule", "12", ""],
        ["scheduler", "host: finish", "", ""],
        ["memory: tables and slots", "host: prepare", "", ""],
        ["attention", "GPU: attention", "6", ""],
        ["graphs", "host: launch", "", ""],
        ["sampling", "GPU: sampling", "20", ""],
        ["sampling", "host: sample", "", ""],
        ["host work, not hidden", "step less its kernels", "280", ""],
    ]


def test_closure_by_hand(tmp_path: Path) -> None:
    decode = {
        "phase": "decode", "batch_size": 2, "tokens": 1024, "timed": {"wall_us": 1.0},
        "eager": {"arm": "default", "closure": 0.9751, "overhead": 10.0},
        "graph": {"arm": "default", "closure": 0.9966, "overhead": 1.054},
        "kernels": {"arm": "default", "closure": 1.0, "overhead": 1.02, "attributed": 1.0, "gaps": 0.0512},
    }  # fmt: skip
    prefill = {"phase": "prefill", "batch_size": 1, "tokens": 8, "eager": {"status": "out of memory"}}
    rows = layer_rows("graph", ("decode", 2, 2, 1024), {("layer", 0, "layer"): [99.0, 90.0, 95.0]})
    rows += cupti(layer_rows("graph", ("decode", 2, 2, 1024), {("layer", 0, "layer"): [100.0, 90.0, 110.0]}))
    write(tmp_path / "nano", made_up_run(shapes=[prefill, decode]), rows)
    other = decode | {"graph": decode["graph"] | {"arm": "python_graph"}}
    write(tmp_path / "vllm", made_up_run(engine="vllm", shapes=[other]), [{**row, "engine": "vllm"} for row in rows])
    assert cells(costs.closure(str(tmp_path))) == [
        ["vllm", "decode", "2", "1,024", "0.975", "10.00", "0.997", "1.05", "1.000", "1.02", "100.0%", "5.1%", ""],
        ["nano", "prefill", "1", "8", "", "", "", "", "", "", "", "", ""],
        ["nano", "decode", "2", "1,024", "0.975", "10.00", "0.997", "1.05", "1.000", "1.02", "100.0%", "5.1%", "0.950"],
    ]  # fmt: skip


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


def test_op_shares_by_hand(tmp_path: Path) -> None:
    shape = {"phase": "prefill", "batch_size": 2, "tokens": 8, "timed": {"wall_us": 100.0}, "eager": {"wall_us": 130.0}}
    where = ("prefill", 2, 16, 0)
    plain = {
        ("attention", 0, "input_norm"): [10.0, 90.0, 20.0],  # median 20
        ("attention", 1, "input_norm"): [40.0, 40.0, 40.0],  # 40; mean of layers 30
        ("mlp", 0, "down_proj"): [90.0],
        ("mlp", 1, "down_proj"): [90.0],
        ("layer", 0, "layer"): [500.0],
        ("head", -1, "lm_head"): [700.0],
    }
    fused = {("attention", 0, "input_norm+qkv_proj"): [60.0], ("mlp", 0, "down_proj"): [20.0]}
    fused |= {("attention", 0, "qk_norm+rope+kv_write"): [30.0], ("attention", 0, "qk_norm"): [10.0]}
    for engine, times in (("vllm", plain), ("nano", plain), ("fused", fused)):
        rows = [{**row, "engine": engine} for row in layer_rows("eager", where, times)]
        write(tmp_path / engine, made_up_run(engine=engine, shapes=[shape]), rows)
    assert cells(traces.op_shares("prefill:2x8", str(tmp_path))) == [
        ["`input_norm`", "30 (25%)", "30 (25%)", ""],
        ["`input_norm+qkv_proj`", "", "", "60 (50%)"],
        ["`qk_norm`", "", "", "10 (8%)"],
        ["`qk_norm+rope+kv_write`", "", "", "30 (25%)"],
        ["`down_proj`", "90 (75%)", "90 (75%)", "20 (17%)"],
        ["sum of ops", "120", "120", "120"],
        ["traced step / untraced step", "1.30", "1.30", "1.30"],
        ["source", "eager, events", "eager, events", "eager, events"],
    ]
    seen = shape | {"kernels": {"wall_us": 150.0}}
    halves = layer_rows("eager", where, {("attention", 0, "qk_norm"): [3.0, 5.0, 9.0]})
    both = cupti(halves + [{**row, "latency_us": 10.0} for row in halves])  # two kernels of one op, as of q and of k
    write(tmp_path / "more" / "nano", made_up_run(shapes=[seen]), both)
    for engine in ("vllm", "fused"):
        rows = [{**row, "engine": engine} for row in layer_rows("eager", where, plain)]
        write(tmp_path / "more" / engine, made_up_run(engine=engine, shapes=[shape]), rows)
    found = {row[0]: row[2] for row in cells(traces.op_shares("prefill:2x8", str(tmp_path / "more")))}
    assert (found["`qk_norm`"], found["source"]) == ("15 (100%)", "kernels, CUPTI")
    with pytest.raises(InputError, match="no shape decode:1x1"):
        traces.op_shares("decode:1x1", str(tmp_path))


def test_engines_by_hand(tmp_path: Path) -> None:
    timed = {"status": "ok", "wall_us": 1234.0, "wall_us_low": 1200.0, "wall_us_high": 1300.0}
    prefill = {"phase": "prefill", "batch_size": 1, "tokens": 8, "timed": timed}
    decode = {"phase": "decode", "batch_size": 2, "tokens": 16, "timed": {"status": "out of memory"}}
    write(tmp_path / "nano", made_up_run(shapes=[prefill, decode]))
    write(tmp_path / "vllm", made_up_run(engine="vllm", shapes=[prefill | {"timed": {**timed, "wall_us": 2000.0}}]))
    served = {"requests": 3, "output_tokens": 4567, "output_tok_s": 1234.6}
    write(tmp_path / "served", made_up_run(workload="throughput", throughput=served))
    text = engines.engines(str(tmp_path))
    table, source = text.split("\n\n")
    assert cells(table) == [
        ["prefill, 1 × 8 tokens, ms", "2.00 (1.20 to 1.30)", "1.23 (1.20 to 1.30)", ""],
        ["decode, batch 2, context 16, ms", "", "out of memory", ""],
        ["3 requests, 4,567 output tokens, tok/s", "", "1,235", ""],
    ]
    assert source.startswith("One A GPU, random weights, torch 2.9, Triton 3.5, vLLM 0.20.")


def test_the_committed_graph_traces_close() -> None:
    """Layers, head and sampling are parts of the step: what is left is never negative nor most of it."""
    for shape, trace in traces.traced_decodes(runs("results/reference/h200"), "nano"):
        whole = shape["timed"]["wall_us"] if trace.source == traces.CUPTI else trace.record["wall_us"]
        assert 0 <= 1 - sum(traces.step_parts(trace.rows).values()) / whole < 0.5


# --- comparisons and baselines ---


def _block(label: str, number: int, value: float, **changed: Any) -> dict[str, Any]:
    return {
        "engine": label.partition(":")[0], "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 8,
        "tokens": 128, "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1,
        "value": value, "status": "ok", **changed,
    }  # fmt: skip


def _compared(folder: Path, blocks_of: dict[str, list[dict[str, Any]]], launches: int = 1, **settings: Any) -> str:
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


def test_a_row_shows_the_fastest_arm_of_vllm_and_default_beside_it(tmp_path: Path) -> None:
    serve = {"metric": "output_tok_s", "phase": "serve", "batch_size": 9, "tokens": 0, "output_len": 0}
    times = {  # TPOT in ms, output tok/s
        "nano_vllm": (2.0, 100), "nano": (1.0, 200), "vllm": (4.0, 300), "vllm:serve_arm=inproc_async": (3.0, 150),
        "vllm:serve_arm=inproc:limits.kv_cache_tokens=64": (3.5, 120), "fused": (0.5, 400),
    }  # fmt: skip
    blocks_of = {
        label: [_block(label, n, ms) for n in range(2)]
        + [_block(label, n, rate, **serve, started_s=10.0 + n) for n in range(2)]
        for label, (ms, rate) in times.items()
    }
    made = comparison.comparison(_compared(tmp_path / "all", blocks_of))
    assert made.splitlines()[0] == "| small | nano_vllm | nano | vllm, its fastest arm | vllm default | fused |"
    assert cells(made)[0] == [
        "decode, batch 8, prompt 128, TPOT ms", "2.00 (2.00 to 2.00)", "1.00 (1.00 to 1.00), 0.50× (0.50 to 0.50)",
        "3.00 (3.00 to 3.00), 1.50× (1.50 to 1.50), inproc_async", "4.00 (4.00 to 4.00), 2.00× (2.00 to 2.00)",
        "0.50 (0.50 to 0.50), 0.25× (0.25 to 0.25)",
    ]  # fmt: skip
    assert cells(made)[1][3:5] == [
        "300 (300 to 300), 3.00× (3.00 to 3.00), default",
        "300 (300 to 300), 3.00× (3.00 to 3.00)",
    ]
    assert "interval within these processes" in made
    again = comparison.comparison(_compared(tmp_path / "again", blocks_of, launches=3))
    assert "interval within" not in again

    # an arm that fails in one row, another one that never came, one that left, and rounds that have no interval
    failed = _block("vllm", 0, 0.0, status="out of memory") | {"value": None}
    few = {label: blocks_of[label] for label in ("nano_vllm", "nano")}
    few["nano"] = few["nano"][:1] + few["nano"][2:]
    few |= {"vllm:serve_arm=inproc": [failed], "vllm:serve_arm=default": blocks_of["vllm"][2:]}
    reasons = {"vllm:serve_arm=inproc": "it fell", "nano": "it left", "fused": "no fuse"}
    text = comparison.comparison(_compared(tmp_path / "few", few, engines=[*few, "fused"], reasons=reasons))
    assert text.splitlines()[0] == "| small | nano_vllm | nano | vllm:serve_arm=default |"
    assert cells(text)[0][2:] == ["1.00 (1.00 to 1.00), 0.50× (one pair)", "not measured"]
    assert "vllm:serve_arm=inproc took no part: it fell" in text
    assert "nano left before the end: it left" in text
    assert "fused took no part: no fuse" in text


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    values = {"A": (1.0, 2.0, 4.0), "B": (2.0, 4.0, 8.0)}
    blocks_of = {label: [_block(label, n, value) for n, value in enumerate(of)] for label, of in values.items()}
    reasons = {"C": "it has no legs"}
    made = comparison.comparison(_compared(tmp_path, blocks_of, engines=["A", "B", "C"], reasons=reasons))
    assert cells(made)[0] == [
        "decode, batch 8, prompt 128, TPOT ms", "2.00 (1.00 to 4.00)", "4.00 (2.00 to 8.00), 2.00× (2.00 to 2.00)"
    ]  # fmt: skip
    assert "ratios to A are" in made
    assert "One Toy, small, float16, local weights" in made
    assert "C took no part: it has no legs" in made


def test_a_comparison_tells_limits_by_the_caches_that_they_gave(tmp_path: Path) -> None:
    labels = ("nano:limits.kv_cache_tokens=8:limits.max_num_seqs=2", "fused")
    folder = Path(_compared(tmp_path, {label: [_block(label, 0, 1.0)] for label in labels}))
    for label, tokens in zip(labels, (12_345, 678), strict=True):
        (path,) = folder.glob(f"*/{label.replace(':', '-')}/run.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"capacity": {"kv_cache_tokens": tokens}}))
    made = comparison.comparison(str(folder))
    assert made.splitlines()[0] == "| small | nano | fused |"
    assert "Tokens in the cache: nano 12,345, fused 678." in made


def test_other_models_by_hand(tmp_path: Path) -> None:
    assert comparison.models(str(tmp_path)) == "Not measured yet (`scripts/reference_runs.sh models`)."
    prefill = {"metric": "generate_ms", "phase": "prefill", "batch_size": 1, "tokens": 1024, "output_len": 1}
    times = {"nano": [2.0, 4.0], "fused:limits.kv_cache_tokens=8": [1.0, 1.0]}
    big = {
        label: [_block(label, n, ms) for n, ms in enumerate(of)]
        + [_block(label, n, 10 * ms, **prefill, started_s=10.0 + n) for n, ms in enumerate(of[:1])]
        for label, of in times.items()
    }
    # Ratios there refer to fused.
    wide = {label: [_block(label, n, ms) for n in range(2)] for label, ms in (("fused", 3.0), ("hf", 9.0), ("nano", 4))}
    _compared(tmp_path / "compare-big", big, model={"name": "big"})
    _compared(tmp_path / "compare-wide", wide, model={"name": "wide"}, reasons={"hf": "it was slow"}, launches=3)
    _compared(tmp_path / "compare-ours", wide, model={"name": MODELS[0]})
    _compared(tmp_path / "ablation", {"fused": wide["fused"], "fused:features=[]": []}, model={"name": "big"})
    made = comparison.models(str(tmp_path))
    assert made.splitlines()[0] == "| model | work | nano | fused | hf | fused / nano |"
    decode = "decode, batch 8, prompt 128, TPOT ms"
    assert cells(made) == [
        # logarithms of ratios: -ln 2 and -ln 4, whose mean is that of √⅛; half an interval 12.706 × 0.3466 = ln 81.75
        ["big", decode, "3.00 (2.00 to 4.00)", "1.00 (1.00 to 1.00)", "–", "0.35× (0.00 to 28.90)"],
        ["big", "prefill, 1 × 1024 tokens, ms", "20.00 (20.00 to 20.00)", "10.00 (10.00 to 10.00)", "–",
         "0.50× (one pair)"],
        ["wide", decode, "4.00 (4.00 to 4.00)", "3.00 (3.00 to 3.00)", "9.00 (9.00 to 9.00)", "0.75× (0.75 to 0.75)"],
    ]  # fmt: skip
    assert "interval within these processes. TPOT" in made
    assert "big: one Toy, float16, local weights, 2 rounds, launched 1 time(s). Runs: `" in made
    assert "wide: one Toy, float16, local weights, 2 rounds, launched 3 time(s). Runs: `" in made
    assert made.endswith("wide: hf left before the end, or took no part: it was slow")


OF_REFERENCE = [
    name for name, of in TABLES.items() if any(p.default == REFERENCE for p in signature(of).parameters.values())
]
SHAPES_ASKED = {"op-shares": " shape=decode:1x128"}


@pytest.fixture(scope="module")
def with_another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed runs, and before and behind each, by name, the same of another model."""
    folder = tmp_path_factory.mktemp("reference") / "h200"
    shutil.copytree(ROOT / REFERENCE, folder)
    for file in sorted((ROOT / REFERENCE).glob("*/run.json")):
        run = json.loads(file.read_text()) | {"model": "qwen3-4b"}
        for place in ("0", "zz") if "study" not in run else ():  # one table has studies of all models' shapes
            name = f"{place}-{file.parent.name}"
            RunWriter(folder / name, name).write_run(run | {"run_id": name})
    blocks_of = {label: [_block(label, n, 1.0) for n in range(2)] for label in ("nano", "fused")}
    _compared(folder / "0-compare", blocks_of, model={"name": "qwen3-4b"})
    return folder


@pytest.mark.parametrize("name", [name for name in OF_REFERENCE if name != "models"])
def test_runs_of_another_model_change_no_table_but_theirs(name: str, with_another_model: Path) -> None:
    call = name + SHAPES_ASKED.get(name, "")
    told = made(f"{call} folder={with_another_model}").replace(str(with_another_model), REFERENCE)
    assert told == made(call)


def test_runs_of_another_model_are_in_a_table_of_theirs(with_another_model: Path) -> None:
    assert {row[0] for row in cells(comparison.models(str(with_another_model)))} == {"qwen3-4b"}


def test_goals_by_hand(tmp_path: Path) -> None:
    serve = {"metric": "output_tok_s", "phase": "serve", "batch_size": 256, "tokens": 0, "output_len": 0}
    decode = {  # TPOT in ms of two rounds: fused is 4 and 4, then 2 and 4 times as fast as its faster rival
        "nano": [(2.2, 2.2), (2.4, 4.8)], "vllm:serve_arm=inproc": [(1.6, 2.4), (9.0, 9.0)],
        "vllm": [(9.0, 9.0), (9.0, 9.0)], "fused": [(0.4, 0.6), (1.2, 1.2)],
    }  # fmt: skip
    rates = {"nano": 20_000, "vllm:serve_arm=inproc": 24_000, "vllm": 1, "fused": 30_000}
    blocks_of = {
        label: [_block(label, n, first[n]) for n in range(2)]
        + [_block(label, n, second[n], batch_size=32, started_s=10.0 + n) for n in range(2)]
        + [_block(label, n, 0.1, batch_size=3, started_s=20.0 + n) for n in range(2)]  # nobody set a goal for it
        + [_block(label, 0, rates[label], **serve, started_s=30.0)]
        for label, (first, second) in decode.items()
    }
    made = goals.goals(_compared(tmp_path / "all", blocks_of))
    assert cells(made) == [
        ["decode, batch 8, prompt 128, TPOT ms", "0.60", "0.50 (-17 %)", "met",
         "3.0", "4.00 (4.00 to 4.00)", "vllm, inproc", "met"],
        # logarithms ln 2 and ln 4: their mean is that of √8, half an interval 12.706 × 0.3466 = ln 81.75
        ["decode, batch 32, prompt 128, TPOT ms", "0.80", "1.20 (+50 %)", "missed",
         "2.8", "2.83 (0.03 to 231.22)", "nano", "open"],
        ["256 requests, output tok/s", "30,000", "30,000 (+0 %)", "met", "1.4", "no interval", "vllm, inproc", "open"],
    ]  # fmt: skip
    assert "interval within these processes;" in made
    slow = {"nano": [_block("nano", n, 1.0) for n in range(2)], "fused": [_block("fused", n, 0.5) for n in range(2)]}
    assert cells(goals.goals(_compared(tmp_path / "slow", slow)))[0][5:] == ["2.00 (2.00 to 2.00)", "nano", "missed"]
    with pytest.raises(InputError, match="no item that a goal"):
        goals.goals(_compared(tmp_path / "none", {"nano": slow["nano"]}, engines=["nano", "fused"]))


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


# --- fused ---


def test_verification_by_hand(tmp_path: Path) -> None:
    told = {
        "status": "passed", "positions": 64, "kl_ratio": {"value": 0.5}, "nll_delta_ratio": {"value": 1.25},
        "engine": {"kl": 1e-5, "nll_delta": 0.005, "greedy_agreement": 0.984},
        "noise": {"kl": 2e-5, "nll_delta": 0.004, "greedy_agreement": 1.0},
    }  # fmt: skip
    write(tmp_path / "fused", made_up_run(engine="fused", verification=told))
    write(tmp_path / "other", made_up_run(engine="hf", verification=told))
    assert cells(verification.verification(str(tmp_path))) == [
        ["fused", "passed", "64", "1.00e-05", "2.00e-05", "0.50", "5.00e-03", "4.00e-03", "1.25", "98.4%"]
    ]


def test_decode_choices_say_which_way_runs() -> None:
    """The committed file, read by hand: who is in bold is who was faster."""
    measured = json.loads((choices.ROOT / "kernels/choices/nvidia-h200.json").read_text())["choices"]
    rows = {(row[0], row[1]): row[2:] for row in cells(choices.decode_choices())}
    few = measured["decode_linear"]["4096x1024 rows 1"]
    assert rows["input_norm+qkv_proj", "1"] == [f"**{few['us']:.1f}**", f"{few['cublas_us']:.1f}", "vector"]
    many = measured["decode_linear"]["gated 3072x1024 rows 256"]
    assert many["path"] == "prefill" and many["us"] < many["cublas_us"]
    assert rows["post_norm+gate_up_proj+silu_mul", "256"] == [
        f"**{many['us']:.1f}**", f"{many['cublas_us']:.1f}", "prefill's"
    ]  # fmt: skip
    assert measured["decode_head"]["151936x1024 rows 1"]["launch"]["product"]["kernel"] == "vector"
    assert rows["final_norm+lm_head", "1"][2] == "vector"


def test_prompts_attention_beside_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out by hand: 2 × 2,048 × 1,000 × 1,001 operations in 10 µs, and who runs in bold."""
    made = {
        "facts": {"gpu": "Toy"},
        "choices": {
            "causal_attention": {
                "16/8x128 tokens 1000 of at most 1000": {
                    "launch": {"block_t": 8}, "us": 10.0, "flash_attention_us": 12.5, "date": "2030-01-01"
                },
                "16/8x128 tokens 4000 of at most 1000": {
                    "path": "flash_attention", "us": 50.0, "flash_attention_us": 40.0, "date": "2030-01-02"
                },
                "32/8x128 tokens 1000 of at most 1000": {
                    "path": "flash_attention", "us": 5.0, "flash_attention_us": 4.0, "date": "2030-01-03"
                },
            }
        },
    }  # fmt: skip
    (tmp_path / "kernels/choices").mkdir(parents=True)
    (tmp_path / "kernels/choices/toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    assert cells(choices.causal_choices("toy")) == [
        ["1 × 1,000", "**10.0**", "12.5", "0.80×", "410"], ["4 × 1,000", "50.0", "**40.0**", "1.25×", "410"]
    ]  # fmt: skip


def test_which_other_models_were_tuned_for() -> None:
    """docs/10 says so below the comparisons of other models."""
    measured = json.loads((choices.ROOT / "kernels/choices/nvidia-h200.json").read_text())["choices"]
    small = {"4096x1024", "1024x2048", "gated 3072x1024", "1024x3072", "151936x1024", "16/8x128", "6144x1024"}
    larger = {"6144x2560", "2560x4096", "gated 9728x2560", "2560x9728", "151936x2560", "32/8x128"}
    keys = [re.split(" rows | tokens ", key) for table in measured.values() for key in table]
    assert {shape for shape, _ in keys} == small | larger
    assert {rows.removesuffix(" short") for shape, rows in keys if shape in larger} == {"8", "32"}
    text = (choices.ROOT / "docs/10_benchmark_comparison.md").read_text()
    assert "Qwen3-4B has been measured at 8 and 32 rows" in " ".join(text.split())


def test_what_decode_uses_need_not_be_faster_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was chosen in a whole step."""
    launch, day = {"kernel": "tiled", "halves": False}, "2030-01-01"
    made = {
        "facts": {"gpu": "Toy", "torch": "9", "triton": "9"},
        "choices": {
            "decode_linear": {
                "4096x1024 rows 128": {"launch": launch, "us": 8.0, "cublas_us": 7.0, "date": day},
                "4096x1024 rows 256": {"path": "cublas", "us": 6.0, "cublas_us": 7.0, "date": day},
                "gated 3072x1024 rows 256": {
                    "path": "prefill", "launch": {"block_m": 64}, "us": 6.0, "cublas_us": 7.0, "date": day
                },
            },
            "decode_head": {
                "151936x1024 rows 64": {
                    "launch": {"tiles": {"block_m": 64}}, "us": 80.0, "cublas_us": 90.0, "date": day
                },
                "151936x1024 rows 256": {"path": "cublas", "us": 150.0, "cublas_us": 140.0, "date": day},
            },
        },
    }  # fmt: skip
    (tmp_path / "kernels" / "choices").mkdir(parents=True)
    (tmp_path / "kernels" / "choices" / "toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    assert cells(choices.decode_choices("toy")) == [
        ["input_norm+qkv_proj", "128", "8.0", "**7.0**", "tiled"],
        ["input_norm+qkv_proj", "256", "**6.0**", "7.0", "library"],
        ["post_norm+gate_up_proj+silu_mul", "256", "**6.0**", "7.0", "prefill's"],
        ["final_norm+lm_head", "64", "**80.0**", "90.0", "tiles, norm apart"],
        ["final_norm+lm_head", "256", "150.0", "**140.0**", "library"],
    ]


def test_prefill_choices_say_which_way_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = {"block_m": 128, "block_n": 64, "num_warps": 8}
    made = {
        "facts": {"gpu": "Toy"},
        "choices": {
            "prefill_gate_up": {
                "6144x1024 rows 1024": {"launch": launch, "us": 20.0, "cublas_us": 25.0, "date": "2030-01-02"},
                "6144x1024 rows 2048": {"path": "cublas", "cublas_us": 40.0, "date": "2030-01-01"},
            }
        },
    }
    (tmp_path / "kernels" / "choices").mkdir(parents=True)
    (tmp_path / "kernels" / "choices" / "toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    # 2 * 1024 * 6144 * 1024 operations in 20 µs are 644.2 TFLOP/s.
    made = choices.prefill_choices("toy")
    assert "2030-01-01 to 2030-01-02" in made
    assert cells(made) == [
        ["gate_up_proj+silu_mul", "1,024", "**20.0**", "25.0", "0.80×", "644", "128 × 64, 8 warps"],
        ["gate_up_proj+silu_mul", "2,048", "", "**40.0**", "", "", "cuBLAS, `silu_mul`"],
    ]
