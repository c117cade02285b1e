"""The exported trace against the rules of the trace-event format, and against the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from report_runs import SHAPE, in_graphs_and_eager, kernel_trace, key, layer_row, record, step_row, timed, write

from harness.trace import BAD_INPUT, GPU_TRACK, HOST_TRACK, OK, main

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "h200"
NS = 1e-3
ROUNDING = 10 * NS
"""Committed tables hold whole ns; sums of some of them are off by a few."""


def exported(run: Path, tmp_path: Path) -> dict[str, Any]:
    assert main([str(run), "-o", str(tmp_path / "trace.json")]) == OK
    return json.loads((tmp_path / "trace.json").read_text())


def slices(trace: dict[str, Any], track: int = GPU_TRACK) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == track]


def check_format(trace: dict[str, Any]) -> None:
    """Required keys of each kind of event, and slices of one track that are nested or apart."""
    assert isinstance(trace["traceEvents"], list) and trace["traceEvents"]
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "ts"} <= event.keys() and event["ph"] in "XM"
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["cat"], str)
        else:
            assert event["name"] in ("process_name", "process_sort_index", "thread_name") and event["args"]
    named = {e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    tracks: dict[tuple[int, int], list] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["pid"] in named
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        opened: list[tuple[float, float]] = []
        for begin, end in spans:  # in the order of the file, which viewers keep for equal times
            while opened and opened[-1][1] <= begin + 1e-9:
                opened.pop()
            assert not opened or (opened[-1][0] - 1e-9 <= begin and end <= opened[-1][1] + 1e-9), (begin, end, opened)
            opened.append((begin, end))


def test_a_hand_made_step(tmp_path: Path) -> None:
    """Of s = 0, 1, 4 the median step is that of s = 1."""
    layers, steps = kernel_trace((0.0, 4.0, 1.0))
    host = [
        {**key("host", "graph", i), "host_phase": p, "latency_us": us + i}
        for i in range(3)
        for p, us in (("launch", 11.0), ("schedule", 7.0), ("sample", -1.0))
    ]  # in step 1, sample takes no time
    trace = exported(
        write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(140.0)}]), layers, steps, host), tmp_path
    )
    check_format(trace)
    found = slices(trace)
    names = ["input_norm", "qkv_proj", "attention", "attention", "down_proj"]
    assert [s["name"] for s in found] == ["embed", "layer 0", *names, "layer 1", *names, "lm_head", "sample"]
    first = found[1:7]
    assert [s["ts"] for s in first] == [5.0, 5.0, 7.0, 18.0, 21.0, 26.0]
    assert [s["dur"] for s in first] == [41.0, 2.0, 11.0, 3.0, 4.0, 20.0]
    assert first[2]["args"]["kernels"] == "gemm; reduce" and first[2]["cat"] == "attention"
    assert first[5]["ts"] - (first[4]["ts"] + first[4]["dur"]) == 1.0  # the gap
    phases = slices(trace, HOST_TRACK)
    assert [(p["name"], p["ts"], p["dur"]) for p in phases] == [("schedule", 0.0, 8.0), ("launch", 8.0, 12.0)]
    [process] = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert process == "nano: decode, batch 1, context 128, toy (cupti, graph, arm default)"


def test_overlapping_kernels_stay_apart(tmp_path: Path) -> None:
    """A kernel that started at 4 beside one that ran until 10, and then ran until 15, adds 5 from 10 on."""
    who = key("cupti", "graph", 0)
    layers = [
        layer_row(who, 0, "layer", "layer", 0.0, 15.0),
        layer_row(who, 0, "attention", "qkv_proj", 0.0, 10.0),
        layer_row(who, 0, "attention", "attention", 4.0, 5.0),
        layer_row(who, 1, "layer", "layer", 14.0, 6.0),
        layer_row(who, 1, "mlp", "down_proj", 14.0, 6.0),
    ]
    steps = [step_row(who, 30.0, 21.0)]
    run = write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(9.0)}]), layers, steps)
    trace = exported(run, tmp_path)
    check_format(trace)
    found = {(s["name"], s["args"]["layer"]): (s["ts"], s["dur"]) for s in slices(trace)}
    assert found["attention", 0] == (10.0, 5.0) and found["layer 1", 1] == (15.0, 6.0) == found["down_proj", 1]
    assert next(s for s in slices(trace) if s["name"] == "attention")["args"]["start_us"] == 4.0


def test_layers_and_ops_of_two_traces_are_two_processes(tmp_path: Path) -> None:
    layers, steps = in_graphs_and_eager()
    trace = exported(
        write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(140.0)}]), layers, steps), tmp_path
    )
    check_format(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert ["cuda_event, graph" in names[0], "cuda_event, eager" in names[1], len(names)] == [True, True, 2]
    whole, split = ([s for s in slices(trace) if s["pid"] == process] for process in (1, 2))
    assert [s["name"] for s in whole] == ["embed", "layer 0", "layer 1", "lm_head", "sample"]
    assert [s["dur"] for s in whole] == [5.0, 41.0, 41.0, 30.0, 6.0]
    assert [s["dur"] for s in split if s["name"] == "qkv_proj"] == [22.0, 22.0]


def test_committed_traces(tmp_path: Path) -> None:
    """Each shape once; durations are the table's."""
    folder = REFERENCE / "nano-qwen3-0.6b-latency"
    trace = exported(folder, tmp_path)
    check_format(trace)
    layers = pq.read_table(folder / "layers.parquet").to_pandas()
    steps = pq.read_table(folder / "steps.parquet").to_pandas()
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    kernels = layers[layers["source"] == "cupti"]
    assert len(names) == len(kernels[["phase", "batch_size", "new_tokens", "context_len"]].drop_duplicates())
    [process] = [pid for pid, n in names.items() if "decode, batch 1, context 128" in n]
    chosen = {"phase": "decode", "batch_size": 1, "context_len": 128, "mode": "graph", "source": "cupti"}
    mine, traced = (frame[(frame[list(chosen)] == pd.Series(chosen)).all(axis=1)] for frame in (layers, steps))
    median = traced["gpu_us"].median()
    iteration = traced.set_index("iteration")["gpu_us"].sub(median).abs().idxmin()
    expected = sorted(mine[mine["iteration"] == iteration]["latency_us"])
    durations = sorted(s["dur"] for s in slices(trace) if s["pid"] == process)
    assert durations == pytest.approx(expected, abs=ROUNDING) and len(durations) > 28


def test_nothing_traced_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(140.0)}]))
    assert main([str(run), "-o", str(tmp_path / "trace.json")]) == BAD_INPUT
    assert "no step was traced" in capsys.readouterr().err and not (tmp_path / "trace.json").exists()
