"""Times causal_attention's launches beside FlashAttention 3 on whole prompts, for `python -m kernels.tune`.

Each candidate is checked against the reference (its output full of NaN before), then timed as a captured graph of
dependent launches, one after the other, on the same random queries, keys and values: in an engine the kernel before has
just written these. The fastest is chosen where it is faster than FlashAttention 3, if that is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kernels import causal_attention, choices
from kernels._timing import checked, poisoned, relative_error, time_graph_us
from kernels._tune_models import Model
from kernels.causal_attention import Launch, reference, shape_key

MOST_TOKENS = 16384
LONGEST = (512, 1024, 2048, 4096)
QUICK_SHAPES = ((1024, 1024),)
CALLS = 16
"""In one graph."""
TOLERANCE = 1e-2
# Few tokens for two programs and more on a multiprocessor, of which one works on scores while another multiplies; many
# so that a tile of keys serves more rows.
CANDIDATES = (
    Launch(32, 64, 4, 2),
    Launch(32, 64, 4, 3),
    Launch(32, 32, 4, 4),
    Launch(16, 64, 4, 3),
    Launch(64, 64, 8, 2),
    Launch(64, 64, 8, 3),
    Launch(64, 128, 8, 2),
)


def shapes() -> Iterator[tuple[int, int]]:
    """(tokens, longest prompt) of steps of equal prompts."""
    for longest in LONGEST:
        tokens = longest
        while tokens <= MOST_TOKENS:
            yield tokens, longest
            tokens *= 2


class Prompts:
    """Random queries, keys and values of equal prompts."""

    def __init__(self, model: Model, tokens: int, longest: int, device: torch.device) -> None:
        self.tokens, self.longest, self.scale = tokens, longest, model.head_dim**-0.5
        self.heads = (model.heads, model.kv_heads, model.head_dim)
        self.q, self.k, self.v = (
            torch.randn(tokens, heads, model.head_dim, device=device).bfloat16()
            for heads in (model.heads, model.kv_heads, model.kv_heads)
        )
        self.positions = torch.arange(tokens, device=device, dtype=torch.int32) % longest
        self.starts = torch.arange(0, tokens + 1, longest, device=device, dtype=torch.int32)

    def ours(self, launch: Launch) -> Tensor:
        return causal_attention(self.q, self.k, self.v, self.positions, self.scale, dependent=True, launch=launch)

    def flash_attention_3(self) -> Callable[[], Tensor] | None:
        """As vLLM bundles it; None where that is not installed."""
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError:
            return None
        return partial(
            flash_attn_varlen_func, self.q, self.k, self.v, max_seqlen_q=self.longest, cu_seqlens_q=self.starts,
            max_seqlen_k=self.longest, cu_seqlens_k=self.starts, softmax_scale=self.scale, causal=True, fa_version=3,
        )  # fmt: skip

    @cached_property
    def expected(self) -> Tensor:
        """Prompt by prompt: the reference holds all scores of its tokens."""
        found = []
        for first in range(0, self.tokens, self.longest):
            rows = slice(first, first + self.longest)
            found.append(reference(self.q[rows], self.k[rows], self.v[rows], self.positions[rows], self.scale))
        return torch.cat(found)

    def error(self, launch: Launch) -> float:
        """Relative error of a launch; NaN where it left something unwritten."""
        return relative_error(poisoned(partial(self.ours, launch)), self.expected)

    def tflop(self) -> float:
        """Of both products, without what the mask hides."""
        heads, _, head_dim = self.heads
        return 4 * heads * head_dim * self.tokens * (self.longest + 1) / 2 / 1e12


def measure(prompts: Prompts, failures: list[str]) -> dict[str, Any]:
    """Print what is fastest; the entry for the table of choices, empty where nothing could be timed."""
    named, timed = f"{prompts.tokens:6} tokens of at most {prompts.longest:4}", []
    for launch in CANDIDATES:
        if checked(prompts, launch, named, TOLERANCE, failures):
            timed.append((time_us(partial(prompts.ours, launch)), launch))
    flash = prompts.flash_attention_3()
    beside_us = time_us(flash) if flash else float("inf")
    timed.sort(key=lambda pair: pair[0])
    for us, launch in timed[:2]:
        rate = f"{us:7.1f} µs {prompts.tflop() / us * 1e6:4.0f} TFLOP/s"
        print(f"{named}: {rate}  {launch}; FlashAttention 3 {beside_us:.1f}", flush=True)
    if not timed:
        return {}
    beside = {"flash_attention_us": round(beside_us, 2)} if flash else {}
    us, launch = timed[0]
    if us >= beside_us:
        return {"path": "flash_attention", "us": round(us, 2), **beside}
    return {"launch": choices.fields_of(launch), "us": round(us, 2), **beside}


def time_us(call: Callable[[], Any]) -> float:
    """Of a call."""
    return time_graph_us([call] * CALLS) / CALLS


def measured(
    model: Model, device: torch.device, quick: bool, seconds: float, failures: list[str]
) -> dict[str, dict[str, Any]]:
    """The entries for the table of choices; after so many seconds no other shape is begun. `failures` gets what is
    wrong."""
    start, table = time.perf_counter(), {}
    for tokens, longest in QUICK_SHAPES if quick else shapes():
        if time.perf_counter() - start > seconds:
            print(f"no time for {tokens} tokens of at most {longest}")
        elif entry := measure(Prompts(model, tokens, longest, device), failures):
            table[shape_key(model.heads, model.kv_heads, model.head_dim, tokens, longest)] = entry
    return {"causal_attention": table}
