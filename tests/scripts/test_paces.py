"""scripts/paces.py: what is measured in which state, what is kept when it does not end well, and the table of it."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.rounds import BlockFailed, Blocks
from scripts import paces
from scripts.tables import paces as tables

TINY = ["--", "model=tiny", "workload.cpu_decode=[[1,16],[2,16]]"]
TINY += ["limits.max_model_len=256", "workload.cpu_prefill=[[1,16]]"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script on an engine that works; what a block takes is made up: the number of the block, and 1000 more
    beside another process. Returns its exit code and what it has written."""
    there = [False]

    @contextmanager
    def another(device):
        there[0] = True
        yield
        there[0] = False

    def measured(ends_with=None, at=0):
        times = iter(range(1, 100))

        def measure(self, item):
            assert item.metric == "tpot_ms"
            if (number := next(times)) == at:
                raise ends_with
            return [number + (1000.0 if there[0] else 0.0)]

        monkeypatch.setattr(Blocks, "measure", measure)
        file = tmp_path / "paces.json"
        monkeypatch.setattr(sys, "argv", ["paces", "--engine", "nano", "--blocks", "2", "--json", str(file), *TINY])
        return paces.main(), json.loads(file.read_text())

    monkeypatch.setattr(paces, "beside_another", another)
    return measured


def test_every_batch_size_is_measured_alone_beside_another_process_and_after_it(run, capsys):
    code, made = run()
    assert code == 0 and (made["engine"], made["model"], made["status"]) == ("nano", "tiny", "ok")
    assert made["tpot_ms"] == [
        {"batch_size": 1, "alone": [1.0, 2.0], "beside": [1005.0, 1006.0], "after": [9.0, 10.0]},
        {"batch_size": 2, "alone": [3.0, 4.0], "beside": [1007.0, 1008.0], "after": [11.0, 12.0]},
    ]
    assert "nano, batch 2, TPOT ms: alone 3.500, beside 1007.500, after 11.500" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(run):
    code, made = run(KeyboardInterrupt(), at=6)
    assert code == 130 and made["status"] == "interrupted"
    assert [row["alone"] for row in made["tpot_ms"]] == [[1.0, 2.0], [3.0, 4.0]]


def test_a_block_that_fails_stops_no_other(run, capsys):
    code, made = run(BlockFailed("2 tokens too few came back."), at=6)
    assert code == 1 and made["status"] == "ok"
    assert made["failures"] == ["batch 1, beside: 2 tokens too few came back."]
    assert [row["beside"] for row in made["tpot_ms"]] == [[1005.0], [1007.0, 1008.0]]
    assert made["failures"][0] in capsys.readouterr().out


@pytest.mark.parametrize("who", ["engine", "GPU"])
def test_what_cannot_be_done_is_said(who, monkeypatch, capsys):
    if who == "GPU":
        monkeypatch.setattr("harness.machine.gpu_state", lambda: {"other_processes": [{"pid": 1}]})
    monkeypatch.setattr(sys, "argv", ["paces", "--engine", "nobody" if who == "engine" else "nano", *TINY])
    assert paces.main() == 2
    assert ("nobody" if who == "engine" else "1 other processes are on it") in capsys.readouterr().err


def record(device: str, **fields: object) -> str:
    seen = {"gpu": {"name": "NVIDIA H200"} if device == "cuda" else None, "cpu": {"model": "a CPU"}}
    row = {"batch_size": 32, "alone": [0.8, 0.9, 1.0], "beside": [1.0, 1.08, 1.1], "after": []}
    made = {"model": "tiny", "device": device, "provenance": seen, "status": "ok", "failures": [], "tpot_ms": [row]}
    return json.dumps(made | fields)


def test_the_table_has_a_row_for_each_engine_and_batch_size(monkeypatch, tmp_path: Path):
    (tmp_path / "paces-fused.json").write_text(record("cuda"))
    (tmp_path / "paces-nano.json").write_text(record("cpu", status="interrupted", failures=["batch 1: no"]))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    shown = tables.paces(folder=".")
    for engine in ("fused", "nano"):
        assert f"| {engine} | 32 | 0.900 (0.800 to 1.000) | 1.080 (1.000 to 1.100) | – | 1.20× |" in shown
    assert "a CPU, tiny; NVIDIA H200, tiny" in shown and "up to 3 blocks" in shown
    assert "nano's run was interrupted. nano: batch 1: no. Files" in shown and "`./paces-fused.json`." in shown


@pytest.mark.parametrize("engines", ["nano", "fused,nano"])
def test_what_nobody_has_measured_is_said(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.paces(engines, folder=".").startswith("Not measured yet")
