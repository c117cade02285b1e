"""The fused engine launch by launch on the trained tiny checkpoint: logits of transformers, however it is put together.

Small enough for compute-sanitizer: scripts/memcheck.sh runs these tests under it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from engines.base import Request, SamplingParams
from engines.fused import LLM, attention, draw, products
from kernels.causal_attention import Launch as Causal
from kernels.decode_attention_launch import Launch as Stream
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_linear_launch import Launch as Product
from kernels.prefill_linear import Launch as Prefill
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


def test_bfloat16_kernels_that_only_measurements_choose(monkeypatch):
    """Prefill's products with their ends, as gate and up of decode too, its attention, products that hold W in shared
    memory, the head of many rows, and attention that holds a stream's first tile: on a GPU with a table, larger shapes
    run them."""
    launches = {"prefill_qkv_rope": Prefill(64, 64, 32, 4, 3), "prefill_gate_up": Prefill(64, 32, 32, 4, 3, per_sm=0)}
    monkeypatch.setattr(products, "best_prefill_launch", lambda kernel, *_: launches[kernel])
    monkeypatch.setattr(products, "best_prefill_gate_up", lambda *_: launches["prefill_gate_up"])
    monkeypatch.setattr(attention, "MAX_PREFILL_ATTENTION", 0)
    monkeypatch.setattr(attention, "best_causal_launch", lambda *_: Causal(16, 32, 4, 2))
    held = lambda rows, out, k, gated, *_: Product("tiled", 32, 64, 4, 16, split_k=k // 64, described=True)  # noqa: E731
    monkeypatch.setattr(products, "best_launch", held)
    tiles = HeadLaunch(tiles=Prefill(16, 128, 32, 4, 3))
    for module in (draw, sys.modules["kernels.decode_head"]):
        monkeypatch.setattr(module, "best_launch", lambda *_: tiles)
    for splits in (1, 4):
        stream = Stream(16, splits, 16, 1, True, 3, held=True)
        monkeypatch.setattr(sys.modules["kernels.decode_attention"], "best_launch", lambda *_, stream=stream: stream)
        options = {"enforce_eager": True, "features": ["-norm_gate_up", "-norm_qkv"]}
        config = reference.config(options=options, device=DEVICE, dtype="bfloat16", kv_cache_tokens=1024)
        engine = LLM(config)
        test_logits_across_blocks_and_chunks(engine)
        engine.close()


def test_draws_come_back(engine):
    """Hot, cut to few tokens or not, in one batch: as many tokens as asked for, twice the same ones."""
    hot = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True, seed=3)
    samplings = [hot, replace(hot, top_k=5), replace(hot, top_p=0.7), replace(hot, temperature=0.0)]
    asked = [Request(f"{i}", tuple(range(1, 18 + i)), sampling) for i, sampling in enumerate(samplings)]
    first, second = ([r.token_ids for r in engine.serve(asked)] for _ in range(2))
    assert first == second
    assert [len(tokens) for tokens in first] == [6] * 4
    assert all(0 <= token < 260 for tokens in first for token in tokens)
