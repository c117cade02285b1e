"""Energy in the report: per token, or why it was not measured."""

from __future__ import annotations

from pathlib import Path

from report_pages import shown
from report_runs import SHAPE, record, timed, write


def test_energy_is_told_per_token(tmp_path: Path) -> None:
    spent = {"status": "ok", "j_per_token": 0.0025, "subtracted_share": 0.25}
    failed = {"status": "the counter does not move"}
    shapes = [
        {**SHAPE, "timed": timed(100.0), "energy": spent}, {**SHAPE, "batch_size": 8, "energy": failed},
    ]  # fmt: skip
    write(tmp_path / "runs" / "a", record(shapes=shapes))
    write(tmp_path / "runs" / "b", record("fused", shapes=[SHAPE]))
    table = shown(tmp_path / "runs", tmp_path, ("energy",)).table("Energy", "toy")
    assert table.header == ["", "nano", "fused"]
    assert table.rows == [
        ["decode, batch 1, context 128, mJ per token", "2.500 (25%)", "–"],
        ["decode, batch 8, context 128, mJ per token", "the counter does not move", "–"],
    ]
