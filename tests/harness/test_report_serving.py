"""Serving in the report: goodput, its objectives, and rates at which the queue still grew."""

from __future__ import annotations

from pathlib import Path

from report_pages import shown
from report_runs import record, write

from harness.report import serving, style
from harness.report.data import Data
from harness.report.report import Report


def test_goodput_tells_its_objectives_and_the_share_that_kept_them(tmp_path: Path) -> None:
    served = [
        {"rate": rate, "achieved_rate": 3.0, "output_tok_s": 99.0, "goodput_share": share, "goodput_rate": 3.0 * share,
         "still_growing": growing, **{f"{name}_p50": 5.0 for name in serving.LATENCIES}}
        for rate, share, growing in ((4.0, 1.0, False), (8.0, 0.5, True))
    ]  # fmt: skip
    config = {**record()["config"], "workload": {"slo": {"ttft_ms": 200.0, "tpot_ms": None}}}
    write(tmp_path / "run", record(config=config, serving=served))
    found = Report([tmp_path / "run"], tmp_path / "plots").serving()
    text = found._repr_html_()  # type: ignore[union-attr]
    assert "kept the objectives (TTFT ≤ 200 ms)" in text
    [table] = shown(tmp_path / "run", tmp_path, ("serving",)).tables
    shares = [row[table.header.index("goodput /s")] + ", " + row[table.header.index("kept objectives")]
              for row in table.rows if row[table.header.index("rate /s")]]  # fmt: skip
    assert shares == ["3.000, 100.0%", "1.500, 50.0%"]
    entry = next(Data.read(tmp_path / "run").entries)
    goodput = serving.curves([(entry, served)]).axes[-1]
    filled = [line.get_markerfacecolor() for line in goodput.lines if line.get_marker() not in ("", "None")]
    assert filled == [style.color("nano"), style.PAGE]
