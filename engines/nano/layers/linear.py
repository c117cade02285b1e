"""Linear layers."""

from __future__ import annotations

from torch import nn


class StackedLinear(nn.Linear):
    """Several projections of the same input as one matrix product: weight rows [sum(part_sizes), in_features].

    `part_sizes` says which rows belong to which projection of the checkpoint. Where a model has several ranks, each
    holds its share of the rows of every part.
    """

    split_dim = 0

    def __init__(self, in_features: int, part_sizes: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(part_sizes), bias=bias)
        self.part_sizes = part_sizes
