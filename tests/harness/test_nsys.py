"""An export made by hand to the documented schema of Nsight Systems, read into our tables; and the profiling script.

The schema is that of NVIDIA's "SQLite Schema Reference" (Nsight Systems User Guide), cut down to the columns that are
read: ranges in NVTX_EVENTS (eventType 59 push/pop, 75 a domain's creation), calls in CUPTI_ACTIVITY_KIND_RUNTIME, work
in CUPTI_ACTIVITY_KIND_KERNEL and _MEMCPY, the nodes of graphs in CUDA_GRAPH_NODE_EVENTS.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_runs import record, write

from harness.nsys.__main__ import BAD_INPUT, OK, main
from harness.results import load
from harness.trace import main as trace

ROOT = Path(__file__).parents[2]
VM = 1 << 48
PID, OTHER_PID = VM + (7 << 24), VM + (8 << 24)
TID = PID + 9
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL,
    shortName INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUDA_GRAPH_NODE_EVENTS (start INTEGER NOT NULL, end INTEGER, eventClass INTEGER, globalTid INTEGER,
    graphNodeId INTEGER NOT NULL, originalGraphNodeId INTEGER);
"""
STRINGS = {1: "harness", 2: "other", 3: "cudaGraphLaunch", 4: "void gemm<bf16>(int)", 5: "gemm", 6: "flash_fwd",
           7: "qkv_proj", 8: "choose_token_kernel"}  # fmt: skip
NODES = {111: (11, 1050), 112: (12, 1150), 113: (13, 1450), 114: (14, 1850), 115: (15, 1350)}
"""Of the instantiated graph: each node's original, and when that was captured."""


def tables() -> dict[str, list[dict[str, Any]]]:
    """A capture, two replays of it in decode steps, and a prefill without a graph."""

    def pushed(start: int, end: int, text: str | None, domain: int = 5, text_id: int | None = None) -> dict[str, Any]:
        return {"start": start, "end": end, "eventType": 59, "text": text, "textId": text_id, "globalTid": TID,
                "domainId": domain}  # fmt: skip

    def call(start: int, number: int) -> dict[str, Any]:
        return {"start": start, "end": start + 100, "eventClass": 0, "globalTid": TID, "correlationId": number,
                "nameId": 3, "returnValue": 0}  # fmt: skip

    def ran(start: int, end: int, number: int, name: int, node: int | None = None, pid: int = PID) -> dict[str, Any]:
        return {"start": start, "end": end, "deviceId": 0, "streamId": 7, "correlationId": number, "globalPid": pid,
                "demangledName": name, "shortName": 5, "graphNodeId": node}  # fmt: skip

    ranges = [
        {"start": 0, "end": None, "eventType": 75, "textId": 1, "globalTid": TID, "domainId": 5},
        {"start": 0, "end": None, "eventType": 75, "textId": 2, "globalTid": TID, "domainId": 6},
        pushed(100, 99_000, "nano toy latency"),
        pushed(9_000, 45_000, "decode b=9 t=9 c=9", domain=6),  # somebody else's
        pushed(1_000, 1_400, "layer 0"), pushed(1_010, 1_100, None, text_id=7), pushed(1_100, 1_300, "attention"),
        pushed(1_400, 1_800, "layer 1"), pushed(1_410, 1_500, None, text_id=7), pushed(1_800, 1_900, "lm_head"),
    ]  # fmt: skip
    calls, kernels = [], [ran(12_000, 19_000, 50, 6, node=111, pid=OTHER_PID)]
    for at, number in ((0, 50), (20_000, 60)):
        ranges += [pushed(at + 10_000, at + 20_000, "decode b=1 t=1 c=128"), pushed(at + 14_900, at + 15_100, "sample")]
        calls += [call(at + 10_500, number), call(at + 15_000, number + 1)]
        kernels += [
            ran(at + 12_000, at + 13_000, number, 4, 111),
            ran(at + 12_800, at + 14_000, number, 6, 112),  # beside the one before for 200 ns
            ran(at + 14_000, at + 14_100, number, 4, 115),  # in layer 0, in none of its ops
            ran(at + 14_500, at + 15_500, number, 4, 113),
            ran(at + 16_000, at + 17_000, number, 4, 114),
            ran(at + 17_200, at + 17_500, number + 1, 8),
        ]
    ranges += [pushed(50_000, 60_000, "prefill b=2 t=16 c=0"), pushed(50_100, 50_900, "layer 0"),
               pushed(50_150, 50_300, "input_norm+qkv_proj")]  # fmt: skip
    calls += [call(50_200, 70), call(50_950, 71)]
    kernels.append(ran(51_000, 52_000, 70, 4))
    copy = {"start": 52_500, "end": 52_600, "deviceId": 0, "streamId": 7, "correlationId": 71, "globalPid": PID,
            "bytes": 8, "graphNodeId": None}  # fmt: skip
    originals = [{"start": at, "globalTid": TID, "graphNodeId": first} for first, at in NODES.values()]
    copies = [
        {"start": 3_000, "globalTid": TID, "graphNodeId": n, "originalGraphNodeId": o} for n, (o, _) in NODES.items()
    ]
    return {
        "StringIds": [{"id": i, "value": text} for i, text in STRINGS.items()], "NVTX_EVENTS": ranges,
        "CUPTI_ACTIVITY_KIND_RUNTIME": calls, "CUPTI_ACTIVITY_KIND_KERNEL": kernels,
        "CUPTI_ACTIVITY_KIND_MEMCPY": [copy], "CUDA_GRAPH_NODE_EVENTS": originals + copies,
    }  # fmt: skip


def sqlite_export(path: Path, content: dict[str, list[dict[str, Any]]]) -> Path:
    with sqlite3.connect(path) as database:
        database.executescript(SCHEMA)
        for table, rows in content.items():
            for row in rows:
                marks = ", ".join("?" * len(row))
                database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))
    database.close()
    return path


def parquet_export(path: Path, content: dict[str, list[dict[str, Any]]]) -> Path:
    path.mkdir()
    for table, rows in content.items():
        columns = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), path / f"{table}.parquet")
    return path


def read(export: Path, folder: Path, *options: str) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    assert main([str(export), "-o", str(folder), *options]) == OK
    runs = load(folder)
    return runs.layers, runs.steps, runs.runs[0]


EXPECTED = [  # of a decode step: layer, block, op, start, latency
    (0, "layer", "layer", 0.0, 2.1), (0, "attention", "qkv_proj", 0.0, 1.0), (0, "attention", "attention", 0.8, 1.0),
    (1, "layer", "layer", 2.5, 1.0), (1, "attention", "qkv_proj", 2.5, 1.0), (-1, "head", "lm_head", 4.0, 1.0),
    (-1, "sample", "sample", 5.2, 0.3),
]  # fmt: skip


@pytest.mark.parametrize("make", [sqlite_export, parquet_export])
def test_kernels_in_graphs_find_their_layers(make: Any, tmp_path: Path) -> None:
    layers, steps, run = read(make(tmp_path / "export.x", tables()), tmp_path / "run")
    assert set(layers["source"]) == {"nsys"} and (run["engine"], run["model"]) == ("nano", "toy")
    decode = layers[layers["phase"] == "decode"]
    for _, rows in decode.groupby("iteration"):
        found = rows[["layer_index", "block", "op", "start_us", "latency_us"]].to_numpy().tolist()
        assert [f[:3] for f in found] == [list(e[:3]) for e in EXPECTED]
        assert [x for f in found for x in f[3:]] == pytest.approx([x for e in EXPECTED for x in e[3:]])
    assert sorted(set(decode["iteration"])) == [0, 1] and set(decode["mode"]) == {"graph"}
    assert set(decode["context_len"]) == {128} and set(decode[decode["op"] == "qkv_proj"]["kernels"]) == {
        "gemm<bf16>(int)"
    }
    of_decode = steps[steps["phase"] == "decode"]
    assert of_decode["wall_us"].tolist() == [10.0, 10.0] and of_decode["gpu_us"].tolist() == pytest.approx([5.5, 5.5])
    assert of_decode["instrumented"].all()


def test_kernels_of_ordinary_launches_find_their_ops(tmp_path: Path) -> None:
    layers, steps, run = read(sqlite_export(tmp_path / "export.sqlite", tables()), tmp_path / "run")
    prefill = layers[layers["phase"] == "prefill"]
    assert prefill[["layer_index", "op", "latency_us"]].to_numpy().tolist() == [
        [0, "layer", 1.0], [0, "input_norm+qkv_proj", 1.0],
    ]  # fmt: skip
    assert set(prefill["mode"]) == {"eager"} and set(prefill["new_tokens"]) == {16} == {2 * 8}
    # The copy is in the step, and in no op: 51.0 to 52.6.
    assert steps[steps["phase"] == "prefill"]["gpu_us"].tolist() == pytest.approx([1.6])
    busy, placed = 2 * 4.4 + 1.1, 2 * 4.3 + 1.0
    assert run["nsys"]["attributed"] == pytest.approx(placed / busy) and "a place in the model" in run["warnings"][0]


def test_nodes_captured_before_profiling_have_no_place(tmp_path: Path) -> None:
    content = tables() | {"CUDA_GRAPH_NODE_EVENTS": []}
    layers, _, run = read(sqlite_export(tmp_path / "export.sqlite", content), tmp_path / "run")
    assert set(layers[layers["phase"] == "decode"]["op"]) == {"sample"}
    assert run["nsys"]["attributed"] < 0.2


def test_the_profiled_run_says_who_ran(tmp_path: Path) -> None:
    profiled = write(tmp_path / "profiled" / "a", record("fused", arm="default", model="qwen3-0.6b"))
    export = sqlite_export(tmp_path / "export.sqlite", tables())
    layers, _, run = read(export, tmp_path / "run", "--run", str(profiled))
    assert set(layers["engine"]) == {"fused"} and set(layers["arm"]) == {"default"}
    assert run["model"] == "qwen3-0.6b" and run["verification"]["status"] == "passed"
    assert trace([str(tmp_path / "run"), "-o", str(tmp_path / "trace.json")]) == OK


def test_what_is_no_export_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.sqlite").write_text("not a database, " * 100)
    (tmp_path / "a.nsys-rep").write_text("")
    no_ranges = [row for row in tables()["NVTX_EVENTS"] if "b=" not in str(row.get("text"))]
    files = {
        "missing.sqlite": "does not exist",
        "words.sqlite": "is no export",
        "a.nsys-rep": "nsys export --type sqlite",
        sqlite_export(tmp_path / "empty.sqlite", {}).name: "no kernels",
        sqlite_export(tmp_path / "steps.sqlite", tables() | {"NVTX_EVENTS": no_ranges}).name: "no steps",
    }
    for name, reason in files.items():
        assert main([str(tmp_path / name), "-o", str(tmp_path / "run")]) == BAD_INPUT
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "nsys_profile.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_script_without_arguments_says_what_it_does() -> None:
    done = script()
    assert done.returncode == 0 and "harness.nsys" in done.stdout and "developer.nvidia.com" in done.stdout


def test_script_says_where_to_get_nsys() -> None:
    done = script("engine=nano", NSYS="no-such-nsys")
    assert done.returncode == 2 and "https://developer.nvidia.com/nsight-systems" in done.stderr
    assert script("nano").returncode == 2


def test_script_profiles_the_traced_passes_node_by_node() -> None:
    done = script("engine=nano", "model=tiny", DRY_RUN="1", OUT="results/x")
    assert done.returncode == 0, done.stderr
    _, profile, export, reading = done.stdout.splitlines()
    for flag in ("-t cuda\\,nvtx", "--sample=none", "--cpuctxsw=none", "--cuda-graph-trace=node",
                 "--capture-range=cudaProfilerApi", "--capture-range-end=stop"):  # fmt: skip
        assert flag in profile, flag
    assert profile.endswith("-m harness instrument=nvtx engine=nano model=tiny")
    assert "export --type sqlite" in export and "-m harness.nsys results/x/" in reading
