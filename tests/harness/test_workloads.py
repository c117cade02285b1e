"""The shapes and requests that every engine gets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import SamplingParams
from harness.config import WorkloadConf
from harness.workloads import DECODE_WARMUP_STEPS, Prompts, Shape, requests, shapes, trace_shapes

THROUGHPUT = WorkloadConf(
    name="throughput", kind="throughput", num_requests=256, cpu_num_requests=2, prompt_len=[100, 1024],
    output_len=[100, 1024],
)  # fmt: skip
STEPS = WorkloadConf(
    name="x", kind="steps", prefill=[[1, 128], [16, 1024]], decode=[[8, 128]], cpu_prefill=[[1, 32]],
    cpu_decode=[[4, 64]],
)  # fmt: skip


def test_throughput_is_nano_vllms_benchmark() -> None:
    made = requests(THROUGHPUT, "cuda", vocab_size=151936)
    assert len(made) == 256
    assert sum(r.sampling.max_tokens for r in made) == 133_966
    rng = random.Random(0)
    length = rng.randint(100, 1024)
    assert made[0].prompt_token_ids == tuple(rng.randint(0, 10000) for _ in range(length))
    assert {(r.sampling.temperature, r.sampling.ignore_eos) for r in made} == {(0.6, True)}
    assert len({r.request_id for r in made}) == 256


def test_a_small_vocabulary_gets_the_same_lengths() -> None:
    small, large = (requests(THROUGHPUT, "cuda", vocab_size=v) for v in (260, 151936))
    assert [len(r.prompt_token_ids) for r in small] == [len(r.prompt_token_ids) for r in large]
    assert sum(r.sampling.max_tokens for r in small) == 133_966
    assert max(max(r.prompt_token_ids) for r in small) == 259


def test_without_a_gpu_work_is_smaller() -> None:
    assert len(requests(THROUGHPUT, "cpu", vocab_size=260)) == 2
    assert shapes(STEPS, "cuda") == [Shape("prefill", 1, 128), Shape("prefill", 16, 1024), Shape("decode", 8, 128)]
    assert shapes(STEPS, "cpu") == [Shape("prefill", 1, 32), Shape("decode", 4, 64)]


def test_trace_shapes_are_typical_of_the_requests() -> None:
    assert trace_shapes(THROUGHPUT, "cuda", 16384) == [
        Shape("prefill", 29, 562), Shape("decode", 256, 843), Shape("decode", 64, 843)
    ]  # fmt: skip
    assert trace_shapes(THROUGHPUT, "cpu", 16384) == [
        Shape("prefill", 2, 128), Shape("decode", 2, 128), Shape("decode", 1, 128)
    ]  # fmt: skip
    assert trace_shapes(STEPS, "cuda", 16384) == shapes(STEPS, "cuda")


@given(
    batch=st.integers(1, 300), context=st.integers(16, 8000), budget=st.integers(16, 20000)
)  # below 16 tokens there is no room to start half a width earlier
def test_timed_decode_steps_lie_around_the_context(batch: int, context: int, budget: int) -> None:
    shape = Shape("decode", batch, context)
    first = shape.prompt_len + DECODE_WARMUP_STEPS
    contexts = [first + i for i in range(shape.width)]
    assert abs(sum(contexts) / len(contexts) - context) <= 1
    assert shape.prompt_len * batch <= shape.prefill_steps(budget) * budget
    # The last timed step still has a token to produce after it.
    assert shape.prompt_len + shape.output_len(budget) > contexts[-1] + 1
    assert (shape.new_tokens, shape.context_len) == (batch, context)


def test_prefill_shape() -> None:
    shape = Shape("prefill", 16, 1024)
    assert (shape.new_tokens, shape.context_len, shape.prompt_len, shape.length(4096)) == (16384, 0, 1024, 1025)
    assert [shape.prefill_steps(budget) for budget in (16384, 16383, 4096)] == [1, 2, 4]


@pytest.mark.parametrize("vocab", [5, 260, 151936])
def test_prompts_never_repeat_and_fit_the_vocabulary(vocab: int) -> None:
    prompts = Prompts(vocab, seed=1)
    made = [prompts.request(50, SamplingParams()) for _ in range(20)]
    assert len({r.request_id for r in made}) == len({r.prompt_token_ids for r in made}) == 20
    ids = {t for r in made for t in r.prompt_token_ids}
    assert min(ids) >= 0
    assert max(ids) < min(vocab, 10_001)
    assert [Prompts(vocab, seed=1).request(50, SamplingParams()) for _ in range(2)] == [made[0]] * 2
