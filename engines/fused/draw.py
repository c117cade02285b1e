"""The end of a step: from the residual stream of the rows to draw from to their tokens, all on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from engines.base import NO_LAYER, Site
from engines.fused.state import Rows
from engines.nano.models import Decoder
from kernels.decode_head import best_launch

FEW_ROWS = 16
"""So many may all be in one tile of the head's kernel; more take the way that was measured to be faster than cuBLAS."""


class Head(nn.Module):
    """Final norm, output head and the sampler's sums; logits of many rows go to `memory` [max_rows, vocab]."""

    def __init__(self, model: Decoder, memory: Tensor) -> None:
        super().__init__()
        self._model, self._memory = (model,), memory

    def takes(self, hidden: Tensor) -> bool:
        """Whether `kernels.decode_head` is the faster way for so many rows."""
        rows, k = hidden.shape
        vocab = self._memory.shape[1]
        launch = best_launch(rows, vocab, k, hidden.element_size(), hidden.device)
        return launch is not None and (rows <= FEW_ROWS or launch.tiles is not None)

    def forward(self, hidden: Tensor, temperatures: Tensor, dependent: bool) -> tuple[Tensor, Tensor, Tensor]:
        (model,) = self._model
        norm, rows = model.model.norm, hidden.shape[0]
        return kernels.decode_head(
            hidden, norm.weight, model.lm_head.matrix, norm.eps, temperatures,
            out=self._memory[:rows] if rows > FEW_ROWS else None, dependent=dependent,
        )  # fmt: skip


class Logits(nn.Module):
    """The output head by cuBLAS, always into the same memory: what many rows give is large, and graphs keep theirs."""

    def __init__(self, model: Decoder, max_rows: int) -> None:
        super().__init__()
        self._matrix = (model.lm_head.matrix,)
        self.memory = self._matrix[0].new_empty(max_rows, self._matrix[0].shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, self._matrix[0].t(), out=self.memory[: hidden.shape[0]])


class Sample(nn.Module):
    """Draws the rows' tokens, hands them to the host, and moves the state on; of decode, embeds them too."""

    def forward(self, logits: Tensor, sums: tuple[Tensor, Tensor] | None, state: Rows, dependent: bool) -> None:
        """`sums` are the head's; None: they are still to be made from `logits` [rows, vocab]."""
        rows, s = logits.shape[0], state
        if sums is None:
            sums = kernels.tile_stats(logits, s.temperatures[:rows], dependent=dependent)
        kernels.choose_token(
            logits, *sums, s.temperatures[:rows], s.seeds[:rows], s.positions[:rows], s.tokens[:rows], s.ring,
            s.steps[:rows], s.embedding(rows), dependent=dependent,
        )  # fmt: skip


class Draw:
    """Final norm, head and sampling, the sampler's sums with the head where that is faster."""

    def __init__(self, model: Decoder, max_rows: int, features: frozenset[str]) -> None:
        self.norm = model.model.norm
        self.features = features
        self.lm_head = Logits(model, max_rows)
        self.head = Head(model, self.lm_head.memory)
        self.sample = Sample()

    def __call__(self, hidden: Tensor, state: Rows) -> Tensor:
        """Logits [rows, vocab] of the residual stream [rows, hidden] of the first rows of `state`."""
        dependent = "dependent" in self.features
        sums: Any = None
        if "head" in self.features and self.head.takes(hidden):
            logits, *sums = self.head(hidden, state.temperatures[: len(hidden)], dependent)
        else:
            logits = self.lm_head(self.norm(hidden, dependent))
        self.sample(logits, sums, state, dependent)
        return logits

    def sites(self) -> list[tuple[Site, nn.Module]]:
        """Of these, in the order in which they run; the norm is the model's own."""
        return [
            (Site(NO_LAYER, "head", "final_norm+lm_head"), self.head),
            (Site(NO_LAYER, "head", "lm_head"), self.lm_head),
            (Site(NO_LAYER, "sample", "sample+embed"), self.sample),  # prefill's draws are watched by nobody
        ]
