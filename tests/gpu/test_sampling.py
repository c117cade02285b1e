"""Sampling in a captured decode step: dependent launches, state on the device, tokens in pinned host memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS, VOCAB, HIDDEN, SLOTS, STEPS = 6, 151_936, 256, 4, 10
TEMPERATURES = [0.0, 0.6, 1.0, 1.0, 1.4, 0.6]
POSITIONS = [10, 20, 30, -1, 50, 60]


class Decoder:
    """A model of an embedding and a head. Positions, tokens and steps stay on the device from step to step."""

    def __init__(self, path: str) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        self.table = torch.randn(VOCAB, HIDDEN, device="cuda", generator=generator).bfloat16()
        self.head = (torch.randn(VOCAB, HIDDEN, device="cuda", generator=generator) / 6).bfloat16()
        self.path = path
        self.temperatures = torch.tensor(TEMPERATURES, device="cuda")
        self.seeds = torch.arange(ROWS, device="cuda") << 33
        self.positions = torch.tensor(POSITIONS, dtype=torch.int32, device="cuda")
        self.tokens = torch.arange(ROWS, dtype=torch.int32, device="cuda")
        self.ring = torch.full((SLOTS, ROWS + 2), -7, dtype=torch.int32, pin_memory=True)
        self.steps = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
        self.stream = kernels.embed_rows(self.tokens, self.table)

    def step(self, dependent: bool = False) -> None:
        with kernels.use(self.path):
            logits = self.stream @ self.head.T
            stats = kernels.tile_stats(logits, self.temperatures, dependent=dependent)
            kernels.choose_token(
                logits, *stats, self.temperatures, self.seeds, self.positions, self.tokens, self.ring, self.steps,
                (self.table, self.stream), dependent=dependent,
            )  # fmt: skip

    def state(self) -> list[Tensor]:
        torch.cuda.synchronize()
        return [value.cpu().clone() for value in (self.tokens, self.positions, self.ring, self.steps, self.stream)]


def graph_of(decoder: Decoder, dependent: bool) -> torch.cuda.CUDAGraph:
    """Captured once the kernels are compiled; the step that compiled them is undone."""
    tensors = (decoder.tokens, decoder.positions, decoder.ring, decoder.steps, decoder.stream)
    before = [value.clone() for value in tensors]
    decoder.step(dependent)
    torch.cuda.synchronize()
    for value, old in zip(tensors, before, strict=True):
        value.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step(dependent)
    return graph


@pytest.mark.parametrize("dependent", [False, True], ids=["ordinary", "dependent"])
def test_graph_draws_what_the_reference_draws(dependent):
    """Step after step, read back from pinned memory once an event says that the step is over."""
    expected, decoder = Decoder("reference"), Decoder("triton")
    graph = graph_of(decoder, dependent)
    over = torch.cuda.Event()
    for step in range(STEPS):
        expected.step()
        graph.replay()
        over.record()
        over.synchronize()
        row = decoder.ring[step % SLOTS].clone()
        assert torch.equal(row[:ROWS], expected.tokens.cpu())
        assert row[3] == 0 and row[ROWS:].tolist() == [-7, -7]
    for value, other in zip(decoder.state(), expected.state(), strict=True):
        assert torch.equal(value, other)
    assert decoder.positions.tolist() == [at + STEPS if at >= 0 else -1 for at in POSITIONS]


def test_replays_without_the_host():
    """Many dependent steps in a row, with nothing waited for between them, end as ordinary ones do."""
    ordinary, dependent = Decoder("triton"), Decoder("triton")
    graph = graph_of(dependent, dependent=True)
    for _ in range(200):
        ordinary.step()
        graph.replay()
    for value, other in zip(dependent.state(), ordinary.state(), strict=True):
        assert torch.equal(value, other)
