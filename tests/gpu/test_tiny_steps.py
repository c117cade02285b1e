"""The fused engine launch by launch on the trained tiny checkpoint: logits of transformers, however it is put together.

Small enough for compute-sanitizer: scripts/memcheck.sh runs these tests under it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.base import Request, SamplingParams
from engines.fused import LLM
from tests.engines import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"

# Of the logits' norm, against transformers in float32.
PRECISION = {"bfloat16": 5e-2, "float32": 1e-4}
LENGTHS = (1, 15, 16, 17, 33, 61)  # blocks of 16
DRAWN = 20
OPTIONS = {
    "all features": {},
    "attention apart": {"features": ["-attention", "-last_rows"]},
    "norms and head apart": {"features": ["-norm_qkv", "-norm_gate_up", "-head", "-residual"]},
    "fused prefill": {"max_fused_prefill_rows": 512},
}


@pytest.fixture(scope="module", params=[(d, o) for d in PRECISION for o in OPTIONS], ids=lambda p: f"{p[0]}-{p[1]}")
def engine(request):
    dtype, options = request.param
    config = reference.config(
        options={"enforce_eager": True} | OPTIONS[options], device=DEVICE, dtype=dtype, kv_cache_tokens=1024,
        max_num_batched_tokens=96,
    )  # fmt: skip
    started = LLM(config)
    yield started
    started.close()


def test_logits_across_blocks_and_chunks(engine):
    scored = engine.score(reference.requests(reference.text_prompts(LENGTHS), DRAWN))
    for one in scored:
        expected = reference.logits(one.prompt_token_ids, one.token_ids)
        error = ((one.logits - expected).norm() / expected.norm()).item()
        assert error < PRECISION[engine.config.dtype], (len(one.prompt_token_ids), error)


def test_draws_come_back(engine):
    """Hot, cut to few tokens or not, in one batch: as many tokens as asked for, twice the same ones."""
    hot = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True, seed=3)
    samplings = [hot, replace(hot, top_k=5), replace(hot, top_p=0.7), replace(hot, temperature=0.0)]
    asked = [Request(f"{i}", tuple(range(1, 18 + i)), sampling) for i, sampling in enumerate(samplings)]
    first, second = ([r.token_ids for r in engine.serve(asked)] for _ in range(2))
    assert first == second
    assert [len(tokens) for tokens in first] == [6] * 4
    assert all(0 <= token < 260 for tokens in first for token in tokens)
