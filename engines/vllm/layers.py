"""Names for vLLM's modules in the shared layer vocabulary: the Qwen3, Qwen2 and Llama model classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from engines.base import NO_LAYER, WHOLE_LAYER, InputError, Probe, Site, hook
from engines.vllm import package

LAYER_MODULES = (
    ("input_layernorm", "attention", "input_norm"),  # the residual add is in the norm's kernel
    ("self_attn.qkv_proj", "attention", "qkv_proj"),
    ("self_attn.q_norm", "attention", "qk_norm"),  # Qwen3 only, in two kernels
    ("self_attn.k_norm", "attention", "qk_norm"),
    ("self_attn.rotary_emb", "attention", "rope"),
    ("self_attn.attn", "attention", "kv_write+attention"),  # the module writes the cache, then attends
    ("self_attn.o_proj", "attention", "o_proj"),
    ("post_attention_layernorm", "mlp", "post_norm"),
    ("mlp.gate_up_proj", "mlp", "gate_up_proj"),
    ("mlp.act_fn", "mlp", "silu_mul"),
    ("mlp.down_proj", "mlp", "down_proj"),
)
"""(module of a decoder layer, block, op) in the order in which they run."""
OPTIONAL = {"self_attn.q_norm", "self_attn.k_norm"}


class Alias(nn.Module):
    """Calls `target`, which may be shared by many callers or no module at all, as a module of its own.

    One rotary embedding serves all layers, so a hook on it could not tell them apart; model runner v2's sampler is a
    plain object, which takes no hooks. Anything but a call goes to `target`.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)  # not as a submodule: the model keeps one owner per module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "target")(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "target"), name)


def sites(model: nn.Module) -> Iterator[tuple[Site, nn.Module]]:
    """Every (site, module) of the model, in the order in which they run; all but the sampler.

    Gives each layer an `Alias` of the shared rotary embedding.
    """
    root = package.reach(model, "model")
    yield Site(NO_LAYER, "embed", "embed"), package.reach(root, "embed_tokens")
    for index, layer in enumerate(package.reach(root, "layers")):
        yield Site(index, WHOLE_LAYER, WHOLE_LAYER), layer
        attention = package.reach(layer, "self_attn")
        if not isinstance(package.reach(attention, "rotary_emb"), Alias):
            attention.rotary_emb = Alias(attention.rotary_emb)
        for path, block, op in LAYER_MODULES:
            if path in OPTIONAL and not hasattr(attention, path.split(".")[1]):
                continue
            yield Site(index, block, op), package.reach(layer, path)
    yield Site(NO_LAYER, "head", "final_norm"), package.reach(root, "norm")
    yield Site(NO_LAYER, "head", "lm_head"), package.reach(model, "logits_processor")


def hook_runner(runner: Any, probe: Probe) -> Callable[[], None]:
    """Put `probe` on a model runner's model and sampler; returns what takes it off."""
    modules = list(sites(package.reach(runner, "get_model")()))
    sampler = package.reach(runner, "sampler")
    if sampler is None:
        raise InputError(f"vLLM {package.version()} has no sampler after loading the model; {package.advice()}")
    if not isinstance(sampler, nn.Module):
        sampler = runner.sampler = Alias(sampler)
    return hook([*modules, (Site(NO_LAYER, "sample", "sample"), sampler)], probe)
