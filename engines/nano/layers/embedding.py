"""Token embedding and output head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear


class OutputHead(nn.Module):
    """Logits [rows, vocab] of hidden states [rows, hidden]. Tied: shares the embedding's matrix and owns none."""

    split_dim = 0

    def __init__(self, embedding: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self._tied_to = [embedding] if tied else []  # in a list: not a submodule of two parents
        if not tied:
            self.weight = nn.Parameter(embedding.weight.new_empty(embedding.weight.shape))

    @property
    def matrix(self) -> Tensor:
        return self._tied_to[0].weight if self._tied_to else self.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.matrix)
