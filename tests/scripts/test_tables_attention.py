"""Tables of attention's bytes and operations, against its tensors and a count of every score."""

import torch

from scripts.tables import attention
from tests.scripts.table_runs import SMALL, cells


def test_attention_counts_each_score_once() -> None:
    tokens, flop = 7, 0
    for _head in range(SMALL.num_heads):
        for query in range(tokens):
            for _key in range(query + 1):
                flop += 2 * SMALL.head_dim  # score
                flop += 2 * SMALL.head_dim  # weighted sum
    assert attention.prefill(SMALL, tokens).flop == flop
    assert attention.decode(SMALL, tokens).flop == 2 * 2 * 4 * 3 * 7


def test_attention_bytes_are_its_tensors() -> None:
    def size(*shape: int) -> int:
        return torch.empty(*shape, dtype=torch.bfloat16).nbytes

    assert attention.decode(SMALL, 7).bytes == 2 * size(3, 4) + 2 * size(7, 1, 4)
    assert attention.prefill(SMALL, 7).bytes == 2 * size(7, 3, 4) + 2 * size(7, 1, 4)


def test_attention_table_counts_all_layers() -> None:
    row = next(r for r in cells(attention.attention()) if r[0] == "qwen3-0.6b, qwen3-1.7b" and r[2] == "1,024")
    # decode: 28 × (2 × 4096 + 1024 × 4096) B = 117.7 MB; 28 × 4 × 16 × 128 × 1024 = 234.9 MFLOP; 24.5 µs at 4.8 TB/s
    assert row[1:7] == ["16 : 8", "1,024", "117.7", "234.9", "2.00", "24.5"]


def test_break_even() -> None:
    row = cells(attention.break_even())[0]
    assert row == ["qwen3-0.6b", "881", "114,688", "7,680"]  # 28 × 31,457,280 B over 28 × 4,096 B
