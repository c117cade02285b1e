"""silu_mul against float64."""

import pytest
import torch

from kernels import FUSIONS, silu_mul


@pytest.mark.parametrize("shape", [(1, 1), (1, 1025), (3, 40), (7, 33)], ids=str)
def test_values(shape, dtype, randn, assert_close):
    rows, inter = shape
    gate_up = randn(rows, 2 * inter, dtype=dtype, scale=3)
    y = silu_mul(gate_up)
    gate, up = gate_up.double()[:, :inter], gate_up.double()[:, inter:]
    assert_close(y, gate / (1 + torch.exp(-gate)) * up)
    assert_close(y, FUSIONS["silu_mul"].reference(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extremes_stay_finite(device):
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device)
    assert torch.equal(silu_mul(gate_up), torch.tensor([[0.0, 3e4]], device=device))


def test_wrong_arguments(randn):
    with pytest.raises(ValueError, match="3 columns"):
        silu_mul(randn(2, 3))
    with pytest.raises(ValueError, match="contiguous"):
        silu_mul(randn(4, 4).T)
    assert silu_mul(randn(0, 6)).shape == (0, 3)
