"""The decode step from token to token: embedding, layers, head, sampling and the new state, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from engines.base import NO_LAYER, Site
from engines.fused.layers import DecodeContext
from engines.fused.prefill_graphs import PrefillGraphs
from engines.fused.state import DecodeState
from engines.nano.graphs import DecodeGraphs
from engines.nano.models import Decoder
from kernels.decode_head import best_launch

ROWS = 16
"""Of the head's kernel at most: it makes a tile of the vocabulary for all rows at once."""


class Embed(nn.Module):
    """tokens [rows] int32 → [rows, hidden]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        return kernels.embed_rows(tokens, self._embedding[0].weight)


class Head(nn.Module):
    """Final norm, output head and the sums that sampling needs, in one kernel."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self._model = (model,)

    def takes(self, hidden: Tensor) -> bool:
        """Whether one kernel is the faster way for so many rows."""
        rows, k = hidden.shape
        vocab = self._model[0].lm_head.matrix.shape[0]
        return rows <= ROWS and best_launch(rows, vocab, k, hidden.element_size(), hidden.device) is not None

    def forward(self, hidden: Tensor, temperatures: Tensor, dependent: bool) -> tuple[Tensor, Tensor, Tensor]:
        (model,) = self._model
        norm = model.model.norm
        return kernels.decode_head(
            hidden, norm.weight, model.lm_head.matrix, norm.eps, temperatures, dependent=dependent
        )


class Logits(nn.Module):
    """The output head by cuBLAS, always into the same memory: what many rows give is large, and graphs keep theirs."""

    def __init__(self, model: Decoder, max_rows: int) -> None:
        super().__init__()
        self._matrix = (model.lm_head.matrix,)
        self.memory = self._matrix[0].new_empty(max_rows, self._matrix[0].shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, self._matrix[0].t(), out=self.memory[: hidden.shape[0]])


class Sample(nn.Module):
    """Draws the rows' tokens, hands them to the host, and moves the state on."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__()
        self.state = state

    def forward(self, logits: Tensor, sums: tuple[Tensor, Tensor] | None, dependent: bool) -> None:
        """`sums` are the head's; None: they are still to be made from `logits` [rows, vocab]."""
        rows, s = logits.shape[0], self.state
        if sums is None:
            sums = kernels.tile_stats(logits, s.temperatures[:rows], dependent=dependent)
        kernels.choose_token(
            logits, *sums, s.temperatures[:rows], s.seeds[:rows], s.positions[:rows], s.tokens[:rows], s.ring,
            s.steps[:rows], dependent=dependent,
        )  # fmt: skip


class DecodeStep:
    """Launches one step on the rows of `state`."""

    def __init__(self, model: Decoder, state: DecodeState, features: frozenset[str], block_size: int) -> None:
        self.model = model
        self.state = state
        self.features = features
        self.block_size = block_size
        self.embed = Embed(model.model.embed_tokens)
        self.head = Head(model)
        self.lm_head = Logits(model, state.max_rows)
        self.sample = Sample(state)

    def __call__(self, rows: int, longest: int) -> Tensor:
        """Logits [rows, vocab]; `longest` bounds the length of every row."""
        context = self._context(rows, longest)
        temperatures, positions = self.state.temperatures[:rows], self.state.positions[:rows]
        hidden, residual = self.embed(self.state.tokens[:rows]), None
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual, positions, context)
        if "head" in self.features and self.head.takes(hidden):
            logits, *sums = self.head(hidden, temperatures, context.dependent)
            self.sample(logits, tuple(sums), context.dependent)
        else:
            logits = self.lm_head(self.model.model.norm(hidden))
            self.sample(logits, None, context.dependent)
        return logits

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Every place that can be timed, in the order in which they run."""
        return [
            (Site(NO_LAYER, "embed", "embed"), self.embed),
            *[(site, module) for site, module in self.model.sites() if site.block != "embed"],
            (Site(NO_LAYER, "head", "final_norm+lm_head"), self.head),
            (Site(NO_LAYER, "head", "lm_head"), self.lm_head),
            (Site(NO_LAYER, "sample", "sample"), self.sample),
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
