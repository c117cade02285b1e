"""decode_head against float64: logits, and the statistics of each tile of the logits as they were stored."""

import sys

import pytest
import torch

from kernels import FUSIONS, decode_head
from kernels.choices import none_chosen
from kernels.decode_head import Launch, default_launch
from kernels.decode_linear_launch import Launch as Product
from kernels.prefill_linear import Launch as Tiles
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


TILES = Launch(tiles=Tiles(16, TILE, 32, 4, 2))
LAUNCHES = (
    Launch(16, 4, 2), Launch(64, 8, 3, ahead=0), Launch(32, 4, 4, ahead=2),
    Launch(product=Product("vector", 4, 32, 1)), Launch(product=Product("matrix", 8, 128, 4, block_m=8)), TILES,
)  # fmt: skip


@pytest.mark.parametrize("out", [False, True], ids=["new memory", "given memory"])
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_every_launch_computes_the_same(launch, out, randn, assert_close):
    """Into memory of more rows too, of which the others stay as they are."""
    x, gamma, weight = (randn(*shape, dtype=torch.bfloat16) for shape in ((2, 96), (96,), (200, 96)))
    temperatures = torch.tensor([0.7, 0.0], device=x.device)
    memory = torch.full((4, 200), float("nan"), dtype=x.dtype, device=x.device)
    kept = [t.clone() for t in (x, gamma, weight, temperatures)]
    logits, *sums = decode_head(
        x, gamma, weight, EPS, temperatures, launch=launch, dependent=True, out=memory[:2] if out else None
    )
    assert_close(logits, FUSIONS["decode_head"].reference(x, gamma, weight, EPS, temperatures)[0])
    assert_statistics(logits, *sums, temperatures)
    assert (logits.data_ptr() == memory.data_ptr()) == out and memory[2:].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip((x, gamma, weight, temperatures), kept, strict=True))


# (rows, k, vocab): parts of a tile, several blocks of rows, an odd number of TILEs, rows of no multiple of 16 bytes
MANY_ROWS = [(8, 64, 264), (17, 72, 392), (70, 40, 200), (33, 36, 131)]
TILED = [
    TILES.tiles, Tiles(16, 2 * TILE, 16, 4, 3, per_sm=0), Tiles(64, TILE, 64, 4, 2, per_sm=2),
    Tiles(64, 2 * TILE, 32, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("described", [True, False], ids=["described", "pointers"])
@pytest.mark.parametrize("tiles", TILED, ids=str)
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
def test_tiles(shape, tiles, described, dtype, randn, assert_close, monkeypatch):
    """W's rows first and x's, one TILE of the vocabulary and two, from tile to tile and not."""
    if not described:
        monkeypatch.setattr(sys.modules["kernels.decode_head_tiles"], "can_describe", lambda *tensors: False)
    rows, k, vocab = shape
    x, gamma = randn(rows, k, dtype=dtype, scale=3), randn(k, dtype=dtype)
    weight = randn(vocab, k, dtype=dtype, scale=4 * k**-0.5)
    temperatures = torch.tensor([0.0, 0.6, 1.0, 2.5, 0.3], device=x.device).repeat(rows)[:rows].contiguous()
    logits, *sums = decode_head(x, gamma, weight, EPS, temperatures, launch=Launch(tiles=tiles), dependent=True)
    x64 = x.double()
    normalised = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + EPS) * gamma.double()
    assert logits.dtype == dtype and logits.is_contiguous()
    assert_close(logits, normalised @ weight.double().T)
    assert_statistics(logits, *sums, temperatures)


def test_float16_does_not_overflow(randn, assert_close):
    x, gamma = randn(2, 64, dtype=torch.float16, scale=8000), randn(64, dtype=torch.float16, scale=30)
    weight = randn(24, 64, dtype=torch.float16, scale=0.1)
    temperatures = torch.ones(2, device=x.device)
    theirs = FUSIONS["decode_head"].reference(x, gamma, weight, EPS, temperatures)
    for launch in (None, TILES):
        assert_close(decode_head(x, gamma, weight, EPS, temperatures, launch=launch)[0], theirs[0])


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
    temperatures = torch.ones(4, device=x.device)
    with pytest.raises(ValueError, match=r"out must have shape \(4, 8\)"):
        decode_head(x, gamma, weight, EPS, temperatures, out=randn(3, 8))
    with pytest.raises(ValueError, match="out must be torch.float32"):
        decode_head(x, gamma, weight, EPS, temperatures, out=randn(4, 8).half())
    with pytest.raises(ValueError, match="block_n of the head's tiles must be 128 or 256, not 64"):
        decode_head(x, gamma, weight, EPS, temperatures, launch=Launch(tiles=Tiles(16, 64, 32, 4, 2)))
