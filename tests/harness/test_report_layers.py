"""Layers, ops and steps in the report, against the traces that they come from."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from report_pages import close, shown
from report_runs import SHAPE, Page, in_graphs_and_eager, kernel_trace, key, record, timed, write


def test_ops_of_a_real_run_are_its_layers(tiny: Path, tiny_page: Page) -> None:
    layers = pq.read_table(tiny / "layers.parquet").to_pandas()
    largest = layers[(layers["phase"] == "decode") & (layers["batch_size"] == layers["batch_size"].max())]
    ops = largest[(largest["layer_index"] >= 0) & (largest["op"] != "layer")]
    sums = ops.pivot_table(index=["op", "layer_index"], columns="iteration", values="latency_us", aggfunc="sum")
    means = sums.median(axis=1).groupby("op").mean()
    batch = int(largest["batch_size"].iloc[0])
    table = tiny_page.table("Layers and ops", f"decode, batch {batch}")
    assert {row[0] for row in table.rows} == set(means.index) and len(means) > 8
    for op, us in means.items():
        assert close(table.cell(str(op), "nano, µs"), us), op


def test_layers_inside_graphs_are_not_split(tmp_path: Path) -> None:
    """Events in graphs see whole layers only; they are preferred to the eager trace, which alone has the ops."""
    layers, steps = in_graphs_and_eager()
    write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(140.0)}]), layers, steps)
    found = shown(tmp_path / "run", tmp_path, ("layers", "heat"))
    blocks = {row[1]: row[2:] for row in found.table("Time per layer").rows}
    assert blocks["whole layer, not split"] == ["82.00", "41.00", "41.00", "41.00"]
    assert blocks["final norm and head"][0] == "30.00" and "attention" not in blocks
    ops = {row[0]: row[1] for row in found.table("Layers and ops").rows}
    assert ops == {"input_norm": "4.000", "qkv_proj": "22.00", "attention": "14.00", "down_proj": "40.00"}


def test_kernels_are_preferred_and_parts_add_up(tmp_path: Path) -> None:
    """Hand-made: medians over s = 0, 1, 2 are those of s = 1; the eager rows beside them must not show."""
    layers, steps = kernel_trace()
    eager = [{**row, "source": "cuda_event", "mode": "eager", "latency_us": 999.0} for row in layers]
    eager_steps = [{**row, "source": "cuda_event", "mode": "eager"} for row in steps]
    shapes = [{**SHAPE, "timed": timed(140.0), "kernels": {"closure": 0.987, "overhead": 1.04}}]
    host = [
        {**key("host", "graph", i), "host_phase": phase, "latency_us": us + i}
        for i in range(3)
        for phase, us in (("schedule", 7.0), ("launch", 11.0), ("rest", 100.0))
    ]
    write(tmp_path / "run", record(shapes=shapes), layers + eager, steps + eager_steps, host)
    found = shown(tmp_path / "run", tmp_path)
    blocks = {row[1]: row[2:] for row in found.table("Time per layer").rows}
    assert blocks["attention"] == ["40.00", "20.00", "20.00", "20.00"]  # 2 + (10 + 1) + 3 + 4, in two layers
    assert blocks["MLP"] == ["40.00", "20.00", "20.00", "20.00"]
    assert blocks["embedding"][0] == "5.000" and blocks["sampling"][0] == "6.000"
    ops = {row[0]: row[1] for row in found.table("Layers and ops").rows}
    assert ops == {"input_norm": "2.000", "qkv_proj": "11.00", "attention": "7.000", "down_proj": "20.00"}
    parts, phases = (t for t in found.tables if t.section == "Where the step goes")
    [row] = parts.rows
    named = dict(zip(parts.header, row, strict=True))
    # Of s = 1: wall 149, GPU 125; ops of layers 2 × 40, embed 5, head 30, sample 6; 4 in gaps; 24 on the host.
    assert named["traced by"] == "cupti, graph, arm default" and named["step, ms"] == "0.140"
    assert named["decoder layers"] == "0.080" and named["final norm and head"] == "0.030"
    assert named["gaps between kernels"] == "0.004" and named["host only"] == "0.024"
    assert named["traced step"] == "0.149" and named["closure"] == "0.987" and named["overhead"] == "1.04×"
    assert phases.rows == [["decode, batch 1, context 128", "nano", "8.000", "12.00", "101.0"]]
