"""What fused layers know of a step beyond what nano's layers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

from engines.nano.utils.context import StepContext
from kernels.decode_linear_tiled import HalfNormed


@dataclass(slots=True)
class FusedContext(StepContext):
    """Of a step through fused layers.

    dependent: kernels of the step may start while the ones before them end
    half_normed: the residual stream half through the norm that comes next, where the product before left it
    """

    dependent: bool = False
    half_normed: HalfNormed | None = None


@dataclass(slots=True)
class DecodeContext(FusedContext):
    """Of a step on the device's own state, where positions are -1 in rows that hold no sequence."""


@dataclass(slots=True)
class PrefillContext(FusedContext):
    """Of a step that draws one token per sequence: its last layer ends with the rows of `last_tokens` alone.

    tail: the step that these rows make, their keys and values in the cache; but its `slot_mapping` is of all tokens
    few: so few tokens that decode's kernels are worth a try for its products
    stream: memory for the residual stream of these rows [sequences, hidden], which the step leaves there; None: any
    """

    tail: StepContext | None = None
    few: bool = False
    stream: Tensor | None = None


def depends(context: StepContext) -> bool:
    """Whether kernels of the step may start while the ones before them end."""
    return isinstance(context, FusedContext) and context.dependent


def as_in_decode(context: StepContext) -> TypeGuard[FusedContext]:
    """Whether decode's kernels make the step's products, where they are the faster ones."""
    return isinstance(context, DecodeContext) or (isinstance(context, PrefillContext) and context.few)
