"""Names of runs that stand beside each other in the report, and of sets of features."""

from __future__ import annotations

from pathlib import Path

from report_pages import shown
from report_runs import SHAPE, record, timed, write

from harness.report.labels import feature_set


def test_runs_of_a_sweep_are_told_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        config = {**record()["config"], "seed": seed}
        write(tmp_path / "runs" / str(seed), record(config=config, shapes=[{**SHAPE, "timed": timed(seed * 1e3)}]))
    write(tmp_path / "runs" / "other", record(model="large", shapes=[{**SHAPE, "timed": timed(7e3)}]))
    found = shown(tmp_path / "runs", tmp_path, ("headline",))
    toy, large = found.table("Headline", "toy"), found.table("Headline", "large")
    assert toy.header == ["", "nano seed=1", "nano seed=2"] and large.header == ["", "nano"]
    assert "7.000" in large.rows[0][1]


def test_feature_sets_in_words() -> None:
    every = [("a", "b", "c", "d"), ("a",), (), ("a", "b", "c")]
    assert [feature_set(f, every) for f in every] == ["all features", "only a", "no features", "without d"]
