"""Two GPUs over NCCL, decode from CUDA graphs with the all-reduces inside; tests/engines has the rest, over gloo."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from engines.nano import LLM
from engines.nano.parallel import RankLost
from tests.engines import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

BOUND_S = 60.0


def start(**options) -> LLM:
    # Heads of 32 and learned margins: bfloat16 does not change what is most likely (tests/engines/test_greedy.py).
    return LLM(
        reference.config(
            options={"tensor_parallel_size": 2, "block_size": 256} | options,
            device="cuda", dtype="bfloat16", kv_cache_tokens=4096,
        )
    )  # fmt: skip


@pytest.mark.parametrize("eager", [False, True])
def test_greedy_equals_transformers(eager):
    engine = start(enforce_eager=eager)
    try:
        assert engine.mode == ("eager" if eager else "graph")
        prompts = reference.text_prompts((5, 60, 90, 33, 17))
        results = engine.serve(reference.requests(prompts, 40))
        assert [list(result.token_ids) for result in results] == reference.greedy(prompts, 40)
    finally:
        engine.close()


@pytest.mark.parametrize("eager", [False, True])
def test_a_killed_follower_is_an_error(eager):
    """NCCL alone would wait for ever: rank 0 has a step under way that the follower has not begun."""
    engine = start(enforce_eager=eager)
    (follower,) = engine.runner.followers.processes
    for request in reference.requests(reference.text_prompts((20, 30)), 50):
        engine.add(request)
    engine.advance()
    os.kill(follower.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 ended with exit code -9"):
        engine.advance()
    engine.close()
    assert time.monotonic() - began < BOUND_S
