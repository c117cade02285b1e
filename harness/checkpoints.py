"""Random checkpoints: real Hugging Face folders of seeded noise, for machines that cannot get the published weights.

Every engine loads the same folder, so their outputs can be compared. Each tensor has a generator of its own, seeded
from (seed, tensor name), so its values do not depend on the order of writing. Linear weights are normal(0, 0.02);
norm weights are 1 plus noise, so that an engine which forgets one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from engines.base import InputError
from harness.config import ModelConf

FORMAT_VERSION = 1
"""Part of a cached checkpoint's name; raise it when the same model and seed give other bytes."""
WEIGHT_STD = 0.02  # the initializer_range of all three architectures
NORM_STD = 0.05
BYTES_PER_VALUE = 2  # bfloat16
SHARD_BYTES = 4_000_000_000
WRITER_THREADS = 4  # torch releases the interpreter while it fills a tensor

CLASS_NAMES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def cache_dir() -> Path:
    """Where random checkpoints are kept: $HARNESS_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("HARNESS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fused-norm-linear"


def hf_config(model: ModelConf) -> dict[str, Any]:
    """`config.json` in the form in which hub repositories publish it, which transformers and vLLM both read."""
    config: dict[str, Any] = {
        "architectures": [CLASS_NAMES[model.architecture]],
        "model_type": model.architecture,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": model.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_scaling": model.rope_scaling,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    if model.architecture != "qwen2" or model.head_dim * model.num_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    if model.architecture in ("qwen3", "llama"):
        config["attention_bias"] = False
    if model.architecture == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"sliding_window": None, "use_sliding_window": False, "max_window_layers": model.num_layers}
    return config


def tensor_shapes(model: ModelConf) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint, in the order of the layers."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    for index in range(model.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            if model.architecture == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        if model.architecture == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (model.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (model.head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "lm_head.weight", (model.vocab_size, hidden)


def checkpoint_bytes(model: ModelConf) -> int:
    """Size of the tensors of a bfloat16 checkpoint."""
    return sum(BYTES_PER_VALUE * torch.Size(shape).numel() for _, shape in tensor_shapes(model))


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The tensor `name` [shape], bfloat16, of the random checkpoint with `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.randn(shape, generator=generator, dtype=torch.float32)
    is_norm = "norm" in name.rsplit(".", 2)[-2]
    return (values.mul_(NORM_STD).add_(1.0) if is_norm else values.mul_(WEIGHT_STD)).to(torch.bfloat16)


def folder_name(model: ModelConf, seed: int) -> str:
    """The cache folder of `model` and `seed`: readable, and unique to what decides its bytes."""
    parts = {key: value for key, value in asdict(model).items() if key not in ("name", "hub_id")}
    text = json.dumps([FORMAT_VERSION, seed, parts], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{model.architecture}-{model.hidden_size}x{model.num_layers}-seed{seed}-{digest}"


def random_checkpoint(model: ModelConf, seed: int, progress: Callable[[int], None] = lambda _bytes: None) -> Path:
    """The folder of `model`'s random checkpoint, written now unless it is cached.

    `progress` is told the bytes of each tensor made. Processes that want the same one wait for the first. InputError if
    the cache cannot be written.
    """
    cache = cache_dir()
    folder = cache / folder_name(model, seed)
    partial = cache / f".partial-{folder.name}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{folder.name}.lock"):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # left by a writer that was killed
                partial.mkdir()
                try:
                    write_checkpoint(model, seed, partial, progress)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        gigabytes = checkpoint_bytes(model) / 1e9
        reason = error.strerror or str(error)
        raise InputError(
            f"Cannot write the random checkpoint ({gigabytes:.1f} GB) to {cache}: {reason}; "
            "set HARNESS_CACHE to a folder that has room."
        ) from error
    return folder


def write_checkpoint(
    model: ModelConf, seed: int, folder: Path, progress: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Write `config.json` and safetensors, in shards of at most SHARD_BYTES, into the existing `folder`."""
    (folder / "config.json").write_text(json.dumps(hf_config(model), indent=2) + "\n")
    shards = _shards(model)
    names: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(_make_tensors(shard, seed, progress), folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it private to the user
        names |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": checkpoint_bytes(model)}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")


def _shards(model: ModelConf) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensor_shapes(model):
        count = BYTES_PER_VALUE * torch.Size(shape).numel()
        if size + count > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    return shards


def _make_tensors(shapes: dict[str, tuple[int, ...]], seed: int, progress: Callable[[int], None]) -> dict[str, Tensor]:
    def make(item: tuple[str, tuple[int, ...]]) -> Tensor:
        tensor = random_tensor(*item, seed)
        progress(tensor.numel() * BYTES_PER_VALUE)
        return tensor

    with ThreadPoolExecutor(WRITER_THREADS) as pool:
        return dict(zip(shapes, pool.map(make, shapes.items()), strict=True))
