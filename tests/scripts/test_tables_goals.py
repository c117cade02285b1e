"""The table of goals: which are met, missed and open in a comparison whose rounds have chosen values."""

from pathlib import Path

import pytest

from engines.base import InputError
from scripts.tables import goals
from tests.scripts.table_runs import block, cells, compared


def test_goals_by_hand(tmp_path: Path) -> None:
    serve = {"metric": "output_tok_s", "phase": "serve", "batch_size": 256, "tokens": 0, "output_len": 0}
    decode = {  # TPOT in ms of two rounds: fused is 4 and 4, then 2 and 4 times as fast as its faster rival
        "nano": [(2.2, 2.2), (2.4, 4.8)], "vllm:serve_arm=inproc": [(1.6, 2.4), (9.0, 9.0)],
        "vllm": [(9.0, 9.0), (9.0, 9.0)], "fused": [(0.4, 0.6), (1.2, 1.2)],
    }  # fmt: skip
    rates = {"nano": 20_000, "vllm:serve_arm=inproc": 24_000, "vllm": 1, "fused": 30_000}
    blocks_of = {
        label: [block(label, n, first[n]) for n in range(2)]
        + [block(label, n, second[n], batch_size=32, started_s=10.0 + n) for n in range(2)]
        + [block(label, n, 0.1, batch_size=3, started_s=20.0 + n) for n in range(2)]  # nobody set a goal for it
        + [block(label, 0, rates[label], **serve, started_s=30.0)]
        for label, (first, second) in decode.items()
    }
    made = goals.goals(compared(tmp_path / "all", blocks_of))
    assert cells(made) == [
        ["decode, batch 8, prompt 128, TPOT ms", "0.60", "0.50 (-17 %)", "met",
         "3.0", "4.00 (4.00 to 4.00)", "vllm, inproc", "met"],
        # logarithms ln 2 and ln 4: their mean is that of √8, half an interval 12.706 × 0.3466 = ln 81.75
        ["decode, batch 32, prompt 128, TPOT ms", "0.80", "1.20 (+50 %)", "missed",
         "2.8", "2.83 (0.03 to 231.22)", "nano", "open"],
        ["256 requests, output tok/s", "30,000", "30,000 (+0 %)", "met", "1.4", "no interval", "vllm, inproc", "open"],
    ]  # fmt: skip
    assert "interval within these processes;" in made
    slow = {"nano": [block("nano", n, 1.0) for n in range(2)], "fused": [block("fused", n, 0.5) for n in range(2)]}
    assert cells(goals.goals(compared(tmp_path / "slow", slow)))[0][5:] == ["2.00 (2.00 to 2.00)", "nano", "missed"]
    with pytest.raises(InputError, match="no item that a goal"):
        goals.goals(compared(tmp_path / "none", {"nano": slow["nano"]}, engines=["nano", "fused"]))
