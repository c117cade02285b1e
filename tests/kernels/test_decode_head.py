"""decode_head against float64: logits, and the statistics of each tile of the logits as they were stored."""

import pytest
import torch

from kernels import FUSIONS, decode_head
from kernels.choices import none_chosen
from kernels.decode_head import Launch, default_launch
from kernels.decode_linear import Launch as Product
from kernels.sample import TILE

EPS = 1e-6


@pytest.fixture(autouse=True)
def defaults():
    """What was measured for the GPU that runs the tests must not stand in for the defaults."""
    with none_chosen():
        yield


def assert_statistics(logits, tile_max, tile_sum, temperatures):
    """By one tile and one row at a time, from the logits that the kernel stored."""
    rows, vocab = logits.shape
    assert tile_max.shape == tile_sum.shape == (rows, -(-vocab // TILE))
    for row in range(rows):
        temperature = temperatures[row].item() or 1.0
        for tile in range(tile_max.shape[1]):
            z = logits[row, tile * TILE : (tile + 1) * TILE].double()
            assert tile_max[row, tile].item() == z.max().item()
            total = torch.exp((z - z.max()) / temperature).sum()
            assert tile_sum[row, tile].item() == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 64, 300), (3, 100, 128), (16, 40, 129), (70, 33, 7)], ids=str)
def test_head(shape, dtype, randn, assert_close):
    rows, k, vocab = shape
    x, gamma = randn(rows, k, dtype=dtype, scale=3), randn(k, dtype=dtype)
    weight = randn(vocab, k, dtype=dtype, scale=4 * k**-0.5)
    temperatures = torch.tensor([0.0, 0.6, 1.0, 2.5], device=x.device).repeat(rows)[:rows].contiguous()
    logits, tile_max, tile_sum = decode_head(x, gamma, weight, EPS, temperatures)
    x64 = x.double()
    normalised = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + EPS) * gamma.double()
    assert logits.dtype == dtype
    assert_close(logits, normalised @ weight.double().T)
    assert_statistics(logits, tile_max, tile_sum, temperatures)
    theirs = FUSIONS["decode_head"].reference(x, gamma, weight, EPS, temperatures)
    assert_close(logits, theirs[0])
    assert_statistics(*theirs, temperatures)


LAUNCHES = (
    Launch(16, 4, 2), Launch(64, 8, 3, ahead=0), Launch(32, 4, 4, ahead=2),
    Launch(product=Product("vector", 4, 32, 1)), Launch(product=Product("matrix", 8, 128, 4, block_m=8)),
)  # fmt: skip


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_every_launch_computes_the_same(launch, randn, assert_close):
    x, gamma, weight = (randn(*shape, dtype=torch.bfloat16) for shape in ((2, 96), (96,), (200, 96)))
    temperatures = torch.tensor([0.7, 0.0], device=x.device)
    logits, *sums = decode_head(x, gamma, weight, EPS, temperatures, launch=launch)
    assert_close(logits, FUSIONS["decode_head"].reference(x, gamma, weight, EPS, temperatures)[0])
    assert_statistics(logits, *sums, temperatures)


def test_float16_does_not_overflow(randn, assert_close):
    x, gamma = randn(2, 64, dtype=torch.float16, scale=8000), randn(64, dtype=torch.float16, scale=30)
    weight = randn(24, 64, dtype=torch.float16, scale=0.1)
    temperatures = torch.ones(2, device=x.device)
    theirs = FUSIONS["decode_head"].reference(x, gamma, weight, EPS, temperatures)
    assert_close(decode_head(x, gamma, weight, EPS, temperatures)[0], theirs[0])


def test_the_default_fits_every_gpu():
    for k, element_bytes, dtype_block in ((1024, 2, 64), (4096, 4, 32), (20, 2, 32)):
        launch = default_launch(k, element_bytes)
        assert launch.block_k == dtype_block
        assert (TILE + 16) * launch.block_k * element_bytes * launch.num_stages <= 96 * 1024


def test_wrong_arguments(randn):
    x, gamma, weight = randn(4, 32), randn(32), randn(8, 32)
    with pytest.raises(ValueError, match=r"temperatures must have shape \(4,\)"):
        decode_head(x, gamma, weight, EPS, randn(3))
    with pytest.raises(ValueError, match="temperatures must be torch.float32"):
        decode_head(x, gamma, weight, EPS, randn(4).half())
    with pytest.raises(ValueError, match="norm_weight must have shape"):
        decode_head(x, gamma[:5].contiguous(), weight, EPS, randn(4))
