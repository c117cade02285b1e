"""Greedy continuations and prompts from transformers, the reference that shares no code with the engines."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch

from engines.base import EngineConfig, Request, SamplingParams

TINY = Path(__file__).parent.parent / "assets" / "tiny-qwen3"
PAD = 258


@cache
def model(folder: Path = TINY):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(prompts: list[list[int]], num_tokens: int, folder: Path = TINY) -> list[list[int]]:
    """What transformers continues each prompt with, in float32, end of sequence ignored."""
    tokens = []
    for prompt in prompts:
        out = model(folder).generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=PAD
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def logits(prompt: tuple[int, ...], continuation: tuple[int, ...], folder: Path = TINY) -> torch.Tensor:
    """[len(continuation), vocab] float32: what each token of the continuation was chosen from."""
    with torch.inference_mode():
        out = model(folder)(torch.tensor([prompt + continuation])).logits[0]
    return out[len(prompt) - 1 : -1].float()


def text_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Byte strings of ordinary English of the given lengths, each from another place."""
    text = (
        b"The engine keeps the keys and values of every token that it has seen in blocks of a paged cache. A block "
        b"belongs to one sequence or to many that begin alike. When no block is free, the sequence that came last "
        b"gives its blocks back and starts again later. Nothing that it has said is lost, and what it says next does "
        b"not change for it. "
    ) * 3
    rng = random.Random(seed)
    starts = [rng.randrange(len(text) - max(lengths)) for _ in lengths]
    return [list(text[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def config(folder: Path = TINY, options: dict | None = None, **changes) -> EngineConfig:
    """Float32 on the CPU, with small blocks, so that short texts cross their borders."""
    settings = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 8} | changes
    return EngineConfig(folder, options={"block_size": 16} | (options or {}), **settings)


def requests(prompts: list[list[int]], num_tokens: int, **sampling) -> list[Request]:
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True} | sampling)
    return [Request(f"request {i}", tuple(prompt), settings) for i, prompt in enumerate(prompts)]
