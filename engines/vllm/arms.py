"""The ways in which vLLM is started, and its arguments for each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.base import EngineConfig, InputError
from engines.vllm import package

GIB = 2**30
CPU_CACHE_BYTES = 4 * GIB
"""The most that the cache takes without a GPU, where nothing else is asked."""
CPU_BLOCK = 128
"""vLLM's own cache block without a GPU, in tokens."""
CPU_SMALL_BLOCK = 32
"""The block for a cache of a given size: its CPU attention wants multiples of 32."""
CUDA_BLOCK = 16
"""vLLM's own cache block on CUDA, in tokens."""
OPTIONS = ("arm", "serve_arm", "engine_args")


@dataclass(frozen=True)
class Arm:
    """One variant of the engine. `mode` is how its decode steps run, `arguments` go to vLLM's EngineArgs.

    An arm without `steps` only serves: it schedules a step while the one before runs, in its own process or in ours.
    """

    name: str
    mode: Literal["eager", "graph", "compiled"]
    own_process: bool = False
    steps: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)


# One engine step is one scheduler step only without asynchronous scheduling.
_STEPPED: dict[str, Any] = {"async_scheduling": False}
ARMS = {
    arm.name: arm
    for arm in (
        Arm("inproc", "compiled", arguments=_STEPPED),
        # No answer crosses a process border and the host works behind the GPU: the least time per token of them all.
        Arm("inproc_async", "compiled", steps=False, arguments={"async_scheduling": True}),
        Arm("default", "compiled", own_process=True, steps=False),
        Arm("eager", "eager", arguments={**_STEPPED, "enforce_eager": True}),
        Arm(
            "python_graph",
            "graph",
            arguments={**_STEPPED, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
        ),
    )
}


def choose(options: Mapping[str, Any]) -> tuple[Arm, Arm]:
    """The arms for steps and for serving that the engine's options ask for."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise InputError(f"engine=vllm has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}.")
    chosen = []
    for key, fallback in (("arm", "inproc"), ("serve_arm", "default")):
        name = options.get(key) or fallback
        if name not in ARMS:
            raise InputError(f"engine=vllm has no {key} {name!r}; it has {', '.join(ARMS)}.")
        chosen.append(ARMS[name])
    if not chosen[0].steps:
        stepped = ", ".join(arm.name for arm in ARMS.values() if arm.steps)
        raise InputError(
            f"The vLLM arm {chosen[0].name!r} schedules ahead, so its steps cannot be told apart: "
            f"use it as serve_arm, and one of {stepped} as arm."
        )
    return chosen[0], chosen[1]


def engine_args(config: EngineConfig, arm: Arm) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs for `config` in `arm`."""
    arguments: dict[str, Any] = {
        "model": str(config.checkpoint),
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.prefix_caching,
        "disable_log_stats": True,  # statistics cost each step host time; with them its request metrics are compared
        "generation_config": "vllm",  # not the checkpoint's sampling defaults
        "use_tqdm_on_load": False,
    }
    arguments.update(_cache_args(config))
    arguments.update(arm.arguments)
    given = dict(config.options.get("engine_args") or {})
    known = {f.name for f in dataclasses.fields(package.reach(package.load(), "EngineArgs"))}
    for name in arguments:
        if name not in known:
            raise InputError(f"vLLM {package.version()} has no engine argument {name!r} any more; {package.advice()}")
    for name in given:
        if name not in known:
            raise InputError(f"vLLM {package.version()} has no engine argument {name!r} (option engine_args).")
    return {**arguments, **given}


def _cache_args(config: EngineConfig) -> dict[str, Any]:
    on_cpu = config.device == "cpu"
    if config.kv_cache_tokens is None:
        if not on_cpu:
            return {}
        blocks = config.max_num_seqs * -(-config.max_model_len // CPU_BLOCK) + 1  # one is vLLM's null block
        block_bytes = CPU_BLOCK * cache_token_bytes(config)
        return {"kv_cache_memory_bytes": min(blocks * block_bytes, CPU_CACHE_BYTES)}
    block = CPU_SMALL_BLOCK if on_cpu else CUDA_BLOCK
    blocks = -(-config.kv_cache_tokens // block) + 1
    arguments: dict[str, Any] = {"block_size": block, "num_gpu_blocks_override": blocks}
    # Otherwise it asks for gpu_memory_utilization first, and on CUDA wants nobody else's memory to change meanwhile.
    arguments["kv_cache_memory_bytes"] = blocks * block * cache_token_bytes(config)
    return arguments


def cache_token_bytes(config: EngineConfig) -> int:
    """Bytes of one token's keys and values over all layers."""
    shape = read_model_config(config)
    try:
        heads = int(shape["num_attention_heads"])
        kv_heads = int(shape.get("num_key_value_heads") or heads)
        head_dim = int(shape.get("head_dim") or shape["hidden_size"] // heads)
        layers = int(shape["num_hidden_layers"])
    except KeyError as error:
        raise InputError(f"The checkpoint's config.json in {config.checkpoint} has no {error}.") from None
    return 2 * layers * kv_heads * head_dim * (4 if config.dtype == "float32" else 2)


def read_model_config(config: EngineConfig) -> dict[str, Any]:
    """The checkpoint's config.json."""
    path = config.checkpoint / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"The checkpoint has no readable config.json: {path} ({package.first_line(error)}).") from None
