"""Result folders: what is written comes back, at every moment, and what is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.base import InputError, RequestResult
from harness import results
from harness.results import RunWriter, load, request_row, write_json
from harness.schema import SCHEMA_VERSION, TABLES
from harness.slim import slim

WHO = {"engine": "fused", "arm": "default"}
SHAPE = {**WHO, "phase": "decode", "batch_size": 8, "new_tokens": 8, "context_len": 128, "mode": "graph",
         "source": "cuda_event"}  # fmt: skip


def _layer(iteration: int, layer: int = 0, **changed: Any) -> dict[str, Any]:
    return {**SHAPE, "iteration": iteration, "layer_index": layer, "block": "layer", "op": "layer", "kernels": "",
            "start_us": layer * 30.0, "latency_us": 29.12345 + iteration, **changed}  # fmt: skip


def _step(iteration: int, **changed: Any) -> dict[str, Any]:
    return {**SHAPE, "iteration": iteration, "wall_us": 800.0, "instrumented": False, "status": "ok", **changed}


def _request(name: str = "0") -> dict[str, Any]:
    times = tuple(10.5 + 0.01 * i for i in range(4))
    return request_row(**WHO, result=RequestResult(name, 100, (1, 2, 3, 4), 10.0, times, "length"), start_s=9.0)


def _write(folder: Path, run_id: str = "run", iterations: int = 3) -> Path:
    writer = RunWriter(folder, run_id)
    writer.add_layers(_layer(i, layer) for i in range(iterations) for layer in range(2))
    writer.add_steps(_step(i) for i in range(iterations))
    writer.add_requests([_request()])
    writer.flush()
    writer.write_run({"status": "done", "engine": "fused"})
    return folder


def test_rows_come_back(tmp_path: Path) -> None:
    runs = load(_write(tmp_path / "run"))
    assert [(r["run_id"], r["status"], r["schema_version"]) for r in runs.runs] == [("run", "done", SCHEMA_VERSION)]
    assert len(runs.layers) == 6 and set(runs.layers["run_id"]) == {"run"}
    assert runs.layers.iloc[3].to_dict() == {"run_id": "run", **_layer(1, 1)}
    step = runs.steps.iloc[0]
    assert step["wall_us"] == 800.0 and np.isnan(step["gpu_us"]) and not step["instrumented"]
    assert list(runs.requests["itl_ms"].iloc[0]) == pytest.approx([10.0, 10.0, 10.0])


def test_request_metrics() -> None:
    row = _request()
    assert row["arrival_s"] == 1.0 and row["output_tokens"] == 4
    assert [row[k] for k in ("ttft_ms", "tpot_ms", "e2el_ms")] == pytest.approx([500.0, 10.0, 530.0])
    one = request_row(**WHO, result=RequestResult("1", 5, (7,), 2.0, (2.25,), "stop"), start_s=0.0)
    assert (one["ttft_ms"], one["tpot_ms"], one["itl_ms"], one["e2el_ms"]) == (250.0, None, [], 250.0)
    none = request_row(**WHO, result=RequestResult("2", 5, (), 2.0, (), "abort"), start_s=0.0)
    assert (none["ttft_ms"], none["tpot_ms"], none["itl_ms"], none["e2el_ms"]) == (None, None, [], None)


def test_types_are_the_same_with_and_without_rows(tmp_path: Path) -> None:
    empty_run = tmp_path / "empty"
    RunWriter(empty_run, "empty")
    full, empty = load(_write(tmp_path / "full")), load(empty_run)
    both = load(tmp_path / "full", empty_run)
    for name, schema in TABLES.items():
        assert getattr(empty, name).empty
        assert list(getattr(empty, name)) == schema.names
        assert getattr(empty, name).dtypes.to_dict() == getattr(full, name).dtypes.to_dict()
        pd.testing.assert_frame_equal(getattr(both, name), getattr(full, name))


def test_columns_say_what_they_are(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run")
    for name in TABLES:
        schema = pq.read_schema(folder / f"{name}.parquet")
        assert schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
        for column in schema:
            assert column.metadata[b"description"], column.name
            suffix = column.name.rpartition("_")[2]
            if suffix in ("us", "ms", "s"):
                assert column.metadata[b"unit"].decode() == suffix
    assert "(n - 1)" in TABLES["requests"].field("tpot_ms").metadata[b"description"].decode()


def test_a_flush_keeps_earlier_rows_and_leaves_nothing_else(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    for i in range(3):
        writer.add_layers([_layer(i)])
        writer.flush()
        assert list(load(tmp_path / "run").layers["iteration"]) == list(range(i + 1))
        with (tmp_path / "run" / "layers.parquet").open("rb") as old:
            before = (tmp_path / "run" / "layers.parquet").read_bytes()
            writer.flush()  # nothing new: nothing is written
            assert os.fstat(old.fileno()).st_ino == (tmp_path / "run" / "layers.parquet").stat().st_ino
            writer.add_layers([])
            writer.flush()  # whoever reads the old file goes on reading all of it
            assert os.fstat(old.fileno()).st_ino != (tmp_path / "run" / "layers.parquet").stat().st_ino
            assert old.read() == before
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"run.json", *(f"{name}.parquet" for name in TABLES)}


def test_an_interrupted_write_keeps_the_last_valid_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    writer.add_layers([_layer(0)])
    writer.flush()

    def half(table: pa.Table, path: Path, **_: Any) -> None:
        path.write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    writer.add_layers([_layer(1)])
    with monkeypatch.context() as patched:
        patched.setattr(results.pq, "write_table", half)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    assert len(load(tmp_path / "run").layers) == 1
    writer.flush()  # what the broken flush held is not lost
    assert len(load(tmp_path / "run").layers) == 2
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_wrong_rows_are_refused_and_change_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    for bad, what in (
        (_layer(1, colour="red"), "no such columns: colour"),
        ({k: v for k, v in _layer(1).items() if k != "op"}, "column op needs a value"),
        ({**_layer(1), "iteration": "first"}, "wrong type"),
        (_layer(1, latency_us=float("nan")), "latency_us is nan"),
        (_layer(1, latency_us=float("inf")), "latency_us is inf"),
    ):
        with pytest.raises(ValueError, match=what):
            writer.add_layers([_layer(0), bad])
    with pytest.raises(ValueError, match="JSON"):
        writer.write_run({"kl": float("nan")})
    writer.flush()
    assert load(tmp_path / "run").layers.empty


def test_numpy_values_are_taken(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    writer.add_layers([{**_layer(0), "iteration": np.int64(3), "latency_us": np.float32(1.5)}])
    writer.flush()
    assert load(tmp_path / "run").layers["latency_us"].tolist() == [1.5]


def test_failed_shapes_are_rows(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    writer.add_steps([_step(0, wall_us=None, status="out of memory")])
    writer.flush()
    step = load(tmp_path / "run").steps.iloc[0]
    assert np.isnan(step["wall_us"]) and step["status"] == "out of memory"


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", "first")
    with pytest.raises(InputError, match="already holds a run"):
        RunWriter(tmp_path / "run", "second")
    assert load(tmp_path / "run").runs[0]["run_id"] == "first"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunWriter(tmp_path / "file" / "run", "run")
    with pytest.raises(InputError, match="is not a folder"):
        RunWriter(tmp_path / "file", "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        RunWriter(tmp_path / "run", "run")


def test_many_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for i in range(3):
        _write(tmp_path / "sweep" / str(i) / "deep", f"run{i}")
    runs = load(tmp_path / "sweep", tmp_path / "sweep" / "1" / "deep")
    assert [r["run_id"] for r in runs.runs] == ["run0", "run1", "run2"]
    assert runs.layers["run_id"].value_counts().to_dict() == {f"run{i}": 6 for i in range(3)}
    assert runs.layers.index.is_unique
    assert Path(runs.runs[1]["run_dir"]) == (tmp_path / "sweep" / "1" / "deep").resolve()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite(path: Path, change: Any) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def _set_version(table: pa.Table, version: bytes | None) -> pa.Table:
    return table.replace_schema_metadata(version and {b"schema_version": version})


def _set_latency(table: pa.Table, value: float | None) -> pa.Table:
    values = pa.array([value, *table["latency_us"].to_pylist()[1:]], type=pa.float64())
    return table.set_column(table.schema.get_field_index("latency_us"), "latency_us", values)


LAYERS, RUN = "layers.parquet", "run.json"


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        (LAYERS, _truncate, "is damaged"),
        (LAYERS, lambda p: p.write_bytes(b""), "is damaged"),
        (LAYERS, lambda p: _rewrite(p, lambda t: _set_version(t, b"99")), "schema version 99"),
        (LAYERS, lambda p: _rewrite(p, lambda t: _set_version(t, None)), "schema version none"),
        (LAYERS, lambda p: _rewrite(p, lambda t: t.drop_columns("op")), "no column op"),
        (LAYERS, lambda p: _rewrite(p, lambda t: _set_latency(t, float("nan"))), "NaN or infinite .* latency_us"),
        (LAYERS, lambda p: _rewrite(p, lambda t: _set_latency(t, float("-inf"))), "NaN or infinite .* latency_us"),
        (LAYERS, lambda p: _rewrite(p, lambda t: _set_latency(t, None)), "empty values in column latency_us"),
        (RUN, lambda p: p.unlink(), r"result tables but no run\.json"),
        (RUN, lambda p: p.write_text('{"run_id": "a", '), "cannot be read"),
        (RUN, lambda p: p.write_text("[]"), "no run_id"),
        (RUN, lambda p: p.write_text('{"run_id": "a", "schema_version": 0}'), "schema version 0"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, damage: Any, what: str) -> None:
    folder = _write(tmp_path / "good") and _write(tmp_path / "bad", "bad")
    damage(folder / file)
    with pytest.raises(InputError, match=what) as error:
        load(tmp_path)
    assert str(folder if what.endswith("json") else folder / file) in str(error.value)


def test_a_column_that_may_be_null_reads_as_null_from_before_it_was_there(tmp_path: Path) -> None:
    old, new = _write(tmp_path / "old", "old"), _write(tmp_path / "new", "new")
    _rewrite(old / "requests.parquet", lambda t: t.drop_columns("rate"))
    writer = RunWriter(tmp_path / "served", "served")
    writer.add_requests([{**_request(), "rate": 4.0}])
    writer.flush()
    runs = load(tmp_path)
    assert runs.requests.set_index("run_id")["rate"].isna().to_dict() == {"old": True, "new": True, "served": False}
    assert runs.requests["rate"].dtype == np.float64 and runs.requests["rate"].sum() == 4.0
    pd.testing.assert_frame_equal(load(old).requests.drop(columns="run_id"), load(new).requests.drop(columns="run_id"))
    slim(old, tmp_path / "small", max_iterations=5)
    assert "rate" in pq.read_schema(tmp_path / "small" / "requests.parquet").names


def test_missing_tables_are_empty_ones(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run")
    (folder / "requests.parquet").unlink()
    assert load(folder).requests.empty


def test_paths_without_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        load(tmp_path / "nowhere")


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(InputError, match="hold the same run"):
        load(tmp_path)


def test_slim_keeps_whole_iterations_from_first_to_last(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", iterations=50)
    record = json.loads((folder / RUN).read_text())
    (folder / RUN).write_text(json.dumps({**record, "checkpoint": "/home/someone/weights", "notes": ["/a/b", "c/d"]}))
    (folder / ".hydra").mkdir()
    for file in ("config.yaml", "hydra.yaml"):
        (folder / ".hydra" / file).write_text("seed: 0\n")
    target = tmp_path / "reference" / "fused"
    slim(folder, target, max_iterations=5)
    slim(folder, target, max_iterations=5)  # a second time replaces it
    full, small = load(folder), load(target)
    kept = [0, 10, 20, 30, 40]
    assert small.steps["iteration"].tolist() == kept
    assert small.layers["iteration"].tolist() == [i for i in kept for _ in range(2)]
    assert small.layers["latency_us"].iloc[2] == 39.123
    assert small.layers.dtypes.to_dict() == full.layers.dtypes.to_dict()
    assert list(small.requests["itl_ms"].iloc[0]) == [10.0, 10.0, 10.0]
    run = small.runs[0]
    kept = {name: rows for name, rows in run["slimmed"]["rows_before_after"].items() if rows != [0, 0]}
    assert kept == {"layers": [100, 10], "steps": [50, 5], "requests": [1, 1]}
    assert (run["checkpoint"], run["notes"], run["status"]) == ("weights", ["b", "c/d"], "done")
    for name in TABLES:
        schemas = [pq.read_schema(f / f"{name}.parquet") for f in (folder, target)]
        assert schemas[0].equals(schemas[1], check_metadata=True)
    assert {p.name for p in (target / ".hydra").iterdir()} == {"config.yaml"}
    assert {p.name for p in target.parent.iterdir()} == {"fused"}


def test_slim_counts_each_shape_for_itself(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", "run")
    writer.add_steps(_step(i, batch_size=b) for b in (1, 8) for i in range(7))
    writer.add_steps(_step(i, batch_size=b, instrumented=True) for b in (1, 8) for i in range(3))
    writer.add_steps([_step(0, batch_size=256, wall_us=None, status="out of memory")])
    writer.flush()
    slim(tmp_path / "run", tmp_path / "small", max_iterations=3)
    steps = load(tmp_path / "small").steps
    counts = steps.groupby(["instrumented", "batch_size"]).size()
    assert counts.to_dict() == {(False, 1): 3, (False, 8): 3, (False, 256): 1, (True, 1): 3, (True, 8): 3}
    for traced, kept in ((False, {0, 2, 4}), (True, {0, 1, 2})):
        assert set(steps.loc[steps["instrumented"] == traced, "iteration"]) == kept


def test_slim_overwrites_nothing_but_runs(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    for target, what in ((tmp_path / "mine", "not a run"), (folder / "small", "lie in each other")):
        with pytest.raises(InputError, match=what):
            slim(folder, target, 3)
    with pytest.raises(InputError, match="folder of one run"):
        slim(tmp_path, tmp_path / "small", 3)
    assert len(load(folder).layers) == 6


def _refresh(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "scripts" / "reference_refresh.py"
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_reference_refresh_command(tmp_path: Path) -> None:
    _write(tmp_path / "runs" / "a", "a", iterations=9)
    writer = RunWriter(tmp_path / "runs" / "b", "b")
    writer.write_run({"engine": "nano", "model": "qwen3-0.6b", "workload": "latency"})
    done = _refresh(tmp_path / "runs", "--to", tmp_path / "h200", "--iterations", 4)
    assert done.returncode == 0 and " kB  nano-qwen3-0.6b-latency  from b" in done.stdout
    assert {p.name for p in (tmp_path / "h200").iterdir()} == {"a", "nano-qwen3-0.6b-latency"}
    assert len(load(tmp_path / "h200").steps) == 4
    broken = _refresh(tmp_path / "nowhere", "--to", tmp_path / "h200")
    assert (broken.returncode, broken.stdout) == (2, "") and "holds no run" in broken.stderr
    assert "RUN is a folder with runs" in _refresh().stdout


def test_a_whole_folder_of_results_is_refreshed_and_what_was_not_finished_is_named(tmp_path: Path) -> None:
    results = tmp_path / "runs"
    _write(results / "deep" / "down" / "a", "a", iterations=2)
    for name, status in (("c", "ok"), ("d", "running")):
        folder = results / f"ablation-{name}"
        _write(folder / "launch-0" / "fused", f"{name} fused", iterations=1)
        (folder / "launch-0" / "comparison.json").write_text('{"launch": 0}')
        settings = {"engines": ["fused", "fused:features=[]"], "model": {"name": "m"}, "workload": {"name": "w"}}
        (folder / "comparison.json").write_text(json.dumps({"status": status, "settings": settings}))
    RunWriter(results / "e", "e").write_run({"status": "interrupted"})
    (results / "soak.json").write_text('{"passed": true, "log": "/tmp/there/log", "gpu": {"uuid": "GPU-1"}}')
    done = _refresh(results, "--to", tmp_path / "h200")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "h200").iterdir()} == {"a", "ablation-c", "soak.json"}
    assert json.loads((tmp_path / "h200" / "soak.json").read_text()) == {"passed": True, "log": "log", "gpu": {}}
    left_out = [line.rsplit("/", 1)[1] for line in done.stderr.splitlines() if line.startswith("left out")]
    assert left_out == ["ablation-d", "e"]


def test_a_json_file_gets_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "made.json"
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}
    with pytest.raises(ValueError):
        write_json(tmp_path / "none" / "made.json", {"a": float("nan")})
    assert not (tmp_path / "none").exists()
