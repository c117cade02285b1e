"""scripts/paces.py: what is measured in which state, and the table of it."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.rounds import Blocks
from scripts import paces
from scripts.tables import paces as tables

TINY = ["--", "model=tiny", "limits.kv_cache_tokens=null", "workload.cpu_decode=[[1,16],[2,16]]"]


def test_every_batch_size_is_measured_alone_beside_another_process_and_after_it(monkeypatch, tmp_path, capsys):
    """On an engine that works; what a block takes is made up, by who else is there and how often that was asked."""
    there, times = [False], iter(range(1, 100))

    @contextmanager
    def another(device):
        there[0] = True
        yield
        there[0] = False

    def measure(self, item):
        return [next(times) + (1000.0 if there[0] else 0.0)]

    monkeypatch.setattr(paces, "beside_another", another)
    monkeypatch.setattr(Blocks, "measure", measure)
    file = tmp_path / "paces.json"
    monkeypatch.setattr(sys, "argv", ["paces", "--engine", "nano", "--blocks", "2", "--json", str(file), *TINY])
    assert paces.main() == 0
    made = json.loads(file.read_text())
    assert made["engine"] == "nano" and made["model"] == "tiny"
    assert made["tpot_ms"] == [
        {"batch_size": 1, "alone": [1.0, 2.0], "beside": [1005.0, 1006.0], "after": [9.0, 10.0]},
        {"batch_size": 2, "alone": [3.0, 4.0], "beside": [1007.0, 1008.0], "after": [11.0, 12.0]},
    ]
    assert "nano, batch 2, TPOT ms: alone 3.500, beside 1007.500, after 11.500" in capsys.readouterr().out


def test_what_cannot_be_done_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paces", "--engine", "nobody", *TINY])
    assert paces.main() == 2
    assert "nobody" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_engine_and_batch_size(monkeypatch, tmp_path: Path):
    record = {"model": "qwen3-0.6b", "provenance": {"gpu": {"name": "NVIDIA H200"}}}
    row = {"batch_size": 32, "alone": [0.8, 0.9, 1.0], "beside": [1.0, 1.08, 1.1], "after": [0.9, 1.0, 1.1]}
    (tmp_path / "paces-fused.json").write_text(json.dumps({**record, "tpot_ms": [row]}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    shown = tables.paces(folder=".")
    cells = "| fused | 32 | 0.900 (0.800 to 1.000) | 1.080 (1.000 to 1.100) | 1.000 (0.900 to 1.100) | 1.20× |"
    assert cells in shown and "medians of 3 blocks" in shown and "`./paces-fused.json`." in shown


@pytest.mark.parametrize("engines", ["nano", "fused,nano"])
def test_what_nobody_has_measured_is_said(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.paces(engines, folder=".").startswith("Not measured yet")
