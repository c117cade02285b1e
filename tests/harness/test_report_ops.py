"""Studies of single ops in the report: chosen times, and the ratios of a real study."""

from __future__ import annotations

import json
from pathlib import Path

from report_pages import close, shown, texts
from report_runs import record

from harness.ops.__main__ import run as study
from harness.report.__main__ import OK
from harness.report.report import Report
from harness.results import RunWriter


def test_op_study_says_where_fusing_loses(tmp_path: Path) -> None:
    times = {("fused", 1): 2.0, ("torch", 1): 3.0, ("fused", 64): 9.0, ("torch", 64): 5.0}
    common = {"op": "qkv_proj", "dtype": "bfloat16", "mode": "graph", "source": "cuda_event", "bytes": 1,
              "operations": 1, "saved_bytes": 0, "error": 0.0}  # fmt: skip
    samples = [
        {**common, "variant": variant, "shape": f"{rows} x 4096 x 1024", "rows": rows, "iteration": i,
         "latency_us": us + noise, "status": "ok"}
        for (variant, rows), us in times.items() for i, noise in enumerate((-0.5, 0.0, 7.0))
    ]  # fmt: skip
    failed = {**samples[0], "variant": "liger", "latency_us": None, "error": None, "status": "not installed"}
    both = {"fused": "fused", "unfused": "torch", "ratio": 1.8, "low": 1.7, "high": 1.9, "verdict": "slower"}
    product = {"op": "qkv_proj", "weight_rows": 4096, "k": 1024, "rows": [{"rows": 64, "fused_over_unfused": both}]}
    writer = RunWriter(tmp_path / "run", "study")
    writer.add_ops([*samples, failed])
    writer.flush()
    writer.write_run(record("ops", study=[product], verification={"status": "passed"}))
    table = shown(tmp_path / "run", tmp_path).table("Op study", "qkv_proj, weight 4096 × 1024, bfloat16")
    assert table.header[:3] == ["rows", "fused, µs", "torch, µs"]
    assert table.rows[0] == ["1", "2.000", "3.000", "fused", "–"]
    assert table.rows[1] == ["64", "9.000", "5.000", "torch", "fused / torch 1.800× | (1.700 – 1.900) fusing loses"]
    assert texts(tmp_path / "run") == []


def test_a_real_study_has_its_ratios_and_crossover(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    quick = ("rows=[1,2]", "variants=[torch,fused]", "max_iterations=12", "min_iterations=10", "device=cpu")
    assert study([f"into={folder}", "op=rms_norm_linear", "model=tiny", *quick]) == OK
    record = json.loads((folder / "run.json").read_text())["study"][0]
    table = shown(folder, tmp_path, ("ops",)).table("Op study", "input_norm+qkv_proj")
    for row, of in zip(table.rows, record["rows"], strict=True):
        assert close(row[table.header.index("torch, µs")], of["variants"]["torch"]["median_us"])
        assert row[-1].startswith(f"fused / torch {of['fused_over_unfused']['ratio']:.3f}×")
    assert "Fusing " in Report([folder], tmp_path / "plots").ops()._repr_html_()  # type: ignore[union-attr]
