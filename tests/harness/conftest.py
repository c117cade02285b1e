"""Runs and pages that tests of several parts of the report read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import Page

# Fixtures import what they need themselves: other tests of this folder start without the report.


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on this machine's processor."""
    from scripted_runs import TINY, silent

    from harness.config import compose
    from harness.runner import run

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    quick = ("instrument.max_iterations=10", "instrument.traced_iterations=3", "instrument.max_seconds_per_shape=2")
    wanted = ["engine=nano", "model=tiny", f"weights={TINY}", "workload=smoke", "device=cpu", *quick]
    run(compose(wanted), folder, silent())
    return folder


@pytest.fixture(scope="session")
def tiny_page(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    from report_pages import shown

    return shown(tiny, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def h200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed runs, made by the command."""
    from report_pages import REFERENCE

    from harness.report.__main__ import OK, main

    pytest.importorskip("papermill", reason="the extra `report` is not installed")
    target = tmp_path_factory.mktemp("h200") / "report.html"
    assert main([str(REFERENCE), "-o", str(target), "--read", "4.34", "--matrix", "815"]) == OK
    return target


@pytest.fixture(scope="session")
def h200_page(h200: Path) -> Page:
    return Page(h200.read_text())
