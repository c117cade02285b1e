"""One linear layer of a decode step: y = (gamma * x / rms(x)) W^T + bias, for few rows, made to stream W.

    x            [rows, K]      float32, float16 or bfloat16; all tensors share its dtype
    weight       [N, K]         W, as torch.nn.Linear keeps it; gated: the gate's N/2 rows, then up's
    norm_weight  [K]            gamma, optional: without it x goes into the product as it is
    bias         [N]            optional
    residual     [rows, N]      optional: y is added to it in place
    y            [rows, N], or [rows, N/2] with gated: silu(gate) * up

rms(x) = sqrt(mean(x^2) + eps). Sums are kept in float32; a residual sum is rounded once.

Fused: norm before, bias, SiLU * mul or the residual add after. Saved: the normalised rows' write and read
(2 * rows * K elements), gate's and up's (2 * rows * N), with a residual the product's (2 * rows * N).

For few rows W is read once and nothing else is large, so the time is W's bytes over the bandwidth if loads never
pause. Launched dependently, a program asks for its weights before it waits for the kernel before, whose tail and
hand-over then cost nothing. Three kernels:

- vector, for a row or a few (kernels/decode_linear_vector.py): a program holds whole rows of W in registers, so that
  all their bytes are under way before the wait.
- matrix, for 2 to about 64 rows (kernels/decode_linear_matrix.py): the same on tensor cores.
- tiled, for about 8 to 256 rows (kernels/decode_linear_tiled.py): as products of matrices are usually made. A norm
  stands before it, in a kernel of its own or half in the product before (`decode_linear_half_norm`): multiplied into x
  in every program, it costs more than it saves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend
from kernels._fusion import Fusion
from kernels._rows import empty_rows
from kernels._triton import runs_triton
from kernels.decode_linear_launch import Launch, best_launch, default_launch, tiled_launch
from kernels.decode_linear_matrix import run_matrix
from kernels.decode_linear_tiled import HalfNormed, run_tiled
from kernels.decode_linear_vector import run_vector
from kernels.rms_norm import rms_norm
from kernels.rms_norm_linear import rms_norm as rms_norm_wide


def reference(
    x: Tensor | HalfNormed,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    if isinstance(x, HalfNormed):
        dtype = x.rows.dtype
        value = x.rows.float() * torch.rsqrt(x.squares.sum(0) / x.rows.shape[1] + eps)[:, None]
    else:
        dtype = x.dtype
        value = x.float() if norm_weight is None else rms_norm_wide(x, norm_weight, eps)
    y = F.linear(value, weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is None:
        return y.to(dtype)
    return residual.copy_((residual.float() + y).to(dtype))


def half_norm_reference(stream: Tensor, norm_weight: Tensor) -> HalfNormed:
    """`stream` [rows, K] on its way through the norm of `norm_weight`, in plain PyTorch."""
    wide = stream.float()
    return HalfNormed((wide * norm_weight.float()).to(stream.dtype), wide.square().sum(1)[None, :])


def _check(
    x: Tensor | HalfNormed, weight: Tensor, norm_weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    gated: bool,
) -> Tensor:  # fmt: skip
    """The rows themselves."""
    if isinstance(x, HalfNormed):
        check_like("squares", x.squares, (x.squares.shape[0], x.rows.shape[0]), x.rows, torch.float32)
        if norm_weight is not None:
            raise ValueError("rows that are half normed take no other norm_weight.")
        x = x.rows
    check_float("x", x, 2)
    rows, k = x.shape
    if k == 0:
        raise ValueError("x must have at least one column.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    n = weight.shape[0]
    check_like("weight", weight, (n, k), x)
    if gated and n % 2:
        raise ValueError(f"weight must hold as many gate rows as up rows, but it has {n} rows.")
    if norm_weight is not None:
        check_like("norm_weight", norm_weight, (k,), x)
    if bias is not None:
        check_like("bias", bias, (n,), x)
    if residual is not None:
        check_like("residual", residual, (rows, n // 2 if gated else n), x)
    return x


def decode_linear(
    x: Tensor | HalfNormed,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    dependent: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """A decode step's linear layer with what stands before and after it; shapes as in this module's docstring.

    Returns y, or `residual` itself, to which the product was added. `residual` must not share memory with x.
    A half-normed x brings its norm's weight in it; `eps` is wanted still, and the kernel is the tiled one.
    `dependent`: launch dependently where the GPU can (kernels/_dependent.py); results are the same. `launch` overrides
    the measured choice for this GPU and the default. ValueError if the arguments do not fit.
    """
    given = _check(x, weight, norm_weight, bias, residual, gated)
    if not runs_triton(given):
        return reference(x, weight, norm_weight=norm_weight, eps=eps, bias=bias, residual=residual, gated=gated)
    rows, k = given.shape
    out = weight.shape[0] // 2 if gated else weight.shape[0]
    y = empty_rows(rows, out, given) if residual is None else residual
    if rows == 0 or out == 0:
        return y
    shape = (rows, out, k, gated, given.element_size())
    launch = launch or best_launch(*shape, given.device) or default_launch(*shape)
    # In float16 gamma * x may overflow before 1/rms brings it back: matrix cannot put the scale first.
    if launch.kernel == "matrix" and norm_weight is not None and given.dtype == torch.float16:
        launch = tiled_launch(*shape)
    dependent = dependent and can_depend(given.device)
    if launch.kernel == "tiled" or isinstance(x, HalfNormed):
        if norm_weight is not None:
            x = rms_norm(given, norm_weight, eps, dependent=dependent)
        run_tiled(
            x, weight, y, eps=eps, bias=bias, residual=residual is not None, gated=gated, dependent=dependent,
            launch=launch if launch.kernel == "tiled" else tiled_launch(*shape),
        )  # fmt: skip
        return y
    options: dict[str, Any] = {"num_warps": launch.num_warps}
    if dependent:
        options["launch_pdl"] = True
    if launch.registers:
        options["maxnreg"] = launch.registers
    run = run_vector if launch.kernel == "vector" else run_matrix
    run(
        given, norm_weight, weight, bias, y, eps=eps, residual=residual is not None, gated=gated, dependent=dependent,
        launch=launch, options=options,
    )  # fmt: skip
    return y


def decode_linear_half_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    next_norm_weight: Tensor,
    *,
    bias: Tensor | None = None,
    dependent: bool = False,
    launch: Launch | None = None,
) -> HalfNormed:
    """`decode_linear` into the residual stream, which also brings the stream half through the norm that comes next.

    `residual` is changed in place; what is returned is the next product's x. By the tiled kernel. Not in float16, where
    gamma * stream may overflow. ValueError if the arguments do not fit.
    """
    _check(x, weight, None, bias, residual, False)
    check_like("next_norm_weight", next_norm_weight, (weight.shape[0],), x)
    if x.dtype == torch.float16:
        raise ValueError("half a norm takes no float16, in which gamma * stream may overflow.")
    if not runs_triton(x):
        return half_norm_reference(reference(x, weight, bias=bias, residual=residual), next_norm_weight)
    rows, k = x.shape
    shape = (rows, weight.shape[0], k, False, x.element_size())
    launch = launch or best_launch(*shape, x.device)
    left = run_tiled(
        x, weight, residual, eps=0.0, bias=bias, residual=True, gated=False,
        dependent=dependent and can_depend(x.device), next_norm_weight=next_norm_weight,
        launch=launch if launch is not None and launch.kernel == "tiled" else tiled_launch(*shape),
    )  # fmt: skip
    assert left is not None
    return left


def saved_bytes(
    rows: int, k: int, out: int, element_bytes: int, norm: bool = True, gated: bool = False, residual: bool = False
) -> int:
    """Write and read of what stays in registers: the normalised rows, gate and up, the product before its addition."""
    elements = (2 * rows * k if norm else 0) + (4 * rows * out if gated else 0) + (2 * rows * out if residual else 0)
    return elements * element_bytes


FUSION = Fusion(
    "decode_linear",
    ("input_norm+qkv_proj", "o_proj+residual", "post_norm+gate_up_proj+silu_mul", "down_proj+residual"),
    decode_linear,
    reference,
    saved_bytes,
)
