"""Layers of which each rank holds a share. Used only where there is more than one rank: see `engines.nano.parallel`.

Projections into heads and into the feed-forward block need nothing of their own: a rank's `StackedLinear` is smaller.
What comes out of those blocks is a sum over all ranks; embedding and head are split by tokens of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engines.nano.layers.embedding import OutputHead


class RowParallelLinear(nn.Linear):
    """A rank's columns of a linear layer, for its share of the input [tokens, in_features]; ranks sum their outputs."""

    split_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        dist.all_reduce(out)
        return out


class VocabParallelEmbedding(nn.Embedding):
    """A rank's rows of the embedding; other ranks' tokens give zeros here, and the sum over ranks is the embedding."""

    split_dim = 0

    def __init__(self, num_tokens: int, hidden_size: int, rank: int) -> None:
        super().__init__(num_tokens, hidden_size)
        self.first = rank * num_tokens

    def forward(self, token_ids: Tensor) -> Tensor:
        row = token_ids - self.first
        mine = (row >= 0) & (row < self.num_embeddings)
        out = super().forward(row * mine) * mine.unsqueeze(-1)
        dist.all_reduce(out)
        return out


class VocabParallelHead(OutputHead):
    """A rank's columns of the logits, put together on rank 0: [rows, vocab] there, None elsewhere."""

    def __init__(self, embedding: nn.Embedding, tied: bool, rank: int, ranks: int) -> None:
        super().__init__(embedding, tied)
        self.rank, self.ranks = rank, ranks

    def forward(self, hidden: Tensor) -> Tensor | None:  # type: ignore[override]
        share = super().forward(hidden)
        shares = [torch.empty_like(share) for _ in range(self.ranks)] if self.rank == 0 else None
        dist.gather(share, shares)
        return None if shares is None else torch.cat(shares, -1)
