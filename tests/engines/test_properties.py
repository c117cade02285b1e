"""A request's tokens depend on nothing else: not on its batch mates, on the cache's size, or on a prefix's reuse."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Request, SamplingParams
from engines.fused import LLM as Fused
from engines.nano import LLM as Nano
from tests.engines import reference

MAX_TOKENS = 12
TEXT = b"Beautiful is better than ugly. A block belongs to one"
STEMS = (TEXT, TEXT[:20] + b" than any complex nest of code.", b"A block belongs " * 3)
"""The second begins like the first; the third is the same block again and again, each behind another beginning."""

# Lengths at and around the borders of blocks of 4 and 16 tokens, which make equal prefixes end everywhere in a block.
prompts = st.builds(
    lambda stem, length: tuple(stem[:length]), st.sampled_from(STEMS), st.sampled_from([1, 7, 12, 15, 16, 17, 33, 48])
)


@dataclass(frozen=True)
class Job:
    """A request, the step before which it arrives, and after how many steps more it is aborted, if at all."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: int
    abort: int | None


def jobs(samplings: st.SearchStrategy[SamplingParams]) -> st.SearchStrategy[list[Job]]:
    job = st.builds(Job, prompts, samplings, st.just(0) | st.integers(0, 8), st.none() | st.none() | st.integers(0, 10))
    return st.lists(job, min_size=3, max_size=8)


# The smallest cache holds the longest request and little beside it, so that others wait or are preempted.
engine_settings = st.fixed_dictionaries(
    {
        "kv_cache_tokens": st.sampled_from([64, 64, 80, 2048]),
        "max_num_batched_tokens": st.sampled_from([7, 24, 512]),
        "max_num_seqs": st.sampled_from([2, 4, 8]),
        "prefix_caching": st.booleans(),
        "options": st.sampled_from([{"block_size": 4}, {"block_size": 16}]),
    }
)

greedy = st.builds(
    SamplingParams, temperature=st.just(0.0), max_tokens=st.integers(1, MAX_TOKENS), ignore_eos=st.just(True)
)
seeded = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.6, 2.0, 5.0]),  # the model is sure of itself: hot, so that the noise decides
    max_tokens=st.integers(1, MAX_TOKENS),
    ignore_eos=st.just(True),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2),
)
unseeded = st.builds(SamplingParams, temperature=st.sampled_from([0.0, 1.0]), max_tokens=st.integers(1, MAX_TOKENS))


def run(engine: Nano, traffic: list[Job]) -> list[list[int]]:
    """The tokens of each job."""
    tokens = defaultdict(list)
    aborted = set()
    step = 0
    while engine.has_unfinished() or any(job.arrival >= step for job in traffic):
        for index, job in enumerate(traffic):
            if job.arrival == step:
                engine.add(Request(f"{index}", job.prompt, job.sampling))
            if job.abort is not None and job.arrival + job.abort == step:
                engine.abort([f"{index}"])
                aborted.add(f"{index}")
        if engine.has_unfinished():
            engine.advance()
            for request_id, token in engine.last_step().tokens:
                assert request_id not in aborted
                tokens[request_id].append(token)
        step += 1
    blocks = engine.scheduler.blocks
    assert len(blocks.free) == blocks.num_blocks
    return [tokens[f"{index}"] for index in range(len(traffic))]


def check(job: Job, tokens: list[int], want: list[int]) -> None:
    assert tokens == want[: len(tokens)]
    assert len(tokens) == len(want) or job.abort is not None


@cache
def continuation(prompt: tuple[int, ...]) -> list[int]:
    return reference.greedy([list(prompt)], MAX_TOKENS)[0]


@pytest.mark.parametrize("engine", [Nano, Fused])
@settings(max_examples=40)
@given(traffic=jobs(greedy), chosen=engine_settings)
def test_greedy_tokens_are_transformers(engine, traffic, chosen):
    for job, tokens in zip(traffic, run(engine(reference.config(**chosen)), traffic), strict=True):
        check(job, tokens, continuation(job.prompt)[: job.sampling.max_tokens])


@cache
def alone(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
    return run(Nano(reference.config()), [Job(prompt, sampling, 0, None)])[0]


@settings(max_examples=40)
@given(traffic=jobs(seeded | unseeded), chosen=engine_settings)
def test_seeded_tokens_are_those_of_the_request_alone(traffic, chosen):
    for job, tokens in zip(traffic, run(Nano(reference.config(**chosen)), traffic), strict=True):
        if job.sampling.seed is not None:
            check(job, tokens, alone(job.prompt, job.sampling))
