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
            if (number := next(times)) == at:
                raise ends_with
            return [number + (1000.0 if there[0] else 0.0)]

        monkeypatch.setattr(Blocks, "measure", measure)
        file = tmp_path / "paces.json"
        monkeypatch.setattr(sys, "argv", ["paces", "--engine", "nano", "--blocks", "2", "--json", str(file), *TINY])
        return paces.main(), json.loads(file.read_text())

    monkeypatch.setattr(paces, "beside_another", another)
    return measured


def of(made, state):
    return {(call["metric"], call["batch_size"]): call[state] for call in made["calls"]}


PROMPT, ONE, TWO = ("generate_ms", 1), ("tpot_ms", 1), ("tpot_ms", 2)


def test_every_call_is_measured_alone_beside_another_process_and_after_it(run, capsys):
    code, made = run()
    assert code == 0 and (made["engine"], made["model"], made["status"]) == ("nano", "tiny", "ok")
    assert of(made, "alone") == {PROMPT: [1.0, 2.0], ONE: [3.0, 4.0], TWO: [5.0, 6.0]}
    assert of(made, "beside") == {PROMPT: [1007.0, 1008.0], ONE: [1009.0, 1010.0], TWO: [1011.0, 1012.0]}
    assert of(made, "after") == {PROMPT: [13.0, 14.0], ONE: [15.0, 16.0], TWO: [17.0, 18.0]}
    shown = capsys.readouterr().out
    assert "nano, decode, batch 2, prompt 16, TPOT ms: alone 5.500, beside 1011.500, after 17.500" in shown
    assert "nano, prefill, 1 × 16 tokens, ms: alone 1.500, beside 1007.500, after 13.500" in shown


def test_an_interrupt_keeps_what_was_measured(run):
    code, made = run(KeyboardInterrupt(), at=8)
    assert code == 130 and made["status"] == "interrupted"
    assert of(made, "alone") == {PROMPT: [1.0, 2.0], ONE: [3.0, 4.0], TWO: [5.0, 6.0]}
    assert of(made, "beside") == {PROMPT: [1007.0], ONE: [], TWO: []}


def test_a_block_that_fails_stops_no_other(run, capsys):
    code, made = run(BlockFailed("2 tokens too few came back."), at=9)
    assert code == 1 and made["status"] == "ok"
    assert made["failures"] == ["decode, batch 1, prompt 16, TPOT ms, beside: 2 tokens too few came back."]
    assert of(made, "beside") == {PROMPT: [1007.0, 1008.0], ONE: [1010.0], TWO: [1011.0, 1012.0]}
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
    key = {"metric": "tpot_ms", "phase": "decode", "batch_size": 32, "tokens": 128, "output_len": 129}
    call = key | {"alone": [0.8, 0.9, 1.0], "beside": [1.0, 1.08, 1.1], "after": []}
    made = {"model": "tiny", "device": device, "provenance": seen, "status": "ok", "failures": [], "calls": [call]}
    return json.dumps(made | fields)


def test_the_table_has_a_row_for_each_engine_and_call(monkeypatch, tmp_path: Path):
    (tmp_path / "paces-fused.json").write_text(record("cuda"))
    (tmp_path / "paces-nano.json").write_text(record("cpu", status="interrupted", failures=["batch 1: no"]))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    shown = tables.paces(folder=".")
    for engine in ("fused", "nano"):
        line = f"| {engine} | decode, batch 32, prompt 128, TPOT ms | 0.900 (0.800 to 1.000) | 1.080 (1.000 to 1.100) |"
        assert f"{line} – | 1.20× |" in shown
    assert "a CPU, tiny; NVIDIA H200, tiny" in shown and "up to 3 values of TPOT with" in shown
    assert "nano's run was interrupted. nano: batch 1: no. Files" in shown and "`./paces-fused.json`." in shown


@pytest.mark.parametrize("engines", ["nano", "fused,nano"])
def test_what_nobody_has_measured_is_said(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.paces(engines, folder=".").startswith("Not measured yet")
