"""Checkpoints: a folder with config.json and safetensors files, as Hugging Face writes them, and a model to fill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engines.base import InputError

STACKED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
"""Checkpoint projections that our model keeps as one matrix: name → (our name, which part of it)."""


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint folder, parsed."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint: it has no config.json.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """All tensors of a checkpoint, in one file or many, each as safetensors' slice: indexing it reads just that."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors file.")
    for file in files:
        try:
            with safe_open(file, "pt", "cpu") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    yield name, shard.get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read: {error}.") from None


class Undrawn(TorchFunctionMode):
    """Modules made inside keep their parameters as they were allocated. To draw numbers that a checkpoint then replaces
    takes a CPU longer than to read them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Fill every parameter of `model`, rank `rank`'s share of a model, from `folder`, reading no more than that share.

    InputError names a tensor that is missing or has another shape.
    """
    parameters = dict(model.named_parameters())
    missing = {(name, part) for name in parameters for part in range(_num_parts(name))}
    for name, stored in tensors(folder):
        ours, part = _our_name(name)
        if ours not in parameters:
            if ours == "lm_head.weight":
                continue  # a tied head that was saved all the same
            raise InputError(f"Tensor {name} in {folder} belongs to no parameter of this model.")
        module = model.get_submodule(ours.rpartition(".")[0])
        target = _part(module, parameters[ours], part)
        whole, share = list(target.shape), [slice(None)] * target.dim()
        split = getattr(module, "split_dim", None)  # along which ranks share this module's weights
        if split is not None:
            whole[split] *= ranks
            share[split] = slice(rank * target.shape[split], (rank + 1) * target.shape[split])
        if stored.get_shape() != whole:
            raise InputError(f"Tensor {name} in {folder} has shape {stored.get_shape()}, not {whole}.")
        target.copy_(stored[tuple(share)])
        missing.discard((ours, part))
    if missing:
        names = sorted(_checkpoint_name(name, part) for name, part in missing)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(f"Tensor {names[0]} is missing in {folder}{more}.")


def _our_name(name: str) -> tuple[str, int]:
    *path, module, kind = name.split(".")
    ours, part = STACKED.get(module, (module, 0))
    return ".".join([*path, ours, kind]), part


def _num_parts(ours: str) -> int:
    module = ours.split(".")[-2]
    return max(1, sum(stacked == module for stacked, _ in STACKED.values()))


def _checkpoint_name(ours: str, part: int) -> str:
    *path, module, kind = ours.split(".")
    theirs = {where: name for name, where in STACKED.items()}.get((module, part), module)
    return ".".join([*path, theirs, kind])


def _part(module: nn.Module, parameter: Tensor, part: int) -> Tensor:
    """The part of a stacked parameter that one checkpoint tensor fills."""
    sizes = getattr(module, "part_sizes", None)
    if sizes is None:
        return parameter
    start = sum(sizes[:part])
    return parameter[start : start + sizes[part]]
