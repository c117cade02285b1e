"""embed_rows: each row is the table's, bit for bit."""

import pytest
import torch

from kernels import embed_rows


@pytest.mark.parametrize("hidden", [1, 24, 1030], ids=str)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_rows_of_the_table(hidden, integers, dtype, device, randn):
    table = randn(9, hidden, dtype=dtype)
    tokens = [8, 0, 3, 3, 0]
    y = embed_rows(torch.tensor(tokens, dtype=integers, device=device), table)
    assert y.dtype == dtype
    assert torch.equal(y, torch.stack([table[token] for token in tokens]))
    out = torch.full_like(y, torch.nan)
    assert embed_rows(torch.tensor(tokens, dtype=integers, device=device), table, out=out) is out
    assert torch.equal(out, y)


def test_wrong_arguments(device, randn):
    table = randn(4, 8)
    assert embed_rows(torch.zeros(0, dtype=torch.int32, device=device), table).shape == (0, 8)
    with pytest.raises(ValueError, match="table must have 2 dimensions"):
        embed_rows(torch.zeros(1, dtype=torch.int32, device=device), table[0])
    with pytest.raises(ValueError, match="tokens must be int32 or int64"):
        embed_rows(torch.zeros(1, device=device), table)
    with pytest.raises(ValueError, match=r"out must have shape \(1, 8\)"):
        embed_rows(torch.zeros(1, dtype=torch.int32, device=device), table, out=table)
