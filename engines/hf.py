"""transformers behind the engine protocol: the reference that the others are checked against, never a contestant.

Slow on purpose and as plain as it can be: one sequence at a time through the model as transformers wrote it, each with
a growing cache of its own, no padding, no graphs. A step still means what it means elsewhere: while requests wait, it
computes whole prompts; otherwise it computes one token of every running sequence.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from engines.arrivals import Arrivals
from engines.base import (
    NO_LAYER,
    WHOLE_LAYER,
    Capacity,
    EngineConfig,
    HostPhases,
    InputError,
    Probe,
    Request,
    RequestResult,
    SamplingParams,
    Scheduled,
    Scored,
    Site,
    Step,
    StepKind,
    TraceMode,
    TraceUnsupported,
    hook,
)

_LAYER_SITES = (
    ("input_layernorm", "attention", "input_norm"),
    ("self_attn.q_proj", "attention", "qkv_proj"),
    ("self_attn.k_proj", "attention", "qkv_proj"),
    ("self_attn.v_proj", "attention", "qkv_proj"),
    ("self_attn.q_norm", "attention", "qk_norm"),
    ("self_attn.k_norm", "attention", "qk_norm"),
    ("self_attn.o_proj", "attention", "o_proj"),
    ("post_attention_layernorm", "mlp", "post_norm"),
    ("mlp.gate_proj", "mlp", "gate_up_proj"),
    ("mlp.up_proj", "mlp", "gate_up_proj"),
    ("mlp.down_proj", "mlp", "down_proj"),
)
"""Path below a decoder layer, block, op. Rotation, attention itself and SiLU·mul are functions there, not modules, so
they have no interval of their own; the whole layer's has them."""


def load_model(checkpoint: Path, dtype: torch.dtype, device: str) -> nn.Module:
    """The checkpoint's model in eval mode. InputError: it cannot be read, or a tensor is missing or misshapen."""
    progress = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    loader: Any = AutoModelForCausalLM  # its annotations leave output_loading_info out
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would warn about is an InputError below
    try:
        model, info = loader.from_pretrained(
            str(checkpoint), dtype=dtype, attn_implementation="sdpa", local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{checkpoint} holds a damaged safetensors file: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
    if info["missing_keys"]:
        raise InputError(f"{checkpoint} lacks the tensor {_some(info['missing_keys'])}.")
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise InputError(f"{checkpoint}: {name} has shape {list(found)}, the model needs {list(expected)}.")
    return model.to(device).eval()


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} (and {len(rest)} more)" if rest else first


def teacher_forced_logits(
    checkpoint: Path, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Logits of the positions that produce each continuation, given all tokens before them.

    `sequences` holds (prompt, continuation) token ids; the result has one float32 CPU tensor [continuation, vocab] per
    sequence. The model is loaded in `dtype` on `device` and freed before this returns. float32 means float32: TF32 is
    off, whatever an engine set.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = None
    try:
        model = load_model(checkpoint, dtype, device)
        return [_last_logits(model, [*prompt, *tokens], len(tokens)) for prompt, tokens in sequences]
    finally:
        del model
        _release(device)
        torch.set_float32_matmul_precision(precision)


@torch.inference_mode()
def _last_logits(model: nn.Module, token_ids: list[int], count: int) -> Tensor:
    # The last token is fed to nothing: its logits would be those of the token after the continuation.
    ids = torch.tensor([token_ids[:-1]], device=next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0].float().cpu()


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _Sequence:
    request: Request
    generator: torch.Generator | None
    cache: DynamicCache = field(default_factory=DynamicCache)
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def next_input(self) -> tuple[int, ...]:
        return (self.tokens[-1],) if self.tokens else self.request.prompt_token_ids


class _RowsProbe:
    """Tells a probe the step's rows: transformers' tensors carry a batch axis of 1 before the tokens."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.rows = 0

    def wants(self, site: Site) -> bool:
        return self.probe.wants(site)

    def begin(self, site: Site, rows: int) -> None:
        self.probe.begin(site, self.rows)

    def end(self, site: Site) -> None:
        self.probe.end(site)


class HF:
    """The reference engine; see `engines.base.Engine` for what each method does."""

    name = "hf"
    launches_ahead = False
    arm = "default"
    mode: Literal["eager", "graph", "compiled"] = "eager"

    def __init__(self, config: EngineConfig) -> None:
        self.check_options(config.options)
        self.config = config
        self.model: nn.Module | None = load_model(config.checkpoint, getattr(torch, config.dtype), config.device)
        text_config: Any = self.model.config
        if config.max_model_len > text_config.max_position_embeddings:
            raise InputError(
                f"max_model_len {config.max_model_len} is more than the model's {text_config.max_position_embeddings} "
                f"positions."
            )
        eos = text_config.eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        self._sampler = Sampler()
        self._generator = torch.Generator(config.device).manual_seed(config.seed)
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._last = Step("decode", ())
        self._keep_logits = False
        self._probe: _RowsProbe | None = None
        self._unhook: Callable[[], None] | None = None
        self.capacity = Capacity(
            config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens,
            kv_cache_tokens=config.kv_cache_tokens or config.max_num_seqs * config.max_model_len,
        )  # fmt: skip
        self.notes: dict[str, Any] = {"attention": "sdpa, one sequence at a time", "graphs": "none"}

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        if options:
            raise InputError(f"engine hf has no option {_some(options)}.")

    def add(self, request: Request) -> None:
        """Queue a request. Output is cut where the model's length ends; a prompt that fills it is refused."""
        prompt = len(request.prompt_token_ids)
        room = min(self.capacity.max_model_len, self.capacity.kv_cache_tokens) - prompt
        if not prompt:
            raise InputError(f"Request {request.request_id} has an empty prompt.")
        if room < 1:
            raise InputError(
                f"Request {request.request_id} has a prompt of {prompt} tokens; the longest that fits, with one token "
                f"of output, is {prompt + room - 1}."
            )
        if request.sampling.max_tokens > room:
            request = replace(request, sampling=replace(request.sampling, max_tokens=room))
        seed = request.sampling.seed
        generator = None if seed is None else torch.Generator(self.config.device).manual_seed(seed)
        self._waiting.append(_Sequence(request, generator))

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def last_step(self) -> Step:
        """What the last `advance` was."""
        return self._last

    def advance(self) -> None:
        """One step."""
        self._advance()

    def _advance(self) -> list[tuple[_Sequence, str]]:
        """One step; returns the sequences that it finished, with their reasons."""
        prompts = self._admit()
        kind: StepKind = "prefill" if prompts else "decode"
        scheduled, produced, done = [], [], []
        for sequence in prompts or list(self._running):
            request_id, context_len = sequence.request.request_id, sequence.cached
            new_ids = sequence.next_input()
            token = self._forward(sequence, new_ids)
            scheduled.append(Scheduled(request_id, len(new_ids), context_len))
            produced.append((request_id, token))
            reason = self._finish_reason(sequence, token)
            if reason:
                self._running.remove(sequence)
                done.append((sequence, reason))
        finished = tuple(sequence.request.request_id for sequence, _ in done)
        self._last = Step(kind, tuple(scheduled), tuple(produced), finished)
        return done

    def _admit(self) -> list[_Sequence]:
        """Move whole prompts from waiting to running, at least one if there is room for a sequence."""
        prompts: list[_Sequence] = []
        tokens = 0
        while self._waiting and len(self._running) < self.capacity.max_num_seqs:
            tokens += len(self._waiting[0].request.prompt_token_ids)
            if prompts and tokens > self.capacity.max_num_batched_tokens:
                break
            prompts.append(self._waiting.pop(0))
            self._running.append(prompts[-1])
        return prompts

    @torch.inference_mode()
    def _forward(self, sequence: _Sequence, new_ids: tuple[int, ...]) -> int:
        """Feed `new_ids` on top of the sequence's cache; returns the token that follows."""
        if self.model is None:
            raise RuntimeError("this engine is closed")
        if self._probe is not None:
            self._probe.rows = len(new_ids)
        ids = torch.tensor([new_ids], device=self.config.device)
        out = self.model(input_ids=ids, past_key_values=sequence.cache, use_cache=True, logits_to_keep=1)
        sequence.cached += len(new_ids)
        logits = out.logits[0, -1].float()
        token = self._sampler(logits, sequence.request.sampling, sequence.generator or self._generator)
        sequence.tokens.append(token)
        sequence.times_s.append(time.perf_counter())
        if self._keep_logits:
            sequence.logits.append(logits.cpu())
        return token

    def _finish_reason(self, sequence: _Sequence, token: int) -> str:
        sampling = sequence.request.sampling
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return "stop"
        return "length" if len(sequence.tokens) >= sampling.max_tokens else ""

    def abort(self, request_ids: Iterable[str]) -> None:
        dropped = set(request_ids)
        self._waiting = [s for s in self._waiting if s.request.request_id not in dropped]
        self._running = [s for s in self._running if s.request.request_id not in dropped]

    def serve(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[RequestResult], None] | None = None,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[RequestResult]:
        requests = list(requests)
        results: dict[str, RequestResult] = {}
        arrivals = Arrivals(requests, arrivals_s)
        try:
            for sequence, reason in self._run(arrivals):
                request = sequence.request
                result = RequestResult(
                    request.request_id, len(request.prompt_token_ids), tuple(sequence.tokens),
                    arrivals.due_s(request.request_id), tuple(sequence.times_s), reason,
                )  # fmt: skip
                results[request.request_id] = result
                if on_finish:
                    on_finish(result)
        except BaseException:  # what stays queued would run with the next call
            self.abort(request.request_id for request in requests)
            raise
        return [results[request.request_id] for request in requests]

    def score(self, requests: Iterable[Request]) -> list[Scored]:
        requests = [replace(r, sampling=replace(r.sampling, temperature=0.0)) for r in requests]
        self._keep_logits = True
        try:
            done = {sequence.request.request_id: sequence for sequence, _ in self._run(Arrivals(requests))}
        except BaseException:
            self.abort(request.request_id for request in requests)
            raise
        finally:
            self._keep_logits = False
        ordered = [done[r.request_id] for r in requests]
        return [Scored(s.request.prompt_token_ids, tuple(s.tokens), torch.stack(s.logits)) for s in ordered]

    def _run(self, arrivals: Arrivals) -> Iterable[tuple[_Sequence, str]]:
        """Add requests as they arrive and step to the end, yielding sequences as they finish."""
        while True:
            for request in arrivals.take():
                self.add(request)
            if self.has_unfinished():
                yield from self._advance()
            elif not arrivals.wait():
                return

    def host_phases(self) -> HostPhases:
        return {}

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        if mode == "graph":
            raise TraceUnsupported("engine hf runs without CUDA graphs.")
        if self.model is None:
            raise RuntimeError("this engine is closed")
        self.detach()
        self._probe = _RowsProbe(probe)
        self._unhook = hook([*_sites(self.model), (Site(NO_LAYER, "sample", "sample"), self._sampler)], self._probe)

    def detach(self) -> None:
        if self._unhook is not None:
            self._unhook()
        self._unhook = self._probe = None

    def close(self) -> None:
        self.detach()
        self._waiting, self._running, self.model = [], [], None
        _release(self.config.device)


def _sites(model: nn.Module) -> Iterable[tuple[Site, nn.Module]]:
    """What can be timed in transformers' Qwen3, Qwen2 and Llama, which share their module names."""
    yield Site(NO_LAYER, "embed", "embed"), model.get_submodule("model.embed_tokens")
    for index, layer in enumerate(model.get_submodule("model.layers").children()):
        yield Site(index, WHOLE_LAYER, WHOLE_LAYER), layer
        modules = dict(layer.named_modules())
        for path, block, op in _LAYER_SITES:
            if path in modules:  # only Qwen3 has QK norms
                yield Site(index, block, op), modules[path]
    yield Site(NO_LAYER, "head", "final_norm"), model.get_submodule("model.norm")
    yield Site(NO_LAYER, "head", "lm_head"), model.get_submodule("lm_head")


class Sampler(nn.Module):
    """Draws one token; a module so that it can be timed like the others."""

    def forward(self, logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
        """One token from float32 `logits` [vocab]: greedy at temperature 0, else from the top-k, then top-p, tokens."""
        if sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits / sampling.temperature
        if sampling.top_k > 0:
            kth = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probs = logits.softmax(-1)
        if sampling.top_p < 1:
            ordered, index = probs.sort(descending=True)
            # Keep the smallest set that reaches top_p: a token stays while those before it have not reached it yet.
            ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
            probs = torch.zeros_like(probs).scatter_(0, index, ordered)
        return int(torch.multinomial(probs, 1, generator=generator))
