"""decode_linear against float64: all kernels, odd shapes, everything that is fused, every launch."""

import pytest
import torch
from torch import Tensor

from kernels import FUSIONS, INTERPRETED, decode_linear
from kernels.choices import chosen, none_chosen
from kernels.decode_linear import decode_linear_half_norm, half_norm_reference
from kernels.decode_linear_launch import Launch, best_launch, default_launch, matrix_candidates
from kernels.decode_linear_tiled import HalfNormed

EPS = 1e-6
# (rows, K, out): all kernels' defaults, both sides of their borders, sizes that no block divides. A dozen results at
# least: the norm of fewer may be small by chance, and their error large beside it.
SHAPES = [
    (1, 64, 48), (1, 1000, 37), (2, 33, 7), (3, 96, 19), (12, 96, 1), (4, 520, 14), (5, 64, 32), (13, 72, 19),
    (17, 300, 21), (130, 72, 17),
]  # fmt: skip


def expected(x: Tensor, weight: Tensor, gamma=None, eps=EPS, bias=None, residual=None, gated=False) -> Tensor:
    value = x.double()
    if gamma is not None:
        value = value / torch.sqrt((value**2).mean(-1, keepdim=True) + eps) * gamma.double()
    y = value @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if gated:
        gate, up = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
        y = gate * torch.sigmoid(gate) * up
    return y if residual is None else y + residual.double()


def inputs(randn, rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5), randn(k, dtype=dtype)


@pytest.fixture(autouse=True)
def defaults():
    """What was measured for the GPU that runs the tests must not stand in for the defaults."""
    with none_chosen():
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, dtype, randn, assert_close):
    rows, k, out = shape
    x, weight, gamma = inputs(randn, rows, k, out, dtype)
    kept = [tensor.clone() for tensor in (x, weight, gamma)]
    y = decode_linear(x, weight)
    assert y.dtype == dtype
    assert_close(y, expected(x, weight))
    assert_close(decode_linear(x, weight, norm_weight=gamma, eps=EPS), expected(x, weight, gamma))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, weight, gamma), kept, strict=True))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_all_that_is_fused(shape, dtype, randn, assert_close):
    """Gate, bias and residual at once: no model has it, and each by itself is a part of it."""
    rows, k, out = shape
    x, weight, gamma = inputs(randn, rows, k, 2 * out, dtype)
    if out == 1:  # one gate for all rows: it must not be closed by chance, which would leave little but errors
        x, weight, gamma = x.abs(), weight.abs(), gamma.abs()
    bias, residual = randn(2 * out, dtype=dtype), randn(rows, out, dtype=dtype)
    options = {"norm_weight": gamma, "eps": EPS, "bias": bias, "gated": True}
    y = expected(x, weight, gamma, EPS, bias, None, True)
    assert_close(decode_linear(x, weight, **options), y)
    stream, copy = residual.clone(), residual.clone()
    assert decode_linear(x, weight, residual=stream, **options) is stream
    assert_close(stream, y + residual.double())
    FUSIONS["decode_linear"].reference(x, weight, residual=copy, **options)
    assert_close(stream, copy)


LAUNCHES = [
    Launch("vector", 4, 32, 1), Launch("vector", 3 + 5, 128, 2), Launch("vector", 1, 64, 4),
    Launch("tiled", 16, 32, 4, block_m=16, num_stages=2), Launch("tiled", 64, 16, 2, block_m=32, num_stages=3),
    Launch("tiled", 32, 64, 4, block_m=128, num_stages=2, ahead=False),
    Launch("matrix", 8, 32, 1, block_m=8), Launch("matrix", 16, 64, 2, block_m=8, registers=128),
    Launch("matrix", 32, 256, 2, block_m=16),
]  # fmt: skip


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_launch_computes_the_same(launch, gated, randn, assert_close):
    x, weight, gamma = inputs(randn, 5, 160, 22, torch.float32)
    y = decode_linear(x, weight, norm_weight=gamma, eps=EPS, gated=gated, launch=launch)
    assert_close(y, expected(x, weight, gamma, gated=gated))


MATRIX_LAUNCHES = [
    Launch("matrix", 8, 32, 1, block_m=8), Launch("matrix", 8, 64, 2, block_m=16),
    Launch("matrix", 16, 128, 4, block_m=32, registers=128),
]  # fmt: skip


@pytest.mark.parametrize("launch", MATRIX_LAUNCHES, ids=str)
@pytest.mark.parametrize("rows", [1, 19, 70])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_matrix_passes_and_residual(norm, rows, launch, randn, assert_close):
    """W held for several blocks of rows, the last of them partly or wholly empty; sums that start from the residual."""
    x, weight, gamma = inputs(randn, rows, 96, 14, torch.float32)
    bias, residual = randn(14), randn(rows, 14)
    gamma = gamma if norm else None
    y = expected(x, weight, gamma, bias=bias)
    options = {"norm_weight": gamma, "eps": EPS, "bias": bias, "launch": launch}
    assert_close(decode_linear(x, weight, **options), y)
    stream = residual.clone()
    assert_close(decode_linear(x, weight, residual=stream, **options), y + residual.double())


def test_matrix_candidates():
    """What is proposed runs, and every one is another launch."""
    assert matrix_candidates(4, 1024, 100, False, 2) == []  # rows of W at no multiple of 16 bytes
    for rows in (2, 16, 64):
        for out, k, gated in ((4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False)):
            found = matrix_candidates(rows, out, k, gated, 2)
            assert 4 <= len(found) == len(set(found)) <= 32
            for launch in found:
                assert launch.block_k % (32 * launch.num_warps) == 0
                assert launch.registers * launch.num_warps * 32 <= 65536


@pytest.mark.parametrize("k", [128, 100])
@pytest.mark.parametrize("split_k", [2, 3])
def test_programs_share_a_sum(split_k, k, randn, assert_close):
    """Twice with the same counters, which the first launch must have left as zeros."""
    x, weight, gamma = inputs(randn, 19, k, 40, torch.float32)
    residual = randn(19, 40)
    launch = Launch("tiled", 16, 16, 4, block_m=16, num_stages=2, split_k=split_k)
    stream = residual.clone()
    for times in (1, 2):
        decode_linear(x, weight, residual=stream, launch=launch)
        assert_close(stream, residual.double() + times * expected(x, weight))
    y = decode_linear(x, weight, norm_weight=gamma, eps=EPS, gated=True, launch=launch)
    assert_close(y, expected(x, weight, gamma, gated=True))


HELD = [
    Launch("tiled", 32, 64, 4, block_m=16, split_k=2), Launch("tiled", 16, 128, 4, block_m=64),
    Launch("tiled", 32, 32, 4, block_m=64, split_k=4, ahead=False),
    Launch("tiled", 32, 64, 4, block_m=16, split_k=2, described=True),
    Launch("tiled", 16, 128, 4, block_m=64, described=True),
    Launch("tiled", 32, 32, 4, block_m=16, num_stages=2, described=True),
    Launch("tiled", 16, 32, 4, block_m=64, num_stages=2, split_k=2, described=True),
]  # fmt: skip


@pytest.mark.parametrize("launch", HELD, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_part_of_one_tile(gated, launch, randn, assert_close):
    """W held from before the wait, W's rows first and x's; one asks for nothing ahead, the last two stream W by
    descriptors."""
    x, weight, gamma = inputs(randn, 70, 128, 38, torch.float32)
    bias = randn(38)
    y = decode_linear(x, weight, norm_weight=gamma, eps=EPS, bias=bias, gated=gated, launch=launch)
    assert_close(y, expected(x, weight, gamma, bias=bias, gated=gated))


@pytest.mark.parametrize("launch", [None, Launch("tiled", 16, 32, 4, block_m=16, num_stages=2, split_k=3)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_norm_in_halves(kind, launch, randn, assert_close):
    """What one product leaves of the norm is what the next one wants; 3 column blocks, the last not full."""
    x, weight, _ = inputs(randn, 21, 96, 44, kind)
    residual, gamma, bias = randn(21, 44, dtype=kind), randn(44, dtype=kind), randn(44, dtype=kind)
    stream = residual.clone()
    half = decode_linear_half_norm(x, weight, stream, gamma, bias=bias, launch=launch)
    assert_close(stream, expected(x, weight, bias=bias, residual=residual))
    assert_close(half.rows, stream.double() * gamma.double())
    assert_close(half.squares.sum(0), stream.double().square().sum(1))
    following = randn(30, 44, dtype=kind)
    for gated in (False, True):
        y = decode_linear(half, following, eps=0.5, gated=gated, launch=launch)
        assert_close(y, expected(stream, following, gamma, eps=0.5, gated=gated))
        copy = FUSIONS["decode_linear"].reference(half_norm_reference(stream, gamma), following, eps=0.5, gated=gated)
        assert_close(copy, expected(stream, following, gamma, eps=0.5, gated=gated))


@pytest.mark.parametrize("rows", [1, 6, 20])
def test_float16_does_not_overflow(rows, randn, assert_close):
    """gamma * x lies far beyond float16, the result does not."""
    x, gamma = randn(rows, 64, dtype=torch.float16, scale=8000), randn(64, dtype=torch.float16, scale=30)
    weight = randn(24, 64, dtype=torch.float16, scale=0.1)
    assert_close(decode_linear(x, weight, norm_weight=gamma, eps=EPS), expected(x, weight, gamma))


@pytest.mark.parametrize("rows", [1, 6])
def test_large_eps_counts(rows, randn, assert_close):
    x, weight, gamma = randn(rows, 40, scale=0.01), randn(24, 40), randn(40)
    assert_close(decode_linear(x, weight, norm_weight=gamma, eps=0.5), expected(x, weight, gamma, eps=0.5))


@pytest.mark.parametrize(("k", "dtype"), [(14336, torch.float32), (33000, torch.float16)])
def test_long_rows(k, dtype, randn, assert_close):
    """Rows that take the registers of many warps, and rows that no program can hold."""
    x, weight, gamma = inputs(randn, 1, k, 3, dtype)
    assert_close(decode_linear(x, weight, norm_weight=gamma, eps=EPS), expected(x, weight, gamma))


def test_default_launch_suits_the_shape():
    """One row stays on the ordinary cores; enough programs for a large GPU; shared memory that every GPU has."""
    for rows in (1, 3, 4, 5, 16, 32, 100, 512):
        for out, k, gated in ((4096, 1024, False), (1024, 3072, False), (3072, 1024, True), (4096, 14336, False)):
            launch = default_launch(rows, out, k, gated, 2)
            held = 1 < rows <= 16 and k < 14336
            assert launch.kernel == ("matrix" if held else "vector" if rows <= 4 else "tiled")
            stage = (launch.block_n * (1 + gated) + launch.block_m) * launch.block_k * 2
            if launch.kernel == "tiled":
                assert launch.num_stages * stage <= 96 * 1024 and -(-out // launch.block_n) >= 64
            else:
                assert -(-out // launch.block_n) >= 128
                registers = launch.block_n * (1 + gated) * k * 2 / (launch.num_warps * 32 * 4)
                assert registers <= 64


def test_unknown_gpus_take_the_default():
    assert chosen("decode_linear", "4096x1024 rows 1", torch.device("cpu")) is None
    assert best_launch(1, 4096, 1024, False, 2, torch.device("cpu")) == default_launch(1, 4096, 1024, False, 2)


def test_large_matrices_that_were_not_measured_are_cublas_own():
    """Qwen3-4B's four, of several rows; one row streams them by itself."""
    cpu = torch.device("cpu")
    for out, k, gated in ((6144, 2560, False), (2560, 4096, False), (9728, 2560, True), (2560, 9728, False)):
        for rows in (2, 8, 32):
            assert best_launch(rows, out, k, gated, 2, cpu) is None
        assert best_launch(1, out, k, gated, 2, cpu) == default_launch(1, out, k, gated, 2)
    for out, k, gated in ((4096, 1024, False), (3072, 1024, True)):  # Qwen3-0.6B's largest
        assert best_launch(8, out, k, gated, 2, cpu) == default_launch(8, out, k, gated, 2)


def test_programs_of_many_warps_and_rows_that_were_not_measured_are_cublas_own():
    """Llama-3.2-1B's qkv, though no large matrix; not its o_proj, nor Qwen2.5-1.5B's qkv or Qwen3-0.6B's o and down."""
    cpu = torch.device("cpu")
    for rows in (2, 8, 16):
        assert best_launch(rows, 3072, 2048, False, 2, cpu) is None
        for out, k in ((2048, 2048), (2048, 1536), (1024, 2048), (1024, 3072)):
            assert best_launch(rows, out, k, False, 2, cpu) == default_launch(rows, out, k, False, 2)
    for rows in (1, 32):
        assert best_launch(rows, 3072, 2048, False, 2, cpu) == default_launch(rows, 3072, 2048, False, 2)


def test_no_rows(randn):
    assert decode_linear(randn(0, 32), randn(8, 32)).shape == (0, 8)


def test_wrong_arguments(randn):
    x, weight = randn(4, 32), randn(8, 32)
    with pytest.raises(ValueError, match="weight must have shape"):
        decode_linear(x, randn(8, 31))
    with pytest.raises(ValueError, match="x must be contiguous"):
        decode_linear(randn(32, 4).T, weight)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(32,\), not \(31,\)"):
        decode_linear(x, weight, norm_weight=randn(31))
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        decode_linear(x, weight, bias=randn(4), gated=True)
    with pytest.raises(ValueError, match=r"residual must have shape \(4, 4\)"):
        decode_linear(x, weight, residual=randn(4, 8), gated=True)
    with pytest.raises(ValueError, match="as many gate rows as up rows"):
        decode_linear(x, randn(7, 32), gated=True)
    half = half_norm_reference(x, randn(32))
    with pytest.raises(ValueError, match="half normed take no other norm_weight"):
        decode_linear(half, weight, norm_weight=randn(32))
    with pytest.raises(ValueError, match=r"squares must have shape \(2, 4\)"):
        decode_linear(HalfNormed(half.rows, randn(2, 3)), weight)
    with pytest.raises(ValueError, match=r"next_norm_weight must have shape \(8,\)"):
        decode_linear_half_norm(x, weight, randn(4, 8), randn(4))
    with pytest.raises(ValueError, match="half a norm takes no float16"):
        decode_linear_half_norm(x.half(), weight.half(), randn(4, 8).half(), randn(8).half())


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_dependent_launches_compute_the_same(rows, randn):
    """A chain of in-place layers, bit for bit, over and over: a read too early would differ sooner or later."""
    hidden, inter = 1024, 3072
    gate_up, down = randn(2 * inter, hidden, scale=0.03), randn(hidden, inter, scale=0.02)
    gamma, start = randn(hidden).bfloat16(), randn(rows, hidden).bfloat16()
    gate_up, down = gate_up.bfloat16(), down.bfloat16()

    def chain(dependent: bool) -> Tensor:
        stream = start.clone()
        for _ in range(20):
            y = decode_linear(stream, gate_up, norm_weight=gamma, eps=EPS, gated=True, dependent=dependent)
            decode_linear(y, down, residual=stream, dependent=dependent)
        return stream

    plain = chain(False)
    assert torch.isfinite(plain).all()
    for _ in range(10):
        assert torch.equal(chain(True), plain)
