"""Functions that do a product, made from the names in `conf/op`: the harness knows none of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib import metadata
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.base import InputError
from harness.ops.products import Product, Vectors
from harness.ops.settings import OpConf, VariantConf

Call = Callable[[Tensor, Tensor], Tensor]
"""y of x and W."""
MOST_COMPILED = 64
"""Numbers of rows that a product may be compiled for."""


def named(path: str) -> Any:
    """What a dotted path names. InputError: it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # packages for GPUs fail in many ways where there is none
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error


class Variant:
    """One way to do a product. InputError: it cannot be had on this machine, with the reason."""

    def __init__(self, name: str, conf: VariantConf, op: OpConf, device: str) -> None:
        self.name = name
        self.conf = conf
        self.version = _version(conf.package) if conf.package else ""
        if conf.needs and not named(conf.needs)(torch.device(device)):
            raise InputError(f"{conf.needs} says that this device cannot.")
        self._fusions: Mapping[str, Any] = named(op.fusions) if conf.fused else {}
        self._norm: Any = None if conf.fused else named(conf.norm)

    def takes(self, rows: int) -> bool:
        return self.conf.max_rows is None or rows <= self.conf.max_rows

    def call(self, product: Product, vectors: Vectors) -> Call:
        """The function for one product, for any number of rows."""
        made = self._fused(product, vectors) if self.conf.fused else self._unfused(product, vectors)
        if not self.conf.compile:
            return made
        # Each number of rows by itself, as the kernels beside it are chosen: what is compiled for any number keeps the
        # launch that suited the first. A whole graph, or an error: beyond its limit the compiler gives up silently.
        limit: Any = torch._dynamo.config
        limit.recompile_limit = max(limit.recompile_limit, MOST_COMPILED)
        return torch.compile(_alone(made), fullgraph=True, dynamic=False)

    def saved_bytes(self, product: Product, rows: int, element_bytes: int) -> int:
        """Bytes of intermediate tensors that are neither written nor read, as the kernel itself says; 0 if unfused."""
        if not self.conf.fused:
            return 0
        shapes = {"rows": rows, "hidden": product.k, "k": product.k, "out": product.out, "inter": product.out,
                  "element_bytes": element_bytes, "gated": product.gated}  # fmt: skip
        function = self._fusion(product).saved_bytes
        return function(**_taken(function, shapes))

    def _fusion(self, product: Product) -> Any:
        return self._fusions[self.conf.gated if product.gated else self.conf.linear]

    def _fused(self, product: Product, vectors: Vectors) -> Call:
        function = self._fusion(product).function
        fixed = {"norm_weight": vectors.norm_weight, "eps": product.eps, "gated": product.gated}
        if product.bias:
            fixed["bias"] = vectors.bias
        keywords = _taken(function, fixed) | self.conf.options
        return lambda x, weight: function(x=x, weight=weight, **keywords)

    def _unfused(self, product: Product, vectors: Vectors) -> Call:
        norm = self._norm(product.k, eps=product.eps).to(vectors.norm_weight)
        norm.weight.data.copy_(vectors.norm_weight)
        bias = vectors.bias
        if not product.gated:
            return lambda x, weight: F.linear(norm(x), weight, bias)
        if self.conf.swiglu:
            swiglu = named(self.conf.swiglu)

            def apart(x: Tensor, weight: Tensor) -> Tensor:
                normed = norm(x)
                return swiglu(F.linear(normed, weight[: product.out]), F.linear(normed, weight[product.out :]))

            return apart
        silu_mul = named(self.conf.silu_mul)() if self.conf.silu_mul else _silu_mul
        return lambda x, weight: silu_mul(F.linear(norm(x), weight))


def _alone(function: Call) -> Call:
    """The same function with code of its own: the compiler's limit is for one code, which other products share."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _silu_mul(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _taken(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that `function` has a parameter for."""
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise InputError(f"{package} is not installed.") from None
