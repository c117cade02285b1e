"""Ceilings measured and kept, and runs held against them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from engines.base import InputError
from harness import machine
from harness.config import compose
from harness.results import RunWriter, load
from harness.roofline import ceilings as module
from harness.roofline.__main__ import BAD_INPUT, OK, ceilings_of, main
from harness.roofline.ceilings import MIB, Ceilings, Key, cached, cached_record, ceilings, from_record, given, measured
from harness.roofline.table import STEP, ShapeLines, lines, op_times

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "h200"
H200 = given(4.34e12, 815e12)
TOY = Ceilings("Toy", "1", "2", 1e12, 1e12, 1e14, "bfloat16", {"read": "sum"}, "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def provenance(name: str = "Toy") -> dict[str, Any]:
    return {
        "versions": {"torch": "2"},
        "gpu": {"name": name, "driver": "1"},
        "cpu": {"model": "Chip", "cores": 8, "usable_cores": 4},
    }


def keep(found: Ceilings, key: Key) -> None:
    key.path.parent.mkdir(parents=True, exist_ok=True)
    key.path.write_text(json.dumps(dataclasses.asdict(found)))


# --- measuring ---


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says that everything takes 2 ms."""
    monkeypatch.setattr(module, "_seconds", lambda work, device: (work(), 2e-3)[1])
    found = measured(Key("Toy", "", "2"), torch.device("cpu"), arrays=(MIB, 4 * MIB), products=(64, 128))
    assert found.read_bytes_per_s == 4 * MIB / 2e-3
    assert found.copy_bytes_per_s == 2 * 4 * MIB / 2e-3  # read and written
    assert found.matrix_flop_per_s == pytest.approx(2 * 128**3 / 2e-3)
    assert found.matrix_dtype == "float32"
    assert found.ways["matrix"] == "128 x 128 x 128" and found.ways["read"].endswith(", 4 MiB")


def test_every_way_reads_everything_and_not_zeros() -> None:
    memory = torch.randn(4 * module.ROW)
    ways = dict(module._reads(memory, torch.float32))
    assert ways["sum"]() == pytest.approx(float(memory.sum()), rel=1e-4)
    assert torch.allclose(ways["sum of rows"](), memory.view(4, -1).sum(-1), atol=1e-3)
    product = ways["float32 matrix times vector"]()
    assert torch.allclose(product, memory.view(4, -1) @ memory[: module.ROW], atol=1e-2)
    narrow: Any = dict(module._reads(memory, torch.bfloat16))["bfloat16 matrix times vector"]
    matrix, vector = narrow.args
    assert matrix.nbytes == memory.nbytes and matrix.dtype == torch.bfloat16
    assert matrix.count_nonzero() > 0.99 * matrix.numel() and vector.shape == (module.ROW,)


def test_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_ARRAYS", (MIB,))
    monkeypatch.setattr(module, "CPU_PRODUCTS", (64,))
    first = ceilings("cpu")
    rates = (first.read_bytes_per_s, first.copy_bytes_per_s, first.matrix_flop_per_s)
    assert all(math.isfinite(rate) and rate > 1e6 for rate in rates)
    assert ceilings("cpu") == first
    monkeypatch.setattr(module, "_seconds", lambda work, device: 1.0)
    assert ceilings("cpu") == first
    again = ceilings("cpu", again=True)
    assert again.matrix_flop_per_s == 2 * 64**3
    assert ceilings("cpu") == again


def test_what_is_kept_holds_for_one_device_driver_and_torch() -> None:
    key = Key("Toy", "1", "2")
    keep(TOY, key)
    assert cached(key) == TOY
    for other in (Key("Toy 2", "1", "2"), Key("Toy", "2", "2"), Key("Toy", "1", "3")):
        assert cached(other) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**dataclasses.asdict(TOY), "read_bytes_per_s": 0})])
def test_a_damaged_file_counts_as_none(text: str) -> None:
    key = Key("Toy", "1", "2")
    keep(TOY, key)
    key.path.write_text(text)
    assert cached(key) is None


def test_a_cache_that_cannot_be_written_is_told(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.write_text("a file where the folder should be")
    monkeypatch.setattr(module, "measured", lambda key, device: TOY)
    with pytest.raises(InputError, match=r"cannot be kept in .*set HARNESS_CACHE"):
        ceilings("cpu")


def test_a_gpu_that_others_use_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "provenance", provenance)
    monkeypatch.setattr(machine, "gpu_state", lambda: {"other_processes": [{"pid": 1}]})
    with pytest.raises(InputError, match="Other processes are on the GPU"):
        ceilings("cuda")


# --- a run's ceilings ---


def test_a_time_is_the_median_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARMUP_S", 0.01)
    calls: list[float] = []
    took = iter([0.002] * 10 + [0.1] * 4 + [0.002] * 1000)  # a few disturbed calls

    def work() -> None:
        calls.append(time.perf_counter())
        time.sleep(next(took))

    assert 0.002 <= module._seconds(work, torch.device("cpu")) < 0.01
    assert len(calls) > module.REPETITIONS and calls[-1] - calls[0] > 0.01


def test_a_run_records_what_is_kept_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured", lambda *_: pytest.fail("measured in a run"))
    assert cached_record(provenance(), "cuda") is None
    assert cached_record({**provenance(), "gpu": None}, "cuda") is None
    keep(TOY, Key("Toy", "1", "2"))
    record = cached_record(provenance(), "cuda")
    assert record is not None and from_record(record) == TOY
    assert cached_record(provenance(), "cpu") is None  # of the processor nothing is kept


def test_a_run_is_held_against_its_own_ceilings_first() -> None:
    run = {"run_dir": "here", "provenance": provenance(), "device": "cuda"}
    with pytest.raises(InputError, match=r"No ceilings are kept of Toy .*--read and --matrix"):
        ceilings_of(run)
    keep(TOY, Key("Toy", "1", "2"))
    assert ceilings_of({**run, "ceilings": None}) == TOY
    own = dataclasses.replace(TOY, read_bytes_per_s=3e12)
    assert ceilings_of({**run, "ceilings": dataclasses.asdict(own)}) == own
    with pytest.raises(InputError, match="here: its ceilings cannot be read"):
        ceilings_of({**run, "ceilings": {"read": 1}})


# --- tables ---


def rows(source: str, mode: str, op: str, layer: int, times: list[float]) -> list[dict[str, Any]]:
    block = {"embed": "embed", "layer": "layer"}.get(op, "attention")
    return [
        {"engine": "nano", "arm": "default", "phase": "decode", "batch_size": 2, "new_tokens": 2, "context_len": 7,
         "mode": mode, "source": source, "iteration": i, "layer_index": layer, "block": block, "op": op,
         "kernels": "", "start_us": 0.0, "latency_us": us}
        for i, us in enumerate(times)
    ]  # fmt: skip


def test_times_are_medians_then_means_and_pieces_add_up() -> None:
    frame = pd.DataFrame(
        rows("cuda_event", "eager", "rope", 0, [1.0, 2.0, 9.0])
        + rows("cuda_event", "eager", "rope", 1, [4.0, 4.0, 4.0])
        + rows("cuda_event", "eager", "qk_norm", 0, [1.0, 1.0, 1.0])  # q
        + rows("cuda_event", "eager", "qk_norm", 0, [2.0, 2.0, 2.0])  # k
    )
    found = op_times(frame)
    assert found["time_us"].to_dict() == {"qk_norm": 3.0, "rope": 3.0}
    assert set(found["source"]) == {"cuda_event, eager"}


def test_kernels_come_before_graphs_and_graphs_before_eager() -> None:
    eager = rows("cuda_event", "eager", "rope", 0, [5.0]) + rows("cuda_event", "eager", "layer", 0, [50.0])
    graph = rows("cuda_event", "graph", "layer", 0, [20.0])
    found = op_times(pd.DataFrame(eager + graph))
    assert found.loc["rope"].to_list() == [5.0, "cuda_event, eager"]
    assert found.loc["layer"].to_list() == [20.0, "cuda_event, graph"]
    kernels = rows("cupti", "graph", "qk_norm+rope", 0, [1.0]) + rows("cupti", "graph", "layer", 0, [10.0])
    found = op_times(pd.DataFrame(eager + graph + kernels))
    assert found["time_us"].to_dict() == {"qk_norm+rope": 1.0, "layer": 10.0}


def small_run(folder: Path, **more: Any) -> Path:
    """A run of the tiny model with one decode shape, batch 2 at context 7."""
    writer = RunWriter(folder, folder.name)
    writer.add_layers(rows("cuda_event", "eager", "rope", 0, [2.0]) + rows("cuda_event", "graph", "layer", 0, [20.0]))
    writer.flush()
    config = dataclasses.asdict(compose(["model=tiny", "engine=nano"]))
    shape = {"phase": "decode", "batch_size": 2, "tokens": 7,
             "timed": {"status": "ok", "mode": "graph", "wall_us": 100.0}}  # fmt: skip
    writer.write_run({"engine": "nano", "model": "tiny", "dtype": "float32", "device": "cuda", "config": config,
                      "provenance": provenance(), "shapes": [shape], **more})  # fmt: skip
    return folder


def test_lines_of_a_run_by_hand(tmp_path: Path) -> None:
    runs = load(small_run(tmp_path / "run"))
    (shape,) = lines(runs, runs.runs[0], TOY)
    assert str(shape) == "decode, batch 2, context 7"
    rope, layer, step = shape.lines
    model = compose(["model=tiny"]).model
    per_row = (model.num_heads + model.num_kv_heads) * model.head_dim * 4  # float32
    assert rope.cost.bytes == 2 * 2 * per_row
    assert rope.floor_us == pytest.approx(2 * 2 * per_row / 1e12 * 1e6)
    assert rope.fraction == pytest.approx(rope.floor_us / 2.0)
    assert (layer.op, layer.source, layer.time_us) == ("layer", "cuda_event, graph", 20.0)
    assert (step.op, step.source, step.time_us) == (STEP, "host, graph", 100.0)
    assert step.cost.weight_bytes > model.num_layers * layer.cost.weight_bytes


@pytest.mark.parametrize("features", [[], ["last_rows"]])
def test_a_last_layer_of_few_rows_is_not_counted_as_one_of_all_tokens(tmp_path: Path, features: list[str]) -> None:
    model = compose(["model=tiny"]).model
    layers = [
        {**row, "phase": "prefill", "new_tokens": 14, "context_len": 0}
        for layer in range(model.num_layers)
        for row in rows("cupti", "graph", "o_proj", layer, [10.0 if layer == model.num_layers - 1 else 40.0])
    ]
    shape = {"phase": "prefill", "batch_size": 2, "tokens": 7, "timed": {"status": "failed"}}
    folder = small_run(tmp_path / "run", shapes=[shape], notes={"features": features})
    writer = RunWriter(tmp_path / "more", "run")
    writer.add_layers(layers)
    writer.flush()
    (tmp_path / "more" / "layers.parquet").replace(folder / "layers.parquet")
    runs = load(folder)
    ((line,),) = (shape.lines for shape in lines(runs, runs.runs[0], TOY))
    mean = (40.0 * (model.num_layers - 1) + 10.0) / model.num_layers
    assert line.time_us == pytest.approx(40.0 if features else mean)


def test_a_draw_by_sums_over_tiles_reads_no_logits(tmp_path: Path) -> None:
    """They are counted where they are read: in the head, or in a kernel of the draw; the eager site holds both."""
    folder = small_run(tmp_path / "run")
    found = {}
    for case, source, kernels in (
        ("by the head's", "cupti", "choose_token_embed_kernel"),
        ("by its own", "cupti", "tile_stats_kernel; choose_token_embed_kernel"),
        ("eager", "cuda_event", ""),
    ):
        writer = RunWriter(tmp_path / case, "run")
        for op in ("sample", "sample+embed", "embed"):
            made = rows(source, "graph", op, -1, [2.0])
            writer.add_layers([{**row, "kernels": kernels if op == "sample+embed" else ""} for row in made])
        writer.flush()
        (tmp_path / case / "layers.parquet").replace(folder / "layers.parquet")
        runs = load(folder)
        [shape] = lines(runs, runs.runs[0], TOY)
        found[case] = {line.op: line.cost.bytes for line in shape.lines}
    assert found["by the head's"]["sample+embed"] == found["by the head's"]["embed"]
    for case in ("by its own", "eager"):
        assert found[case]["sample+embed"] > found[case]["sample"] > found[case]["embed"]


def test_a_run_on_several_gpus_is_refused(tmp_path: Path) -> None:
    config = dataclasses.asdict(compose(["model=tiny", "engine=nano", "+engine.options.tensor_parallel_size=2"]))
    runs = load(small_run(tmp_path / "run", config=config))
    with pytest.raises(InputError, match="several GPUs"):
        lines(runs, runs.runs[0], TOY)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_ARRAYS", (MIB,))
    monkeypatch.setattr(module, "CPU_PRODUCTS", (64,))
    assert main(["--device", "cpu"]) == OK
    assert "float32 products" in capsys.readouterr().out
    run = str(small_run(tmp_path / "run"))
    assert main([run]) == BAD_INPUT
    assert "No ceilings are kept of Toy" in capsys.readouterr().err
    assert main([run, "--read", "1", "--matrix", "100"]) == OK
    printed = capsys.readouterr().out
    assert "nano, tiny, float32: decode, batch 2, context 7" in printed and "host, graph" in printed
    assert "faster than the ceiling" not in printed
    assert main([run, "--read", "1e-9", "--matrix", "1e-9"]) == OK  # which nothing is slower than
    assert "faster than the ceiling" in capsys.readouterr().out
    keep(TOY, Key("Toy", "1", "2"))
    assert main([run]) == OK
    assert main([run, "--read", "0", "--matrix", "100"]) == BAD_INPUT
    assert main([str(tmp_path / "nothing")]) == BAD_INPUT
    with pytest.raises(SystemExit):
        main([run, "--read", "1"])


# --- the committed runs ---

REGISTER_BYTES = 132 * 256 * 1024
"""Of an H200's multiprocessors."""


@pytest.fixture(scope="module")
def reference() -> dict[str, list[ShapeLines]]:
    runs = load(*(REFERENCE / f"{engine}-qwen3-0.6b-latency" for engine in ("vllm", "nano", "fused")))
    return {run["engine"]: lines(runs, run, H200) for run in runs.runs}


@pytest.mark.parametrize("engine", ["vllm", "nano", "fused"])
def test_no_committed_time_is_below_its_floor(reference: dict[str, list[ShapeLines]], engine: str) -> None:
    assert len(reference[engine]) == 13
    for shape in reference[engine]:
        ops = [line.op for line in shape.lines]
        assert ops[-2:] == ["layer", STEP]
        if engine == "fused" and shape.phase == "decode":  # a step's draw embeds its tokens for the next one
            assert "sample+embed" in ops
        else:
            assert ops[0] in ("embed", "embed+input_norm") and "sample" in ops
        assert any(op.endswith("lm_head") for op in ops)
        for line in shape.lines:
            # What fits into the L2 of 50 MB may come from there, faster than memory gives it.
            most = 1.05 if line.cost.bytes > 50e6 else 2.0
            if (engine, line.op) == ("vllm", "post_norm"):
                # Of four tensors that a norm with its sum moves, its compiler leaves one to the next norm.
                most *= 4 / 3
            if engine == "fused" and shape.phase == "decode" and line.op.endswith("lm_head"):
                # Its first weights come while the kernel before it still has the time: as many as registers hold.
                most += REGISTER_BYTES / line.cost.bytes
            if line.op == "embed":
                # Half of its bytes are written, and may stay in the L2; and a row that is asked for twice is read once.
                most = 2.0
            assert 0 < line.fraction <= most, (shape, line)


def test_what_is_known_of_the_committed_runs(reference: dict[str, list[ShapeLines]]) -> None:
    """Large products and the head run near the ceilings; if bytes or operations were miscounted they would not."""
    (big, apart) = (
        {line.op: line for s in reference[engine] if (s.phase, s.batch_size) == ("prefill", 16) for line in s.lines}
        for engine in ("fused", "nano")
    )
    for op in ("o_proj", "gate_up_proj+silu_mul", "down_proj"):
        assert big[op].bound == "operations" and 0.8 < big[op].fraction < 1
    assert apart["silu_mul"].bound == "bytes" and 0.8 < apart["silu_mul"].fraction < 1.05  # 4.4 TB/s are read here
    (one,) = (s for s in reference["fused"] if (s.phase, s.batch_size, s.tokens) == ("decode", 1, 128))
    head = next(line for line in one.lines if line.op.endswith("lm_head"))
    assert 0.9 < head.fraction < 1.05 + REGISTER_BYTES / head.cost.bytes
