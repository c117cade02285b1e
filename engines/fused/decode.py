"""The decode step from token to token: layers, head, sampling, the new state and embedding, all on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.base import Site
from engines.fused.context import DecodeContext
from engines.fused.draw import Draw
from engines.fused.prefill_graphs import PrefillGraphs
from engines.fused.state import DecodeState
from engines.nano.graphs import DecodeGraphs
from engines.nano.models import Decoder
from kernels.decode_attention_launch import SHORT_CONTEXT


class DecodeStep:
    """Launches one step on the rows of `state`, all of whose kernels may be launched dependently.

    So what comes before it in the stream must be no step: its kernels would overlap with that one's last, which writes
    the positions that attention reads early. A graph is replayed when the one before has ended.
    """

    def __init__(self, model: Decoder, state: DecodeState, features: frozenset[str], block_size: int) -> None:
        self.model = model
        self.state = state
        self.features = features
        self.block_size = block_size
        self.draw = Draw(model, state.max_rows, features)

    def __call__(self, rows: int, longest: int) -> Tensor:
        """Logits [rows, vocab]; `longest` bounds the length of every row."""
        context = self._context(rows, longest)
        positions = self.state.positions[:rows]
        hidden, residual = self.state.stream[:rows], None
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual, positions, context)
        return self.draw(hidden, self.state)

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Every place that can be timed, in the order in which they run."""
        return [*self.model.sites(), *self.draw.sites()]

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
    """nano's, of another step; those of prefill in the same memory; and perhaps others of steps with short contexts."""

    prefill: PrefillGraphs | None = None
    short: DecodeGraphs | None = None

    def replay_step(self, rows: int, longest: int) -> Tensor:
        """Run the step of contexts of at most `longest` tokens; its output, until the next replay."""
        bucket = self.bucket(rows)
        if self.short is not None and longest <= SHORT_CONTEXT and bucket in self.short.sizes:
            return self.short.replay(bucket)[:rows]
        return self.replay(rows)
