"""`NanoVLLM`: upstream nano-vLLM as an engine, so that nano can be measured beside what it comes from.

Its own `step` runs every step. Around it: token ids go in (a tokenizer is not needed), and what its scheduler decided
is read from the sequences. It has no greedy sampling; `score` divides by a temperature so small that the largest logit
always wins.
"""

from __future__ import annotations

import atexit
import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch

from engines.arrivals import Arrivals
from engines.base import (
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
    Step,
    TraceMode,
    TraceUnsupported,
)
from engines.nano_vllm import flash_attention

NEARLY_ZERO = 1e-6
"""Temperature for greedy tokens: logits a bfloat16 step apart differ by thousands after the division."""
OPTIONS = ("attention", "enforce_eager", "kvcache_block_size")


class NanoVLLM:
    """nano-vLLM's `LLM` as an engine of this project.

    Options: `attention` (auto, flash_attn or flash_attn_3), `enforce_eager`, `kvcache_block_size`.
    """

    name = "nano_vllm"
    launches_ahead = False
    arm = "default"

    def __init__(self, config: EngineConfig) -> None:
        self.check_options(config.options)
        if config.device != "cuda" or not torch.cuda.is_available():
            raise InputError("nano-vLLM runs on CUDA only.")
        if config.kv_cache_tokens is not None:
            raise InputError(
                "nano-vLLM sizes its cache by limits.gpu_memory_utilization; kv_cache_tokens cannot be set."
            )
        shape = json.loads((config.checkpoint / "config.json").read_text())
        stored = shape.get("dtype") or shape.get("torch_dtype")
        if stored != config.dtype:
            raise InputError(f"nano-vLLM runs a checkpoint in its own dtype, {stored}, not in {config.dtype}.")
        self._vocab_size = int(shape["vocab_size"])
        self.mode: Literal["eager", "graph", "compiled"] = "eager" if config.options.get("enforce_eager") else "graph"
        attention = flash_attention.choose(config.options.get("attention", "auto"))
        self._engine = _start(config, int(shape.get("eos_token_id") or -1), attention)
        scheduler = self._engine.scheduler
        self._scheduled: list[Any] = []
        self._sizes: list[tuple[int, int, int]] = []
        self._prefill = False
        self._schedule, scheduler.schedule = scheduler.schedule, self._watched_schedule
        self._sequences: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        ours = self._engine.model_runner.config
        self.capacity = Capacity(
            ours.max_model_len, ours.max_num_seqs, ours.max_num_batched_tokens,
            ours.num_kvcache_blocks * ours.kvcache_block_size,
        )  # fmt: skip
        self.notes: dict[str, Any] = {
            "attention_backend": attention,
            "block_size": ours.kvcache_block_size,
            "prefix_caching": True,
        }

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        for option in options:
            if option not in OPTIONS:
                raise InputError(f"engine=nano_vllm has no option {option!r}; it has {', '.join(OPTIONS)}.")

    def add(self, request: Request) -> None:
        prompt, settings = request.prompt_token_ids, request.sampling
        longest = len(prompt) + settings.max_tokens
        if not prompt or not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            raise InputError(f"Request {request.request_id} has no prompt, or tokens outside of the vocabulary.")
        if longest > min(self.capacity.max_model_len, self.capacity.kv_cache_tokens):
            raise InputError(f"Request {request.request_id} needs {longest} tokens, more than nano-vLLM was given.")
        if settings.temperature < NEARLY_ZERO or settings.top_k > 0 or settings.top_p < 1 or settings.stop_token_ids:
            raise InputError("nano-vLLM samples with a temperature above 0 only: no top_k, top_p or stop_token_ids.")
        self._add(request, settings)

    def advance(self) -> None:
        self._engine.step()

    def last_step(self) -> Step:
        scheduled, tokens, finished = [], [], []
        sizes = self._sizes or [(1, len(s) - 2, len(s) - 1) for s in self._scheduled]
        for sequence, (new, cached, length) in zip(self._scheduled, sizes, strict=True):
            name = self._names[sequence.seq_id]
            scheduled.append(Scheduled(name, new, cached))
            if cached + new == length:  # else in the middle of its prompt
                tokens.append((name, sequence.last_token))
            if sequence.is_finished:
                finished.append(name)
        for name in finished:
            self._forget(name)
        return Step("prefill" if self._prefill else "decode", tuple(scheduled), tuple(tokens), tuple(finished))

    def has_unfinished(self) -> bool:
        return not self._engine.is_finished()

    def abort(self, request_ids: Iterable[str]) -> None:
        scheduler = self._engine.scheduler
        for name in request_ids:
            sequence = self._sequences.get(name)
            if sequence is None:
                continue
            self._forget(name)
            for queue in (scheduler.waiting, scheduler.running):
                if sequence in queue:
                    queue.remove(sequence)
            if sequence.block_table:
                scheduler.block_manager.deallocate(sequence)

    def serve(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[RequestResult], None] | None = None,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[RequestResult]:
        requests = list(requests)
        arrivals = Arrivals(requests, arrivals_s)
        times: dict[int, list[float]] = {}
        results: dict[str, RequestResult] = {}
        try:
            while True:
                for request in arrivals.take():
                    self.add(request)
                    times[self._sequences[request.request_id].seq_id] = []
                if not self.has_unfinished():
                    if not arrivals.wait():
                        break
                    continue
                finished, _ = self._engine.step()
                now_s = time.perf_counter()
                for sequence in self._scheduled:
                    if len(times[sequence.seq_id]) < sequence.num_completion_tokens:
                        times[sequence.seq_id].append(now_s)
                for key, tokens in finished:
                    name = self._names[key]
                    sequence = self._sequences[name]
                    ended = "length" if len(tokens) == sequence.max_tokens else "stop"
                    results[name] = RequestResult(
                        name, sequence.num_prompt_tokens, tuple(tokens), arrivals.due_s(name), tuple(times[key]), ended
                    )
                    self._forget(name)
                    if on_finish is not None:
                        on_finish(results[name])
        except BaseException:
            self.abort([request.request_id for request in requests])  # what stays queued would run with the next call
            raise
        return [results[request.request_id] for request in requests]

    def score(self, requests: Iterable[Request]) -> list[Scored]:
        requests = list(requests)
        logits: dict[str, list[torch.Tensor]] = {r.request_id: [] for r in requests}
        tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        runner = self._engine.model_runner
        run_model = runner.run_model
        kept: list[torch.Tensor] = []

        def keep(*arguments: Any) -> torch.Tensor:
            computed = run_model(*arguments)
            kept[:] = [computed.float().cpu()]
            return computed

        runner.run_model = keep
        try:
            for request in requests:
                greedy = SamplingParams(NEARLY_ZERO, request.sampling.max_tokens, request.sampling.ignore_eos)
                self._add(request, greedy)
            while self.has_unfinished():
                self.advance()
                step = self.last_step()
                rows = {s.request_id: row for row, s in enumerate(step.scheduled)}
                for name, token in step.tokens:
                    logits[name].append(kept[0][rows[name]].clone())
                    tokens[name].append(token)
        except BaseException:
            self.abort(logits)
            raise
        finally:
            del runner.run_model  # the class's own again
        return [
            Scored(r.prompt_token_ids, tuple(tokens[r.request_id]), torch.stack(logits[r.request_id])) for r in requests
        ]

    def host_phases(self) -> HostPhases:
        runner, scheduler = self._engine.model_runner, self._engine.scheduler
        prepare = ("prepare_prefill", "prepare_decode", "prepare_sample")
        return {
            "schedule": [(scheduler, "schedule")],
            "prepare": [(runner, name) for name in prepare],
            "launch": [(runner, "run_model")],
            "sample": [(runner, "sampler")],
            "finish": [(scheduler, "postprocess")],
        }

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        raise TraceUnsupported("Upstream nano-vLLM is timed from outside only.")

    def detach(self) -> None: ...

    def close(self) -> None:
        if self._engine is None:
            return
        atexit.unregister(self._engine.exit)
        self._engine.exit()
        self._engine = None
        self._scheduled, self._sequences = [], {}
        gc.collect()
        torch.cuda.empty_cache()

    def _add(self, request: Request, settings: SamplingParams) -> None:
        from nanovllm import SamplingParams as Theirs

        theirs = Theirs(
            temperature=settings.temperature, max_tokens=settings.max_tokens, ignore_eos=settings.ignore_eos
        )
        self._engine.add_request(list(request.prompt_token_ids), theirs)
        sequence = self._engine.scheduler.waiting[-1]
        self._sequences[request.request_id] = sequence
        self._names[sequence.seq_id] = request.request_id

    def _watched_schedule(self) -> tuple[list[Any], bool]:
        self._scheduled, self._prefill = self._schedule()
        # Decode steps follow from what they leave; describing them here would be charged to the step.
        self._sizes = (
            [(s.num_scheduled_tokens, s.num_cached_tokens, len(s)) for s in self._scheduled] if self._prefill else []
        )
        return self._scheduled, self._prefill

    def _forget(self, name: str) -> None:
        del self._names[self._sequences.pop(name).seq_id]


def _start(config: EngineConfig, eos_token_id: int, attention: str) -> Any:
    """nano-vLLM's engine, with the one thing of a tokenizer that it needs when token ids go in."""
    with flash_attention.provided(attention):
        from nanovllm.engine import llm_engine

    loader = llm_engine.AutoTokenizer
    tokenizer = SimpleNamespace(eos_token_id=eos_token_id)
    llm_engine.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    # It counts as its own what other processes hold, so it may take that much more.
    free, total = torch.cuda.mem_get_info()
    share = min(1.0, config.gpu_memory_utilization + (total - free) / total)
    try:
        return llm_engine.LLMEngine(
            str(config.checkpoint),
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            gpu_memory_utilization=share,
            **{name: value for name, value in config.options.items() if name != "attention"},
        )
    finally:
        llm_engine.AutoTokenizer = loader
