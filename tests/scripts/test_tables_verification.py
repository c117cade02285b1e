"""The table of how close engines came to the reference, from runs with chosen numbers."""

from pathlib import Path

from scripts.tables import verification
from tests.scripts.table_runs import cells, made_up_run, write


def test_verification_by_hand(tmp_path: Path) -> None:
    told = {
        "status": "passed", "positions": 64, "kl_ratio": {"value": 0.5}, "nll_delta_ratio": {"value": 1.25},
        "engine": {"kl": 1e-5, "nll_delta": 0.005, "greedy_agreement": 0.984},
        "noise": {"kl": 2e-5, "nll_delta": 0.004, "greedy_agreement": 1.0},
    }  # fmt: skip
    write(tmp_path / "fused", made_up_run(engine="fused", verification=told))
    write(tmp_path / "other", made_up_run(engine="hf", verification=told))
    assert cells(verification.verification(str(tmp_path))) == [
        ["fused", "passed", "64", "1.00e-05", "2.00e-05", "0.50", "5.00e-03", "4.00e-03", "1.25", "98.4%"]
    ]
