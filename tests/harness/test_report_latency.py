"""The report's curves of latency: what is drawn over what."""

from __future__ import annotations

from pathlib import Path

from report_runs import record, timed, write

from harness.report import latency
from harness.report.data import Data


def test_prefill_is_drawn_over_the_length_of_prompts(tmp_path: Path) -> None:
    """One prompt of 4,096 tokens and four of 1,024 are different work, and stand in different panels."""
    sizes = ((1, 1024, 1.0), (1, 4096, 3.0), (4, 1024, 5.0))
    shapes = [{"phase": "prefill", "batch_size": b, "tokens": t, "timed": timed(us)} for b, t, us in sizes]
    write(tmp_path / "run", record(shapes=shapes))
    [setting] = Data.read(tmp_path / "run").settings
    found = {panel.title: {x: v.median for x, v in panel.curves[0].points.items()} for panel in latency.panels(setting)}
    assert found == {
        "prefill, 1 prompt": {1024: 0.001, 4096: 0.003}, "prefill, prompts of 1024 tokens": {1: 0.001, 4: 0.005},
    }  # fmt: skip
