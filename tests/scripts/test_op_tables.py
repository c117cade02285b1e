"""Tables and pictures of the study of one op, from runs with chosen numbers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from harness.report import ops
from harness.results import RunWriter
from scripts.tables import ops as tables
from tests.harness.report_runs import record, write

STUDY: dict[str, Any] = {
    "variants": {"torch": {"status": "ok"}, "mine": {"status": "ok"}, "away": {"status": "away is not installed."}},
    "study": [{"op": "norm+product", "weight_rows": 8, "k": 4, "bias": False, "models": ["toy"], "rows": [
        {"rows": 1, "variants": {"torch": {"status": "ok", "median_us": 10.0},
                                 "mine": {"status": "ok", "median_us": 5.0}},
         "fused_over_unfused": {"fused": "mine", "unfused": "torch", "ratio": 0.5, "low": 0.49, "high": 0.51,
                                "pairs": 9, "verdict": "faster"}},
        {"rows": 4096, "variants": {"torch": {"status": "ok", "median_us": 1234.5},
                                    "mine": {"status": "OutOfResources: shared memory"}}},
    ]}],
}  # fmt: skip


def test_a_study_shows_each_variant_and_what_came_of_it(tmp_path: Path) -> None:
    write(tmp_path / "study", record("ops", **STUDY, failures=["one"]))
    table = tables.op_study(str(tmp_path))
    assert "| `norm+product`, W 8 × 4: rows | torch | mine | best fused / best unfused |" in table
    assert "| 1 | 10.00 | 5.00 | mine / torch 0.50× (0.49 to 0.51), wins |" in table
    assert "| 4,096 | 1,234.50 | OutOfResources: shared memory | – |" in table
    assert "Fusing wins at 1 row (0.50×)." in table
    assert "Left out: away (away is not installed). Failed: 1. " in table


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A study of one model's shapes, and one of two models': a product of both, and one with a bias of the second."""
    study = deepcopy(STUDY)
    study["variants"]["torch"]["version"] = "2.0"
    [product] = study["study"]
    product["models"] = ["toy", "other"]
    more = deepcopy(product) | {"weight_rows": 16, "bias": True, "models": ["other"], "rows": product["rows"][:1]}
    study["study"].append(more)
    write(tmp_path / "one", record("ops", **STUDY, failures=[]))
    write(tmp_path / "several", record("ops", **study, failures=[]))
    return tmp_path


def test_a_study_of_several_models_is_a_line_for_each_product(several: Path) -> None:
    table = tables.op_shapes(str(several))
    assert table.splitlines()[0] == "| product | W | models | 1 row | 4,096 rows |"
    assert table.splitlines()[2:4] == [
        "| `norm+product` | 8 × 4 | toy, other | 0.50× (0.49 to 0.51): 5.0 / 10.0 | – |",
        "| `norm+product` with bias | 16 × 4 | other | 0.50× (0.49 to 0.51): 5.0 / 10.0 | – |",
    ]
    assert "Packages: torch 2.0. Left out: away (away is not installed). Failed: 0. " in table
    assert "several`" in table and "one`" not in table


def test_a_study_of_several_models_is_in_no_other_table(several: Path) -> None:
    table = tables.op_study(str(several))
    assert table.count("| `norm+product`") == 1 and "one`" in table and "several`" not in table


def test_what_is_not_measured_says_how_to(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", "run").write_run(record())
    assert tables.op_study(str(tmp_path)) == "Not measured yet (`scripts/reference_checks.sh ops`)."
    assert tables.op_shapes(str(tmp_path)) == "Not measured yet (`scripts/reference_checks.sh shapes`)."


def test_the_right_panel_divides_by_the_fastest_unfused_variant() -> None:
    at = pd.DataFrame({"a": [10.0, 8.0], "b": [20.0, 4.0], "mine": [5.0, 6.0]}, index=[1, 2])
    figure = ops.drawn([("", at, ["a", "b"])])
    try:
        _, right = figure.axes
        lines = {tuple(line.get_ydata()) for line in right.lines}  # type: ignore[arg-type]
        assert {(1.0, 2.0), (2.0, 1.0), (0.5, 1.5)} <= lines
    finally:
        plt.close(figure)
