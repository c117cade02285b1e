"""The products of a model's layers that follow a norm, with random data for them, and what they must cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config import ModelConf
from harness.roofline.costs import Cost, Shapes

QKV, GATE_UP = "input_norm+qkv_proj", "post_norm+gate_up_proj+silu_mul"


@dataclass(frozen=True)
class Product:
    """y [rows, out] = norm(x [rows, k]) W^T, with `gated` silu(gate) · up of twice as many columns.

    `models` have it; those with the same matrix share it.
    """

    op: str
    k: int
    out: int
    gated: bool
    bias: bool
    eps: float
    models: tuple[str, ...]

    @property
    def weight_rows(self) -> int:
        return self.out * 2 if self.gated else self.out

    def shape(self, rows: int) -> str:
        """Rows, then W's rows and columns."""
        return f"{rows} x {self.weight_rows} x {self.k}"

    def cost(self, rows: int, element_bytes: int) -> Cost:
        """Each input read once and each output written once, as one kernel could do it."""
        vectors = self.k + (self.weight_rows if self.bias else 0)
        weight = (self.weight_rows * self.k + vectors) * element_bytes
        activations = rows * (self.k + self.out) * element_bytes
        return Cost(weight, 0, activations, 2 * rows * self.weight_rows * self.k)

    def __str__(self) -> str:
        return f"{self.op}, {self.weight_rows} x {self.k} ({', '.join(self.models)})"


def products(models: Sequence[ModelConf]) -> list[Product]:
    """qkv, and gate and up, of each model; each matrix once."""
    found: dict[tuple[str, int, int, bool], Product] = {}
    for model in models:
        matrices = Shapes.of(asdict(model)).matrices
        for op, matrix in ((QKV, "qkv_proj"), (GATE_UP, "gate_up_proj")):
            weight_rows, k = matrices[matrix]
            gated = op == GATE_UP
            bias = model.architecture == "qwen2" and not gated
            key = (op, weight_rows, k, bias)
            named = (*found[key].models, model.name) if key in found else (model.name,)
            out = weight_rows // 2 if gated else weight_rows
            found[key] = Product(op, k, out, gated, bias, model.rms_norm_eps, named)
    return list(found.values())


@dataclass(frozen=True)
class Vectors:
    """What all calls of a product share: gamma [k], and the bias [weight rows] where it has one."""

    norm_weight: Tensor
    bias: Tensor | None

    @classmethod
    def random(cls, product: Product, dtype: torch.dtype, device: str, seed: int) -> Vectors:
        """Gamma between 0.5 and 1.5."""
        generator = torch.Generator(device).manual_seed(seed)
        gamma = torch.rand(product.k, generator=generator, device=device).add_(0.5)
        bias = torch.randn(product.weight_rows, generator=generator, device=device) if product.bias else None
        return cls(gamma.to(dtype), None if bias is None else bias.to(dtype))


@dataclass(frozen=True)
class Operands:
    """`rotations` of random x and W, so that the cache holds none of them when its turn comes."""

    x: list[Tensor]
    weights: list[Tensor]

    @property
    def rotations(self) -> int:
        return len(self.x)

    @classmethod
    def random(
        cls, product: Product, rows: int, rotations: int, dtype: torch.dtype, device: str, seed: int
    ) -> Operands:
        """With outputs of about 1."""
        generator = torch.Generator(device).manual_seed(seed + 1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        x = [randn(rows, product.k) for _ in range(rotations)]
        return cls(x, [randn(product.weight_rows, product.k, scale=product.k**-0.5) for _ in range(rotations)])


def expected(product: Product, x: Tensor, weight: Tensor, vectors: Vectors) -> Tensor:
    """y in float32 throughout."""
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + product.eps) * vectors.norm_weight.float()
    y = F.linear(normed, weight.float(), None if vectors.bias is None else vectors.bias.float())
    if not product.gated:
        return y
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def relative_error(out: Tensor, right: Tensor) -> float:
    """Norm of the error over norm of what is right; NaN where `out` holds one."""
    return float((out.float() - right).norm() / right.norm())
