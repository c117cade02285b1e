"""rms_norm_linear and rms_norm_gate_up_silu against float64, over odd shapes and every path."""

import pytest
import torch
from torch import Tensor

from kernels import FUSIONS, rms_norm_gate_up_silu, rms_norm_linear

EPS = 1e-6
# (rows, hidden, out): one row, both sides of every change of path, and sizes that no block divides
SHAPES = [
    (1, 64, 48), (1, 1000, 5), (2, 33, 7), (3, 96, 1), (4, 20, 130),
    (5, 64, 32), (16, 300, 17), (17, 33, 50), (33, 130, 70), (65, 40, 129), (131, 72, 131),
]  # fmt: skip


def normalised(x: Tensor, gamma: Tensor) -> Tensor:
    x = x.double()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * gamma.double()


def silu_product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[:, : gate_up.shape[1] // 2], gate_up[:, gate_up.shape[1] // 2 :]
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape, dtype, randn, assert_close):
    rows, hidden, out = shape
    x, gamma = randn(rows, hidden, dtype=dtype, scale=3), randn(hidden, dtype=dtype)
    weight = randn(out, hidden, dtype=dtype, scale=hidden**-0.5)
    kept = [tensor.clone() for tensor in (x, gamma, weight)]
    y = rms_norm_linear(x, gamma, weight, EPS)
    assert y.dtype == dtype
    assert_close(y, normalised(x, gamma) @ weight.double().T)
    assert_close(y, FUSIONS["rms_norm_linear"].reference(x, gamma, weight, EPS))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, gamma, weight), kept, strict=True))


@pytest.mark.parametrize("shape", [(1, 100, 40), (3, 17, 33), (9, 70, 37), (150, 72, 40)], ids=str)
def test_linear_with_bias_and_residual(shape, dtype, randn, assert_close):
    rows, hidden, out = shape
    x, residual = randn(rows, hidden, dtype=dtype), randn(rows, hidden, dtype=dtype, scale=4)
    gamma, weight = randn(hidden, dtype=dtype), randn(out, hidden, dtype=dtype, scale=hidden**-0.5)
    bias = randn(out, dtype=dtype)
    kept = x.clone(), residual.clone()
    y, stream = rms_norm_linear(x, gamma, weight, EPS, bias=bias, residual=residual)
    assert torch.equal(stream, x + residual), "the new residual is not rounded once"
    assert_close(y, normalised(x + residual, gamma) @ weight.double().T + bias.double())
    for ours, theirs in zip(
        (y, stream), FUSIONS["rms_norm_linear"].reference(x, gamma, weight, EPS, bias, residual), strict=True
    ):
        assert_close(ours, theirs)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("shape", [(1, 64, 24), (2, 1000, 3), (4, 33, 65), (7, 48, 33), (40, 80, 30), (140, 72, 70)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gate_up(shape, with_residual, dtype, randn, assert_close):
    rows, hidden, inter = shape
    x, gamma = randn(rows, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    weight = randn(2 * inter, hidden, dtype=dtype, scale=hidden**-0.5)
    residual = randn(rows, hidden, dtype=dtype) if with_residual else None
    result = rms_norm_gate_up_silu(x, gamma, weight, EPS, residual=residual)
    theirs = FUSIONS["rms_norm_gate_up_silu"].reference(x, gamma, weight, EPS, residual)
    stream = x
    if residual is not None:
        stream = x + residual
        assert torch.equal(result[1], stream), "the new residual is not rounded once"
        result, theirs = result[0], theirs[0]
    assert_close(result, silu_product(normalised(stream, gamma) @ weight.double().T))
    assert_close(result, theirs)


@pytest.mark.parametrize("rows", [2, 20])
def test_a_row_too_long_for_one_program(rows, randn, assert_close):
    x, gamma, weight = randn(rows, 8300), randn(8300), randn(5, 8300, scale=8300**-0.5)
    assert_close(rms_norm_linear(x, gamma, weight, EPS), normalised(x, gamma) @ weight.double().T)


@pytest.mark.parametrize("rows", [1, 20])
def test_float16_does_not_overflow(rows, randn, assert_close):
    """gamma * s lies far beyond float16, the result does not."""
    x, gamma = randn(rows, 64, dtype=torch.float16, scale=8000), randn(64, dtype=torch.float16, scale=30)
    weight = randn(24, 64, dtype=torch.float16, scale=0.1)
    assert_close(rms_norm_linear(x, gamma, weight, EPS), normalised(x, gamma) @ weight.double().T)


def test_large_eps_counts(randn, assert_close):
    x, gamma, weight = randn(6, 40, scale=0.01), randn(40), randn(24, 40)
    x64 = x.double()
    expected = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 0.5) * gamma.double() @ weight.double().T
    assert_close(rms_norm_linear(x, gamma, weight, 0.5), expected)
    assert_close(rms_norm_linear(x[:1], gamma, weight, 0.5), expected[:1])


def test_no_rows(randn):
    assert rms_norm_linear(randn(0, 32), randn(32), randn(8, 32), EPS).shape == (0, 8)


def test_wrong_arguments(randn):
    x, gamma, weight = randn(4, 32), randn(32), randn(8, 32)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(32,\), not \(31,\)"):
        rms_norm_linear(x, gamma[:31], weight, EPS)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm_linear(x, gamma, randn(8, 31), EPS)
    with pytest.raises(ValueError, match="x must be contiguous"):
        rms_norm_linear(randn(32, 4).T, gamma, weight, EPS)
    with pytest.raises(ValueError, match=r"weight must be torch.float32, not torch.bfloat16"):
        rms_norm_linear(x, gamma, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16"):
        rms_norm_linear(x.double(), gamma, weight, EPS)
    with pytest.raises(ValueError, match="norm_weight is on meta, the other arguments are on"):
        rms_norm_linear(x, gamma.to("meta"), weight, EPS)
    with pytest.raises(ValueError, match="residual must have shape"):
        rms_norm_linear(x, gamma, weight, EPS, residual=randn(3, 32))
    with pytest.raises(ValueError, match="as many gate rows as up rows"):
        rms_norm_gate_up_silu(x, gamma, randn(7, 32), EPS)
