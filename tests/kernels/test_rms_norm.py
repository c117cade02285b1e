"""rms_norm against float64."""

import sys

import pytest
import torch

from kernels import rms_norm

EPS = 1e-6
MODULE = sys.modules["kernels.rms_norm"]


def norm(x, gamma):
    x = x.double()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * gamma.double()


@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 1024)], ids=str)
@pytest.mark.parametrize("few_rows", [0, 16])
def test_values(shape, few_rows, dtype, randn, assert_close, monkeypatch):
    monkeypatch.setattr(MODULE, "FEW_ROWS", few_rows)
    x, gamma = randn(*shape, dtype=dtype, scale=3), randn(shape[1], dtype=dtype)
    y = rms_norm(x, gamma, EPS)
    assert_close(y, norm(x, gamma))
    assert_close(MODULE.reference(x, gamma, EPS), norm(x, gamma))


def test_eps_bounds_rows_of_zeros(randn):
    assert not rms_norm(torch.zeros_like(randn(2, 8)), randn(8), EPS).any()


def test_wrong_arguments(randn):
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(8,\)"):
        rms_norm(randn(2, 8), randn(7), EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(randn(8, 2).T, randn(8), EPS)
    assert rms_norm(randn(0, 6), randn(6), EPS).shape == (0, 6)
