"""What is run: shapes of single steps, and the requests of a throughput workload. Every engine gets the same ids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engines.base import Request, SamplingParams
from harness.config import WorkloadConf

MAX_TOKEN_ID = 10_000
"""Prompts use ids from 0 to this one, as nano-vLLM's benchmark does; smaller vocabularies take them modulo size."""
DECODE_WARMUP_STEPS = 3
"""Decode steps left out after each batch of prompts: the first ones meet cold caches and a freshly filled host."""
_WIDTH_SHARE, _MIN_WIDTH, _MAX_WIDTH = 4, 8, 64
_CPU_TRACE_TOKENS = 128
"""Longest prompt or context of the steps traced for a throughput workload without a GPU."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of step: `batch_size` sequences, each with a prompt (prefill) or a cache (decode) of `tokens` tokens."""

    phase: Literal["prefill", "decode"]
    batch_size: int
    tokens: int

    @property
    def new_tokens(self) -> int:
        return self.batch_size * (self.tokens if self.phase == "prefill" else 1)

    @property
    def context_len(self) -> int:
        return 0 if self.phase == "prefill" else self.tokens

    @property
    def width(self) -> int:
        """Decode steps taken on one batch of prompts. Each step lengthens the cache by a token, so the timed steps
        start width / 2 tokens below the shape's context and end as far above it: their mean context is the shape's."""
        return min(_MAX_WIDTH, max(_MIN_WIDTH, self.tokens // _WIDTH_SHARE))

    @property
    def prompt_len(self) -> int:
        """Tokens of each prompt that is added to get this shape."""
        if self.phase == "prefill":
            return self.tokens
        return max(1, self.tokens - self.width // 2 - DECODE_WARMUP_STEPS)

    def prefill_steps(self, max_num_batched_tokens: int) -> int:
        """Steps that computing the prompts takes at least."""
        return -(-self.batch_size * self.prompt_len // max_num_batched_tokens)

    def output_len(self, max_num_batched_tokens: int) -> int:
        """Tokens to ask for. While the last prompts of a batch are computed, the first ones may already decode."""
        if self.phase == "prefill":
            return 1
        return self.prefill_steps(max_num_batched_tokens) + 1 + DECODE_WARMUP_STEPS + self.width

    def length(self, max_num_batched_tokens: int) -> int:
        """Longest that a sequence gets."""
        return self.prompt_len + self.output_len(max_num_batched_tokens)

    def __str__(self) -> str:
        what = "prompts of" if self.phase == "prefill" else "sequences at context"
        return f"{self.phase} of {self.batch_size} {what} {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Call:
    """A whole generate call: `batch_size` prompts of `prompt_len` tokens, all at once, `output_len` tokens for each."""

    batch_size: int
    prompt_len: int
    output_len: int

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """What the call is there to show: with one token of output it is the prompts, with more the tokens' time."""
        return "prefill" if self.output_len == 1 else "decode"

    def __str__(self) -> str:
        return f"{self.batch_size} prompts of {self.prompt_len} tokens, {self.output_len} new"


def calls(conf: WorkloadConf, device: str) -> list[Call]:
    """The calls of a `generate` workload for this device, prefill first."""
    lengths = {"prefill": 1, "decode": conf.output_tokens}
    return [Call(s.batch_size, s.tokens, lengths[s.phase]) for s in shapes(conf, device)]


def shapes(conf: WorkloadConf, device: str) -> list[Shape]:
    """The grid of a workload for this device, prefill first."""
    on_gpu = device != "cpu"
    prefill, decode = (conf.prefill, conf.decode) if on_gpu else (conf.cpu_prefill, conf.cpu_decode)
    return [Shape("prefill", b, t) for b, t in prefill] + [Shape("decode", b, c) for b, c in decode]


def requests(conf: WorkloadConf, device: str, vocab_size: int, seed: int = 0) -> list[Request]:
    """The requests of a workload that serves some, drawn in the order in which nano-vLLM's benchmark draws them.

    So with 256 requests, both ranges [100, 1024] and seed 0 they ask for 133,966 tokens, as there.
    """
    count = conf.num_requests if device != "cpu" else conf.cpu_num_requests
    if not count:
        return []
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        length = rng.randint(*conf.prompt_len)
        prompts.append(tuple(rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(length)))
    lengths = [rng.randint(*conf.output_len) for _ in range(count)]
    return [
        Request(f"{i}", prompt, SamplingParams(conf.temperature, max_tokens=length, ignore_eos=True))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def trace_shapes(conf: WorkloadConf, device: str, max_num_batched_tokens: int) -> list[Shape]:
    """The steps by which a `throughput` workload's layers are shown: its own grids, else typical ones.

    Typical is a step full of prompts of mean length, and decode of all and of a quarter of the requests at the context
    that a request has half-way.
    """
    if given := shapes(conf, device):
        return given
    count = conf.num_requests if device != "cpu" else conf.cpu_num_requests
    prompt, output = sum(conf.prompt_len) // 2, sum(conf.output_len) // 2
    context = prompt + output // 2
    if device == "cpu":
        prompt, context = min(prompt, _CPU_TRACE_TOKENS), min(context, _CPU_TRACE_TOKENS)
    batch = max(1, min(count, max_num_batched_tokens // prompt))
    batches = sorted({count, max(1, count // 4)}, reverse=True)
    return [Shape("prefill", batch, prompt), *(Shape("decode", b, context) for b in batches)]


class Prompts:
    """Random prompts, never the same twice, so that no prefix is ever found in a cache."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._limit = min(vocab_size, MAX_TOKEN_ID + 1)
        self._rng = np.random.default_rng(seed)
        self._made = 0

    def request(self, length: int, sampling: SamplingParams) -> Request:
        """A request with a new id and a new prompt of `length` tokens."""
        self._made += 1
        ids = self._rng.integers(self._limit, size=length).tolist()
        return Request(f"{self._made}", tuple(ids), sampling)
