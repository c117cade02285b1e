"""Tables of where a step's time goes, from traces with chosen times and from the committed ones."""

from pathlib import Path

import pytest

from engines.base import InputError
from scripts.tables import baseline, traces
from scripts.tables.sources import runs
from tests.scripts.table_runs import cells, cupti, layer_rows, made_up_run, write


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


def test_the_committed_graph_traces_close() -> None:
    """Layers, head and sampling are parts of the step: what is left is never negative nor most of it."""
    for shape, trace in traces.traced_decodes(runs("results/reference/h200"), "nano"):
        whole = shape["timed"]["wall_us"] if trace.source == traces.CUPTI else trace.record["wall_us"]
        assert 0 <= 1 - sum(traces.step_parts(trace.rows).values()) / whole < 0.5
