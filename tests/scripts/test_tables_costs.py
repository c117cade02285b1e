"""Tables of what a decode step is made of and how far its traces close, from traces with chosen times."""

from pathlib import Path

from scripts.tables import costs
from tests.scripts.table_runs import cells, cupti, layer_rows, made_up_run, write


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
