"""What the report reads is what runs hold: no row is lost, and shapes find their rows."""

from __future__ import annotations

from pathlib import Path

from report_runs import DECODE, SHAPE

from harness.report.data import Data
from harness.results import load


def test_report_of_a_run_reads_as_load_does(tiny: Path) -> None:
    """The frames that the sections get are whole: no row is lost between shapes."""
    data = Data.read(tiny)
    entry = data.settings[0].entries[0]
    rows = sum(len(data.rows("layers", entry, shape)) for shape in data.settings[0].shapes)
    assert rows == len(load(tiny).layers) > 0


def test_decode_shape_key_matches_rows() -> None:
    from harness.report.data import KEYS, Shape

    assert dict(zip(KEYS, Shape.of(SHAPE).key, strict=True)) == DECODE
