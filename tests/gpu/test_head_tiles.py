"""The head of many rows in a captured step: behind kernels that it must wait for, into memory that graphs share."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.decode_head import Launch
from kernels.prefill_linear import Launch as Tiles
from kernels.sample import TILE, tile_stats_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCAB, HIDDEN, TOKENS, REPLAYS = 40_000, 1024, 500, 5
# W's rows first and x's, one TILE and two, one program on a multiprocessor and two, one block of rows and two
TILES = {
    17: Tiles(32, TILE, 64, 4, 4, per_sm=2), 32: Tiles(32, 2 * TILE, 64, 8, 4), 60: Tiles(64, TILE, 64, 4, 6),
    128: Tiles(128, 2 * TILE, 64, 8, 3), 200: Tiles(128, TILE, 64, 8, 4),
}  # fmt: skip


@pytest.mark.parametrize("rows", TILES)
def test_replays_follow_their_inputs(rows):
    """Each replay draws from the rows that its own first kernel has written, and touches no other rows' logits."""
    generator = torch.Generator("cuda").manual_seed(rows)
    normal = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    table, gamma = normal(TOKENS, HIDDEN).bfloat16(), normal(HIDDEN).bfloat16()
    weight = (normal(VOCAB, HIDDEN) * HIDDEN**-0.5).bfloat16()
    temperatures = torch.tensor([0.0, 0.6, 1.0, 2.5, 0.3], device="cuda").repeat(rows)[:rows].contiguous()
    tokens = torch.zeros(rows, dtype=torch.int32, device="cuda")
    memory = torch.full((rows + 5, VOCAB), float("nan"), dtype=torch.bfloat16, device="cuda")

    def step():
        x = kernels.embed_rows(tokens, table, dependent=True)
        return kernels.decode_head(
            x, gamma, weight, 1e-6, temperatures, out=memory[:rows], dependent=True, launch=Launch(tiles=TILES[rows])
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, tile_max, tile_sum = step()
    for _ in range(REPLAYS):
        tokens.random_(TOKENS, generator=generator)
        memory[:rows] = tile_max[:] = tile_sum[:] = float("nan")
        graph.replay()
        x = table[tokens.long()].float()
        normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gamma.float()
        expected = normalised @ weight.float().T
        assert (logits.float() - expected).norm() / expected.norm() < 1e-2
        top, total = tile_stats_reference(logits, temperatures)
        assert torch.equal(tile_max, top)
        assert (tile_sum - total).norm() / total.norm() < 1e-4
        assert memory[rows:].isnan().all()
