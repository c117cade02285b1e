"""What the tables' functions compute, on cases small enough to do by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import InputError, Request, SamplingParams
from engines.nano.graphs import DecodeBuffers
from engines.nano.sequence import Sequence
from harness.results import RunWriter
from scripts.tables import attention, baseline, blocks, cache, comparison, engines, pairs, traces
from scripts.tables.sources import MODELS, Model, floor_us, model, runs

# 3 query heads on 1 key/value head of 4; qkv rows (3 + 2) × 4 = 20
SMALL = Model(hidden_size=8, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, intermediate_size=10, vocab_size=50)


def cells(markdown: str) -> list[list[str]]:
    """The rows of a table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[2:] if line]


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


def write(folder: Path, run: dict[str, Any], layers: list[dict[str, Any]] | None = None) -> None:
    writer = RunWriter(folder, f"{run['engine']}-{run['workload']}")
    writer.add_layers(layers or [])
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
    others = layer_rows("graph", ("decode", 4, 4, 16), {("layer", 0, "layer"): [7777.0] * 9})
    rows += [{**row, "source": "cupti"} for row in others]
    write(tmp_path / "run", made_up_run(shapes=[shape, untraced]), rows)
    # 1000 − 510 − 90 − 100 = 300
    assert cells(traces.decode_steps(str(tmp_path))) == [
        ["4", "16", "0.80", "1.00", "0.51", "0.09", "0.10", "0.30", "30%"]
    ]
    # 510 µs over the model's 28 layers; 31.457 MB of matrices and 4 × 16 × 4096 B of cache at 4.8 TB/s: 6.61 µs
    assert cells(traces.layer_floors(str(tmp_path))) == [["4", "16", "18.2", "31.5", "0.3", "6.6", "2.8"]]


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
    ]
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
    for shape, layers in traces.traced_decodes(runs("results/reference/h200"), "nano"):
        rest = 1 - sum(traces.graph_parts(layers).values()) / shape["graph"]["wall_us"]
        assert 0 <= rest < 0.5


# --- comparisons and baselines ---


def _block(label: str, number: int, value: float) -> dict[str, Any]:
    return {
        "engine": label, "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 8, "tokens": 128,
        "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1, "value": value,
        "status": "ok",
    }  # fmt: skip


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    for label, values in (("A", (1.0, 2.0, 4.0)), ("B", (2.0, 4.0, 8.0))):
        writer = RunWriter(tmp_path / "launch-0" / label, label)
        writer.add_rounds(_block(label, number, value) for number, value in enumerate(values))
        writer.flush()
        provenance = {"gpu": {"name": "Toy"}, "versions": {"torch": "1", "triton": "2"}}
        writer.write_run(
            {"engine": label, "dtype": "float16", "weights": {"source": "local"}, "provenance": provenance}
        )
    settings = {"engines": ["A", "B", "C"], "baseline": "A", "rounds": 3, "model": {"name": "small"}}
    record = {"settings": settings, "reasons": {"C": "it has no legs"}, "launches": 1}
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    made = comparison.comparison(str(tmp_path))
    assert cells(made)[0] == [
        "decode, batch 8, prompt 128, TPOT ms", "2.00 (1.00 to 4.00)", "4.00 (2.00 to 8.00), 2.00× (2.00 to 2.00)"
    ]  # fmt: skip
    assert "ratios to A are" in made
    assert "One Toy, small, float16, local weights" in made
    assert "C took no part: it has no legs" in made


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
    writer.write_run({"engine": "nano", "workload": "latency", "shapes": [shape]})
    assert cells(baseline.layer_times(str(tmp_path), "nano")) == [["2", "16", "21.0 (11.0 to 31.0)"]]
