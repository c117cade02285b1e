"""Tables of RMSNorms and the linear layers behind them, on cases small enough to do by hand."""

import pytest
import torch

from scripts.tables import pairs
from tests.scripts.table_runs import SMALL, cells


def test_a_pair_by_hand() -> None:
    pair = pairs.Pair(SMALL, "input_norm", "qkv_proj", rows=2)
    x = residual = total = normalised = torch.empty(2, 8, dtype=torch.bfloat16).nbytes  # 32 bytes
    y = torch.empty(2, 20, dtype=torch.bfloat16).nbytes  # 80
    assert pair.weight_shape == (20, 8) and pair.one.weight_bytes == 320
    assert pair.two.activation_bytes == (x + residual + total + normalised) + (normalised + y) == 240
    assert pair.one.activation_bytes == x + residual + total + y == 176
    assert pair.saved_bytes == 64
    assert pair.saved_share == pytest.approx(64 / 560)
    assert pair.one.flop == 640  # 2 × 20 outputs of 8 multiplications and 8 additions
    assert pair.one.bytes == 496


def test_pairs_of_a_model() -> None:
    found = {pair.name: (*pair.weight_shape, pair.rows) for pair in pairs.pairs_of(SMALL, 3)}
    assert found == {
        "input_norm + qkv_proj": (20, 8, 3),
        "post_norm + gate_up_proj": (20, 8, 3),
        "final_norm + lm_head": (50, 8, 3),
    }
    assert [p.name for p in pairs.pairs_of(SMALL, 257)] == ["input_norm + qkv_proj", "post_norm + gate_up_proj"]


def test_pairs_table_of_qwen3() -> None:
    rows = cells(pairs.pairs("qwen3-0.6b"))
    assert len(rows) == 5 + 5 + 3
    # 4096 × 1024 × 2 B = 8.389 MB; 256 rows: (5 × 1024 + 4096) × 256 × 2 B = 4.719 MB, saved 2 × 256 × 1024 × 2 B;
    # 2 × 256 × 4096 × 1024 = 2.147 GFLOP over 8.389 + 3.670 MB; those bytes at 4.8 TB/s take 2.51 µs
    assert rows[2] == [
        "input_norm + qkv_proj", "4096 × 1024", "256", "8.39", "4.719", "3.670", "1.049", "8.0%",
        "2.147", "178.1", "2.5",
    ]  # fmt: skip


def test_pairs_of_the_other_models() -> None:
    rows = cells(pairs.pairs_by_model())
    assert len(rows) == 5 * 3
    assert rows[0][:3] == ["qwen3-1.7b", "input_norm + qkv_proj", "4096 × 2048<br>16.78 MB"]
    # one row: (5 × 2048 + 4096) × 2 B, (3 × 2048 + 4096) × 2 B; 2 × 4096 × 2048 operations; 16.80 MB at 4.8 TB/s
    assert rows[0][3] == "0.029 → 0.020 MB<br>−0.008 MB (0.0%)<br>0.017 GFLOP<br>1.0 FLOP/B<br>3.5 µs"
    assert (rows[2][1], rows[2][6], rows[2][7]) == ("final_norm + lm_head", "", "")
