"""The report's roofline: shares of the floor by hand, and ceilings that nobody measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_pages import ROOT, close
from report_runs import SHAPE, Page, kernel_trace, record, timed, write

from harness.report.report import Report


def first_number(cell: str) -> float:
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))  # type: ignore[index]


def test_roofline_shares_are_floor_over_time(h200_page: Page) -> None:
    """One op by hand: nano's lm_head at batch 1 reads 151,936 × 1024 bfloat16 weights."""
    heading = "latency: decode, batch 1, context 128"
    table = next(t for t in h200_page.tables if t.section == "Roofline" and heading in t.heading)
    row = dict(zip(table.header, next(r for r in table.rows if r[:2] == ["nano", "lm_head"]), strict=True))
    moved = 151936 * 1024 * 2 + 1024 * 2 + 151936 * 2
    assert close(row["MB"], moved / 1e6) and row["bound by"] == "bytes"
    assert close(row["floor, µs"], moved / 4.34e12 * 1e6)
    assert first_number(row["achieved"]) == pytest.approx(100 * moved / 4.34e6 / first_number(row["µs"]), abs=0.1)


def test_ceilings_of_a_datasheet_stand_in_for_those_that_nobody_measured(tmp_path: Path) -> None:
    """They are said to be that, and are not taken of a GPU without a datasheet here, nor for float32."""
    layers, steps = kernel_trace()
    config = {**record()["config"], "model": yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text())}
    shapes = [{**SHAPE, "timed": timed(140.0), "kernels": {"mode": "graph"}}]

    def roofline(name: str, **changed: Any) -> str:
        write(tmp_path / name, record(shapes=shapes, config=config, **changed), layers, steps)
        section = Report([tmp_path / name], tmp_path / "plots").roofline()
        return section._repr_html_() if section else ""

    text = roofline("h200")
    assert "NVIDIA H200 by its datasheet: nobody measured" in text and "read 4.8 TB/s" in text and "<svg" in text
    for name, changed in (("half", {"dtype": "float32"}), ("other", {"provenance": gpu_of("NVIDIA L4")})):
        text = roofline(name, **changed)
        assert "No ceilings are kept" in text and "<svg" not in text


def gpu_of(name: str) -> dict[str, Any]:
    return {**record()["provenance"], "gpu": {**record()["provenance"]["gpu"], "name": name}}
