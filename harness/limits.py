"""What an engine is asked to hold, worked out from the workload, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from engines.base import Capacity, EngineConfig, InputError, Request
from harness import serving, workloads
from harness.config import Config
from harness.serving import Load
from harness.workloads import Call, Shape

_SPARE_LEN = 256
"""Room for the prompts of the verification, where the workload alone would ask for less."""
_SERVED_AT_ONCE = 256
"""Sequences at once for requests that arrive over time, unless the config says otherwise; the rest waits."""


@dataclass(frozen=True, slots=True)
class Work:
    """All that a run will do: shapes to time and to trace, requests to serve, generate calls to time, loads."""

    shapes: list[Shape]
    requests: list[Request] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    @property
    def served(self) -> list[Request]:
        """The requests that the engine must hold; those of one load, since all loads have the same lengths."""
        return self.requests or (self.loads[0].requests if self.loads else [])

    @staticmethod
    def of(config: Config, device: str) -> Work:
        """What `config` asks for on `device`."""
        if config.workload.kind == "steps":
            return Work(workloads.shapes(config.workload, device))
        if config.workload.kind == "serving":
            return Work([], loads=serving.loads(config.workload, device, config.model.vocab_size, config.seed))
        if config.workload.kind == "generate":
            served = workloads.requests(config.workload, device, config.model.vocab_size, config.seed)
            return Work([], served, workloads.calls(config.workload, device))
        typical = workloads.trace_shapes(config.workload, device, config.limits.max_num_batched_tokens)
        return Work(typical, workloads.requests(config.workload, device, config.model.vocab_size, config.seed))


def device_of(wanted: str) -> str:
    """cuda or cpu, `wanted` or for `auto` what there is. InputError: a GPU was asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise InputError("device=cuda needs a GPU that torch can use, and there is none; device=auto takes the CPU.")
    return "cuda" if available and wanted != "cpu" else "cpu"


def dtype_of(config: Config, device: str) -> str:
    """bfloat16 on a GPU and float32 without, unless the config says otherwise."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device == "cpu" else "bfloat16"


def engine_config(config: Config, work: Work, checkpoint: Path, device: str) -> EngineConfig:
    """Limits from the config, or else from the work. InputError: work that the model or the limits cannot hold."""
    limits, model = config.limits, config.model
    budget = limits.max_num_batched_tokens
    sizes = [(f"The {s}", s.length(budget), s.batch_size) for s in work.shapes]
    sizes += [(f"The call of {c}", c.prompt_len + c.output_len, c.batch_size) for c in work.calls]
    sizes += [(f"Request {r.request_id} of the workload", request_len(r), 1) for r in work.served]
    longest = max(length for _, length, _ in sizes)
    max_model_len = limits.max_model_len or max(longest, min(_SPARE_LEN, model.max_position_embeddings))
    widest = max(max(batch for _, _, batch in sizes), len(work.requests), min(len(work.served), _SERVED_AT_ONCE))
    max_num_seqs = limits.max_num_seqs or widest
    for name, length, batch in sizes:
        if length > model.max_position_embeddings:
            raise InputError(
                f"{name} needs {length} positions (prompt and output), and {model.name} has "
                f"{model.max_position_embeddings}."
            )
        if length > max_model_len:
            raise InputError(f"{name} needs {length} positions, and limits.max_model_len is {max_model_len}.")
        if batch > max_num_seqs:
            raise InputError(f"{name} needs {batch} sequences at once, and limits.max_num_seqs is {max_num_seqs}.")
    return EngineConfig(
        checkpoint=checkpoint,
        dtype=dtype_of(config, device),
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        gpu_memory_utilization=limits.gpu_memory_utilization,
        kv_cache_tokens=limits.kv_cache_tokens,
        seed=config.seed,
        options=config.engine.options,
    )


def request_len(request: Request) -> int:
    """Longest that the request gets."""
    return len(request.prompt_token_ids) + request.sampling.max_tokens


def too_large(shape: Shape, capacity: Capacity) -> str:
    """Why the started engine cannot hold `shape`, "" if it can."""
    length = shape.length(capacity.max_num_batched_tokens)
    tokens = shape.batch_size * length
    if shape.batch_size > capacity.max_num_seqs:
        return f"The {shape} needs {shape.batch_size} sequences at once, and the engine takes {capacity.max_num_seqs}."
    if length > capacity.max_model_len:
        return f"The {shape} needs {length} positions, and the engine takes {capacity.max_model_len}."
    if tokens > capacity.kv_cache_tokens:
        return f"The {shape} needs a cache of {tokens} tokens, and the engine's holds {capacity.kv_cache_tokens}."
    return ""


def check_capacity(work: Work, capacity: Capacity) -> None:
    """InputError: the first request, or where there is none the first shape, that the started engine cannot hold."""
    for shape in () if work.served else work.shapes:
        if reason := too_large(shape, capacity):
            raise InputError(reason)
    for request in work.served:
        if request_len(request) > min(capacity.max_model_len, capacity.kv_cache_tokens):
            raise InputError(
                f"Request {request.request_id} of the workload needs a cache of {request_len(request)} tokens, and the "
                f"engine holds {min(capacity.max_model_len, capacity.kv_cache_tokens)}."
            )
