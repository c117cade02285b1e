"""Prefill steps padded for a captured graph, run launch by launch: the logits of transformers, whatever the padding.

tests/gpu/test_prefill_graphs.py does the same with graphs.
"""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from engines.base import Request, SamplingParams
from engines.fused import LLM as Fused
from engines.fused.features import FEATURES
from engines.fused.prefill_graphs import PrefillBuffers, fused_up_to, token_sizes
from engines.nano.layers.attention import torch_attention
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from tests.engines import reference

VARIANTS = ((), ("-prefill_attention",), ("-prefill_attention", "-last_rows"), ("-prefill_products", "-half_norm"))
MODULE = sys.modules["engines.fused.prefill_graphs"]
SIZES = (16, 32, 64, 128)
FEW = 64
"""Tokens of a step up to which decode's kernels make its products."""
MAX_SEQUENCES = 4
STEPS = ((1,), (16,), (17,), (5, 11), (1, 1, 1), (1, 16, 17, 40), (128,), (32, 32, 32, 32), (61, 2))
GARBAGE = 2**30
"""Read as a token, a position, a row or a block it would end the test."""


def unwritten_rows_attention(q, k, v, k_cache, v_cache, context, scale):
    """From the step's own keys and values, as unforgiving as a kernel on a GPU: rows of no sequence are left as they
    were, here NaN, and masked values of the whole step are multiplied by zero."""
    if context.is_decode:  # the rows to draw from, in the last layer
        return torch_attention(q, k, v, k_cache, v_cache, context, scale)
    out = torch.full_like(q, float("nan"))
    starts, key_starts = context.cu_seqlens_q.tolist(), context.cu_seqlens_k.tolist()
    for sequence in range(len(starts) - 1):
        rows = slice(*starts[sequence : sequence + 2])
        keys = slice(*key_starts[sequence : sequence + 2])
        if keys.start == keys.stop:
            out[rows] = 0.0
            continue
        heads = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
        attended = scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
        out[rows] = attended.transpose(0, 1) + 0.0 * v.sum()
    return out


@cache
def make_inputs(lengths, blocks):
    """A prefill of ordinary text, its cache blocks in no order, and what transformers says comes next."""
    free = np.random.default_rng(sum(lengths)).permutation(blocks).tolist()
    sequences, expected = [], []
    for prompt in reference.text_prompts(lengths, seed=len(lengths)):
        sequence = Sequence(Request("", tuple(prompt), SamplingParams()))
        sequence.num_scheduled = len(prompt)
        sequence.block_table = [free.pop() for _ in range(-(-len(prompt) // 16))]
        sequences.append(sequence)
        expected.append(reference.logits(tuple(prompt), (0,)))
    return PrefillInputs.of(sequences, 16), torch.cat(expected)


def make_buffers(runner):
    few = FEW if "prefill_products" in runner.options.features else 0
    buffers = PrefillBuffers(SIZES, MAX_SEQUENCES, runner.max_blocks, runner.device, few=few)
    buffers.numbers.fill_(GARBAGE)
    return buffers


@torch.inference_mode()
def padded_logits(runner, inputs):
    buffers = make_buffers(runner)
    assert buffers.fits(inputs)
    step = buffers.inputs(buffers.fill(inputs))
    return runner.model.lm_head(runner.model(*step)[: len(inputs.seqlens_k)])


def assert_close(logits, expected):
    assert logits.shape == expected.shape
    assert (logits - expected).norm() / expected.norm() < 1e-5


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda names: " ".join(names) or "all features")
def runner(request):
    return Fused(reference.config(options={"features": request.param or tuple(FEATURES)})).runner


@pytest.fixture
def unforgiving(runner, monkeypatch):
    for module in runner.model.modules():
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", unwritten_rows_attention)
    return runner


@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_logits_are_the_references(unforgiving, lengths):
    inputs, expected = make_inputs(lengths, unforgiving.num_blocks)
    assert_close(padded_logits(unforgiving, inputs), expected)


@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_through_the_cache(runner, lengths):
    """The backends that read keys from the cache through block tables; the cache holds nothing but this step."""
    inputs, expected = make_inputs(lengths, runner.num_blocks)
    runner.cache.fill_(float("nan"))
    assert_close(padded_logits(runner, inputs), expected)
    written = ~runner.cache.isnan().flatten(4).any(-1)  # [2, layers, blocks, block_size]
    slots = torch.zeros(runner.num_blocks * 16, dtype=torch.bool)
    slots[inputs.slot_mapping] = True
    assert torch.equal(written, slots.view(-1, 16).expand_as(written))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
def test_interpreted_kernels():
    with kernels.use("triton"):
        runner = Fused(reference.config(options={"attention_backend": "triton"})).runner
        inputs, expected = make_inputs((3, 18), runner.num_blocks)
        runner.cache.fill_(float("nan"))
        assert_close(padded_logits(runner, inputs), expected)


def test_a_step_of_no_sequences_leaves_the_cache_alone(runner):
    """What is run before a capture."""
    buffers = make_buffers(runner)
    runner.cache.fill_(float("nan"))
    for size in SIZES:
        buffers.clear(size)
        with torch.inference_mode():
            runner.model(*buffers.inputs(size))
    assert runner.cache.isnan().all()


def test_padding_has_no_keys(runner):
    """Attention takes as long as the step's own tokens need."""
    buffers = make_buffers(runner)
    context = buffers.inputs(buffers.fill(make_inputs((5, 18), runner.num_blocks)[0]))[2]
    assert context.cu_seqlens_q.tolist() == [0, 5, 23, 23, 23, 32]
    assert context.cu_seqlens_k.tolist() == [0, 5, 23, 23, 23, 23]
    assert context.seqlens_k.tolist() == [5, 18, 0, 0, 0]


def test_smallest_size_that_holds_the_step(runner):
    buffers = make_buffers(runner)
    sizes = {n: buffers.fill(make_inputs((n,), runner.num_blocks)[0]) for n in (1, 16, 17, 64, 65, 128)}
    assert sizes == {1: 16, 16: 16, 17: 32, 64: 64, 65: 128, 128: 128}


def test_sizes_end_at_the_largest_step():
    assert token_sizes(100) == (16, 32, 64, 100)
    assert token_sizes(64) == (16, 32, 64)
    assert token_sizes(16384)[-2:] == (4096, 16384)
    assert token_sizes(16385)[-1] == 4096


def test_a_large_graph_runs_full_steps_only(runner, monkeypatch):
    monkeypatch.setattr(MODULE, "TOKEN_SIZES", (16, 32, 64))
    fits = [make_buffers(runner).fits(make_inputs((n,), runner.num_blocks)[0]) for n in (64, 65, 125, 126, 128)]
    assert fits == [True, False, False, True, True]


@pytest.mark.parametrize(
    "lengths, fits", [((128,), True), ((129,), False), ((1,) * 4, True), ((1,) * 5, False), ((64, 65), False)]
)
def test_steps_that_fit(runner, lengths, fits):
    assert make_buffers(runner).fits(make_inputs(lengths, runner.num_blocks)[0]) == fits


@torch.inference_mode()
def test_steps_of_a_budget_of_one_token_are_padded(monkeypatch):
    """One token in one row would be a decode step to attention."""
    runner = Fused(reference.config(max_num_batched_tokens=1)).runner
    captured = []
    monkeypatch.setattr("engines.fused.runner.Graphs", lambda *_: SimpleNamespace(pool=None))
    monkeypatch.setattr("engines.fused.runner.PrefillGraphs", lambda _model, buffers, **_: captured.append(buffers))
    monkeypatch.setattr(runner, "features", runner.features | {"prefill_graphs"})
    runner._capture()
    (buffers,) = captured
    inputs, expected = make_inputs((1,), runner.num_blocks)
    assert buffers.fits(inputs)
    step = buffers.inputs(buffers.fill(inputs))
    assert not step[2].is_decode
    assert_close(runner.model.lm_head(runner.model(*step)[:1]), expected)


def test_a_cached_prefix_does_not_fit(runner):
    sequence = Sequence(Request("", tuple(range(40)), SamplingParams()))
    sequence.num_cached, sequence.num_scheduled, sequence.block_table = 16, 24, [0, 1, 2]
    assert not make_buffers(runner).fits(PrefillInputs.of([sequence], 16))


def test_limit_of_fused_rows_holds_only_within():
    options = {"max_fused_prefill_rows": 20, "features": ("-prefill_products",)}
    runner = Fused(reference.config(options=options)).runner
    inputs, expected = make_inputs((30,), runner.num_blocks)
    fused_rows = []
    for layer in runner.model.layers:
        layer.norm_qkv.register_forward_hook(lambda _module, args, _out: fused_rows.append(len(args[0])))
    for limit, ran in ((None, []), (32, [32] * len(runner.model.layers)), (31, [])):
        with fused_up_to(runner.model.layers, limit):
            assert_close(padded_logits(runner, inputs), expected)
        assert fused_rows == ran
        fused_rows.clear()
    assert [layer.max_prefill_rows for layer in runner.model.layers] == [20] * len(runner.model.layers)


def test_the_last_layer_goes_on_with_the_rows_to_draw_from(runner):
    inputs, _ = make_inputs((5, 11), runner.num_blocks)
    attended, ended = [], []
    first, last = runner.model.layers[0], runner.model.layers[-1]
    for layer in (first, last):
        layer.plain.self_attn.attention.register_forward_hook(lambda _module, args, _out: attended.append(len(args[0])))
        layer.added_down.register_forward_hook(lambda _module, args, _out: ended.append(len(args[0])))
    runner._prefill(inputs)
    assert ended == [16, 2]
    if "prefill_attention" not in runner.features:
        assert attended == ([16, 2] if "last_rows" in runner.features else [16, 16])
    else:
        assert attended == []
