"""The engine: requests in, tokens out."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import kernels
from engines.arrivals import Arrivals
from engines.base import (
    Capacity,
    EngineConfig,
    HostPhases,
    InputError,
    Probe,
    Request,
    RequestResult,
    Scheduled,
    Scored,
    Step,
    TraceMode,
    TraceUnsupported,
)  # fmt: skip
from engines.nano.block_manager import BlockManager
from engines.nano.model_runner import ModelRunner
from engines.nano.offline import OfflineCalls, config_of
from engines.nano.options import Options
from engines.nano.parallel import LeadingRunner
from engines.nano.scheduler import Scheduler
from engines.nano.sequence import Sequence
from engines.nano.utils import compile as compilation

NO_TRITON = "The package triton is not installed: plain PyTorch runs in place of kernels, without CUDA graphs."


@dataclass(slots=True)
class Ran:
    """A step that ran, as the scheduler left it. `sizes` are (new tokens, tokens in the cache, length) before
    it, kept for prefills; decode steps follow from what they left."""

    sequences: list[Sequence]
    is_prefill: bool
    sizes: list[tuple[int, int, int]]
    token_ids: list[int] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)

    def describe(self) -> Step:
        sizes = self.sizes or [(1, len(s) - 2, len(s) - 1) for s in self.sequences]
        ran = list(zip(self.sequences, sizes, strict=True))
        scheduled = tuple(Scheduled(s.request_id, new, cached) for s, (new, cached, _) in ran)
        # A sequence of which something was still to compute was in the middle of its prompt: its token means nothing.
        drawn = zip(ran, self.token_ids, strict=True)
        tokens = tuple((s.request_id, token) for (s, (new, cached, length)), token in drawn if new + cached == length)
        finished = tuple(s.request_id for s in self.finished)
        return Step("prefill" if self.is_prefill else "decode", scheduled, tokens, finished)


class LLM(OfflineCalls):
    """A small, complete engine: paged cache, continuous batching, prefix reuse, chunked prefill, CUDA graphs.

    Made from an `EngineConfig` by the harness, or from a checkpoint folder and keywords as nano-vLLM's and vLLM's
    scripts do: `LLM(folder, enforce_eager=False, max_model_len=4096)`.
    """

    name = "nano"
    arm = "default"
    launches_ahead = False
    options_class: type[Options] = Options

    def __init__(self, model: str | Path | EngineConfig, **keywords: Any) -> None:
        config = model if isinstance(model, EngineConfig) else config_of(Path(model), keywords)
        self.config = config
        self.options = self.options_class.parse(config.options, self.name)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("There is no CUDA device on this machine; use device=cpu.")
        compilation.enabled = self.options.compile
        torch.manual_seed(config.seed)
        self.runner = self._start_runner()
        blocks = BlockManager(self.runner.num_blocks, self.options.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            blocks, config.max_num_seqs, config.max_num_batched_tokens, self.runner.model_config.eos_token_ids
        )
        self.capacity = Capacity(
            self.runner.max_model_len, config.max_num_seqs, config.max_num_batched_tokens,
            self.runner.num_blocks * self.options.block_size,
        )  # fmt: skip
        self.streamed = set()
        self._last = Ran([], False, [])
        self._closed = False

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        cls.options_class.parse(options, cls.name)

    def _start_runner(self) -> ModelRunner:
        if self.options.tensor_parallel_size == 1:
            return ModelRunner(self.config, self.options, self.prepare)
        runner = LeadingRunner(self.config, self.options, self.prepare)
        weakref.finalize(self, runner.close)  # at the latest when this process exits
        return runner

    def prepare(self, runner: ModelRunner) -> None:
        """Change the model between loading and its first step; nano has nothing to change."""

    @property
    def mode(self) -> Literal["eager", "graph", "compiled"]:
        return "eager" if self.runner.graphs is None else "graph"

    @property
    def notes(self) -> dict[str, Any]:
        graphs = self.runner.graphs
        return {
            "attention_backend": self.runner.backend_name,
            "block_size": self.options.block_size,
            "graph_batch_sizes": graphs.sizes if graphs else [],
            "preemptions": self.scheduler.num_preemptions,
            "start_s": self.runner.stages.seconds,
            "notices": [NO_TRITON] if self.config.device == "cuda" and not kernels.HAVE_TRITON else [],
        }

    def add(self, request: Request) -> Sequence:
        """Queue a request. Output is cut where the model's length ends; a prompt that fills it is refused."""
        prompt = len(request.prompt_token_ids)
        room = self.capacity.max_model_len - prompt
        if prompt == 0:
            raise InputError(f"Request {request.request_id} has an empty prompt.")
        if room < 1:
            raise InputError(
                f"Request {request.request_id} has a prompt of {prompt} tokens; with one token of output at least, "
                f"the longest that fits is {self.capacity.max_model_len - 1}."
            )
        if request.sampling.max_tokens > room:
            request = replace(request, sampling=replace(request.sampling, max_tokens=room))
        vocab_size = self.runner.model_config.vocab_size
        try:
            sequence = Sequence(request)
            known = np.frombuffer(sequence.token_ids, np.uint64).max() < vocab_size  # a negative one is huge then
        except OverflowError:  # one of more than 64 bits
            known = False
        if not known:
            raise InputError(f"Request {request.request_id} has token ids outside the vocabulary of {vocab_size}.")
        self.scheduler.add(sequence)
        return sequence

    def advance(self) -> None:
        """One scheduler step. What it was is told by `last_step`, so that the telling costs the step nothing."""
        self._run(*self.scheduler.schedule())

    def _run(self, sequences: list[Sequence], is_prefill: bool) -> None:
        ran = Ran(
            sequences, is_prefill, [(s.num_scheduled, s.num_cached, len(s)) for s in sequences] if is_prefill else []
        )
        try:
            ran.token_ids = self.runner.run(sequences, is_prefill)
        except BaseException:
            if is_prefill:  # a decode step finds all as it was, and is run again
                self.scheduler.take_back(sequences)
            raise
        ran.finished = self.scheduler.postprocess(sequences, ran.token_ids)
        self._last = ran  # only now: a step that fails is none that ran

    def last_step(self) -> Step:
        return self._last.describe()

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

    def abort(self, request_ids: Iterable[str]) -> None:
        doomed = set(request_ids)
        self.scheduler.abort(doomed)
        self.streamed -= doomed

    def serve(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[RequestResult], None] | None = None,
        arrivals_s: Iterable[float] | None = None,
    ) -> list[RequestResult]:
        """All requests at full speed, from when they arrive on: at once, or `arrivals_s` seconds from now."""
        requests = list(requests)
        arrivals = Arrivals(requests, None if arrivals_s is None else list(arrivals_s))
        try:
            return self._serve(requests, arrivals, on_finish)
        except BaseException:  # one of them cannot run, or the user interrupts: what is queued must not run later
            self.abort(request.request_id for request in requests)
            raise

    def _serve(
        self, requests: list[Request], arrivals: Arrivals, on_finish: Callable[[RequestResult], None] | None
    ) -> list[RequestResult]:
        times: dict[str, list[float]] = {r.request_id: [] for r in requests}
        results: dict[str, RequestResult] = {}
        while len(results) < len(requests):
            for request in arrivals.take():
                self.add(request)
            if not self.has_unfinished():
                if not arrivals.wait():
                    break
                continue
            self.advance()
            now = time.perf_counter()
            for sequence in self._last.sequences:  # some may be of a stream that waits meanwhile
                seen = times.get(sequence.request_id)
                if seen is not None and len(seen) < sequence.num_output:  # a chunk of a prompt gives no token
                    seen.append(now)
            for sequence in self._last.finished:
                if sequence.request_id not in times:
                    continue
                name, tokens = sequence.request_id, tuple(sequence.output_token_ids)
                results[name] = RequestResult(
                    name, sequence.num_prompt, tokens, arrivals.due_s(name), tuple(times[name]), sequence.finish_reason
                )
                if on_finish is not None:
                    on_finish(results[name])
        return [results[r.request_id] for r in requests]

    def score(self, requests: Iterable[Request]) -> list[Scored]:
        """Greedy continuation with the logits of every token, through the same steps as always."""
        requests = [replace(r, sampling=replace(r.sampling, temperature=0.0)) for r in requests]
        logits: dict[str, list[torch.Tensor]] = {r.request_id: [] for r in requests}
        self.runner.keep_logits = True
        try:
            sequences = [self.add(request) for request in requests]
            while not all(sequence.finish_reason for sequence in sequences):
                self.advance()
                step = self.last_step()
                rows = {s.request_id: row for row, s in enumerate(step.scheduled)}
                for name, _ in step.tokens:
                    if name in logits:  # else of a stream that waits meanwhile
                        assert self.runner.kept_logits is not None
                        logits[name].append(self.runner.kept_logits[rows[name]])
        except BaseException:
            self.abort(logits)
            raise
        finally:
            self.runner.keep_logits, self.runner.kept_logits = False, None
        return [
            Scored(r.prompt_token_ids, tuple(s.output_token_ids), torch.stack(logits[r.request_id]))
            for r, s in zip(requests, sequences, strict=True)
        ]

    def host_phases(self) -> HostPhases:
        schedule, finish = [(self.scheduler, "schedule")], [(self.scheduler, "postprocess")]
        return {"schedule": schedule, **self.runner.host_phases(), "finish": finish}

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        if self.options.tensor_parallel_size > 1:
            raise TraceUnsupported("Layers are traced with tensor_parallel_size 1 only: all ranks must run alike.")
        if mode == "graph" and self.runner.graphs is None:
            raise TraceUnsupported(f"{self.name} runs without CUDA graphs: {self.runner.no_graphs}.")
        self.runner.attach(probe, mode)

    def detach(self) -> None:
        self.runner.detach()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.runner.close()
        gc.collect()
        if self.config.device == "cuda":
            torch.cuda.empty_cache()
