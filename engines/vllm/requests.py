"""From our requests to vLLM's: sampling settings, end-of-sequence tokens, and what can never run."""

from __future__ import annotations

from typing import Any

from engines.base import Capacity, EngineConfig, InputError, Request
from engines.vllm import arms, package


def eos_token_ids(config: EngineConfig) -> tuple[int, ...]:
    """The checkpoint's end-of-sequence tokens. vLLM takes them from the tokenizer, which is not loaded here."""
    eos = arms.read_model_config(config).get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


def check(request: Request, capacity: Capacity, vocab_size: int) -> None:
    """InputError if the request can never run. Without a tokenizer vLLM does not look at the token ids itself."""
    prompt, longest = len(request.prompt_token_ids), len(request.prompt_token_ids) + request.sampling.max_tokens
    if not prompt:
        raise InputError(f"Request {request.request_id!r} has an empty prompt.")
    if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < vocab_size:
        raise InputError(f"Request {request.request_id!r} has a token outside the vocabulary of {vocab_size}.")
    for limit, name in ((capacity.max_model_len, "max_model_len"), (capacity.kv_cache_tokens, "the KV cache")):
        if longest > limit:
            raise InputError(
                f"Request {request.request_id!r} needs {longest} tokens ({prompt} prompt and "
                f"{request.sampling.max_tokens} new), but {name} takes {limit}."
            )


def sampling_params(request: Request, eos: tuple[int, ...]) -> Any:
    """vLLM's SamplingParams for a request; text is never made, and outputs come when a request is finished."""
    ours = request.sampling
    kind = package.reach(package.module("vllm.sampling_params"), "RequestOutputKind")
    stops = dict.fromkeys((*ours.stop_token_ids, *(() if ours.ignore_eos else eos)))
    return package.load().SamplingParams(
        temperature=ours.temperature,
        top_k=ours.top_k,
        top_p=ours.top_p,
        max_tokens=ours.max_tokens,
        ignore_eos=ours.ignore_eos,
        stop_token_ids=list(stops),
        seed=ours.seed,
        detokenize=False,
        output_kind=package.reach(kind, "FINAL_ONLY"),
    )


def queue(engine: Any, request: Request, eos: tuple[int, ...], arrival_time: float | None = None) -> str:
    """Queue a request in vLLM and return the id that it uses inside. `arrival_time` is in `time.time()` seconds."""
    prompt = {"type": "token", "prompt_token_ids": list(request.prompt_token_ids)}
    try:
        params = sampling_params(request, eos)
        key = engine.add_request(request.request_id, prompt, params, arrival_time=arrival_time)
    except (ValueError, TypeError) as error:
        reason = package.first_line(error)
        raise InputError(f"vLLM does not take request {request.request_id!r}: {reason}") from None
    if not isinstance(key, str):
        raise InputError(f"vLLM {package.version()} has changed: add_request returns no id; {package.advice()}")
    return key
