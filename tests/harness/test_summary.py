"""The tables that a run prints, and what `python -m harness.summary` says where there is no run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.summary import main, rounds_table, steps_table


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_a_single_sample_has_no_interval() -> None:
    shape = {"phase": "decode", "batch_size": 1, "tokens": 16}
    timed = {"status": "ok", "wall_us": 2000.0, "wall_us_low": 2000.0, "wall_us_high": 2000.0, "mode": "graph"}
    many = {**timed, "wall_us_low": 1990.0, "samples": 30}
    shapes = [{**shape, "timed": {**timed, "samples": 1}}, {**shape, "timed": many}]
    layers = pd.DataFrame(
        columns=["phase", "batch_size", "new_tokens", "context_len", "source", "mode", "op", "layer_index"]
    ).assign(latency_us=0.0)
    once, often = cells(steps_table({"shapes": shapes}, layers, ""))
    assert once[3:5] == ["2.000", "(once)"]
    assert often[3:5] == ["2.000", "1.990 - 2.000"]


def test_a_call_that_failed_stands_in_the_table() -> None:
    call = {"phase": "decode", "batch_size": 1, "tokens": 16, "output_len": 8, "metric": "tpot_ms"}
    value = {"status": "ok", "median": 2.0, "low": 2.0, "high": 2.0, "samples": 1}
    few = "3 tokens too few came back [/tmp/log]."  # what rich would take for the end of a style
    records = [{**call, **value}, {**call, "status": f"{few}\nA trace."}, {**call, **value, "status": few}]
    table = rounds_table(records, "")
    with (console := Console(width=200)).capture() as printed:
        console.print(table)
    assert printed.get().count(few) == 2 and "A trace" not in printed.get()
    once, failed, then = cells(table)
    assert once[5:] == ["2.000", "(once)", "1"]
    assert then[5:] == ["2.000", f"(once), then: {escape(few)}", "1"]
    assert failed[5:] == ["-", escape(few), "0"]


def test_summary_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
