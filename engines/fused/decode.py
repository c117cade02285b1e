"""The decode step from token to token: embedding, layers, head, sampling and the new state, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from engines.base import NO_LAYER, Site
from engines.fused.context import DecodeContext
from engines.fused.draw import Draw
from engines.fused.prefill_graphs import PrefillGraphs
from engines.fused.state import DecodeState
from engines.nano.graphs import DecodeGraphs
from engines.nano.models import Decoder


class Embed(nn.Module):
    """tokens [rows] int32 → [rows, hidden]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        return kernels.embed_rows(tokens, self._embedding[0].weight)


class DecodeStep:
    """Launches one step on the rows of `state`."""

    def __init__(self, model: Decoder, state: DecodeState, features: frozenset[str], block_size: int) -> None:
        self.model = model
        self.state = state
        self.features = features
        self.block_size = block_size
        self.embed = Embed(model.model.embed_tokens)
        self.draw = Draw(model, state.max_rows, features)

    def __call__(self, rows: int, longest: int) -> Tensor:
        """Logits [rows, vocab]; `longest` bounds the length of every row."""
        context = self._context(rows, longest)
        positions = self.state.positions[:rows]
        hidden, residual = self.embed(self.state.tokens[:rows]), None
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual, positions, context)
        return self.draw(hidden, self.state)

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Every place that can be timed, in the order in which they run."""
        return [
            (Site(NO_LAYER, "embed", "embed"), self.embed),
            *[(site, module) for site, module in self.model.sites() if site.block != "embed"],
            *self.draw.sites(),
        ]

    def _context(self, rows: int, longest: int) -> DecodeContext:
        state = self.state
        positions, tables = state.positions[:rows], state.block_tables[:rows]
        lengths = slots = cu_seqlens = state.positions[:0]
        if "attention" not in self.features:  # then kernels run that want these from somebody
            lengths = positions + 1
            at = positions.clamp_min(0).long()
            blocks = tables.gather(1, (at // self.block_size).unsqueeze(1)).squeeze(1)
            slots = torch.where(positions < 0, positions, blocks * self.block_size + (at % self.block_size).int())
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=positions.device)
        return DecodeContext(
            slot_mapping=slots, cu_seqlens_q=cu_seqlens, seqlens_k=lengths, block_tables=tables, max_seqlen_q=1,
            max_seqlen_k=longest, dependent="dependent" in self.features,
        )  # fmt: skip


class Graphs(DecodeGraphs):
    """nano's, of another step, and those of prefill in the same memory."""

    prefill: PrefillGraphs | None = None
