"""Norms and linear layers of a fused layer, each in the form that is the fastest for its number of rows.

Weights are nano's own tensors; nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kernels
from engines.fused.context import as_in_decode, depends
from engines.nano.layers.linear import StackedLinear
from engines.nano.layers.norm import RMSNorm
from engines.nano.utils.context import StepContext
from kernels.decode_linear import decode_linear_half_norm
from kernels.decode_linear_launch import Launch as DecodeLaunch
from kernels.decode_linear_launch import best_launch, best_prefill_gate_up
from kernels.prefill_linear import best_launch as best_prefill_launch


def shape_of(rows: int, weight: Tensor, gated: bool) -> tuple[int, int, int, bool, int, torch.device]:
    """Of a product, as the choice of its kernel wants it."""
    out, k = weight.shape
    return rows, out // 2 if gated else out, k, gated, weight.element_size(), weight.device


def decode_launch(x: Tensor, weight: Tensor, gated: bool) -> DecodeLaunch | None:
    """How `decode_linear` is the fastest way for x [rows, in] in a decode step here; None: it is not."""
    return best_launch(*shape_of(x.shape[0], weight, gated))


def prefill_launch(kernel: str, x: Tensor, weight: Tensor, context: StepContext) -> Any:
    """How the product of x [rows, in] and what follows it are best one kernel in prefill here; None: they are not."""
    if context.is_decode:
        return None
    return best_prefill_launch(kernel, weight.shape[0], weight.shape[1], x.shape[0], x.dtype, x.device)


class Norm(nn.Module):
    """A norm that stands alone."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self._norm = (norm,)

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        (norm,) = self._norm
        return kernels.rms_norm(hidden, norm.weight, norm.eps, dependent=depends(context))


class FinalNorm(nn.Module):
    """The model's last norm. nano's is compiled by torch, whose compiler a start would load for it alone."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, hidden: Tensor, dependent: bool = False) -> Tensor:
        return kernels.rms_norm(hidden, self.weight, self.eps, dependent=dependent)


class SiluMul(nn.Module):
    """silu(gate) · up that stands alone."""

    def forward(self, gate_up: Tensor, context: StepContext) -> Tensor:
        return kernels.silu_mul(gate_up, dependent=depends(context))


class NormLinear(nn.Module):
    """Norm and linear layer in one kernel (with silu(gate) · up if `gated`): a module of its own, to be timed."""

    def __init__(self, norm: RMSNorm, linear: StackedLinear, gated: bool) -> None:
        super().__init__()
        self._parts = (norm, linear)
        self.gated = gated

    def takes(self, hidden: Tensor, context: StepContext, max_prefill_rows: int) -> bool:
        """Whether one kernel is the faster way for so many rows."""
        if not as_in_decode(context):
            return hidden.shape[0] <= max_prefill_rows
        return decode_launch(hidden, self._parts[1].weight, self.gated) is not None

    @property
    def norm_weight(self) -> Tensor:
        """Of the norm, [hidden]."""
        return self._parts[0].weight

    def takes_half(self, x: Tensor) -> bool:
        """Whether for as many rows as x has the product can take a norm that the product before began."""
        launch = None if x.dtype == torch.float16 else decode_launch(x, self._parts[1].weight, self.gated)
        return launch is not None and launch.kernel == "tiled"

    def forward(self, hidden: Tensor, context: StepContext) -> Tensor:
        """[tokens, out] from the residual stream [tokens, hidden]."""
        norm, linear = self._parts
        if as_in_decode(context):
            half_normed, context.half_normed = context.half_normed, None
            return kernels.decode_linear(
                half_normed or hidden, linear.weight, norm_weight=None if half_normed else norm.weight, eps=norm.eps,
                bias=linear.bias, gated=self.gated, dependent=context.dependent,
            )  # fmt: skip
        result: Any
        if self.gated:
            result = kernels.rms_norm_gate_up_silu(hidden, norm.weight, linear.weight, norm.eps)
        else:
            result = kernels.rms_norm_linear(hidden, norm.weight, linear.weight, norm.eps, linear.bias)
        return result


class AddedLinear(nn.Module):
    """A linear layer that adds its output to the residual stream [tokens, hidden], in place.

    Before a norm and linear layer of which the tiled kernel is the faster way too, it makes half of that norm, if its
    own launch says so.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)
        self._next: tuple[NormLinear, ...] = ()

    def lead_to(self, following: NormLinear) -> None:
        """Nothing but `following` reads the residual stream before it is added to again."""
        self._next = (following,)

    def forward(self, x: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        (linear,) = self._linear
        if not as_in_decode(context) or (launch := decode_launch(x, linear.weight, False)) is None:
            return hidden.addmm_(x, linear.weight.t())
        following, dependent = self._next, context.dependent
        if following and launch.kernel == "tiled" and launch.halves and following[0].takes_half(x):
            context.half_normed = decode_linear_half_norm(
                x, linear.weight, hidden, following[0].norm_weight, dependent=dependent, launch=launch
            )
            return hidden
        return kernels.decode_linear(x, linear.weight, residual=hidden, dependent=dependent, launch=launch)


class GateUp(nn.Module):
    """Gate and up projection and silu(gate) · up in one kernel, for prefill and decode of many rows."""

    def __init__(self, linear: StackedLinear) -> None:
        super().__init__()
        self._linear = (linear,)

    def launch(self, x: Tensor, context: StepContext) -> Any:
        """How one kernel is the faster way; None where it is not."""
        (linear,) = self._linear
        if as_in_decode(context):
            return best_prefill_gate_up(*shape_of(x.shape[0], linear.weight, True))
        return prefill_launch("prefill_gate_up", x, linear.weight, context)

    def forward(self, normed: Tensor, context: StepContext, launch: Any) -> Tensor:
        """[tokens, inter], in the way that `launch` says."""
        return kernels.prefill_gate_up(normed, self._linear[0].weight, launch, dependent=depends(context))
