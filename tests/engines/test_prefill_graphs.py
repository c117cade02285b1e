"""Prefill steps padded for a captured graph, run launch by launch: the logits of transformers, whatever the padding.

tests/gpu/test_prefill_graphs.py does the same with graphs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from engines.base import Request, SamplingParams
from engines.fused import LLM as Fused
from engines.fused.features import FEATURES
from engines.fused.prefill import HostInputs
from engines.fused.prefill_graphs import (
    Padded,
    PrefillBuffers,
    PrefillGraphs,
    most_padded,
    run_layers,
    token_sizes,
)
from engines.fused.state import STAGES
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
def make_step(lengths, blocks):
    """A prefill of ordinary text, its cache blocks in no order, and what transformers says comes next."""
    free = np.random.default_rng(sum(lengths)).permutation(blocks).tolist()
    sequences, expected = [], []
    for prompt in reference.text_prompts(lengths, seed=len(lengths)):
        sequence = Sequence(Request("", tuple(prompt), SamplingParams()))
        sequence.num_scheduled = len(prompt)
        sequence.block_table = [free.pop() for _ in range(-(-len(prompt) // 16))]
        sequences.append(sequence)
        expected.append(reference.logits(tuple(prompt), (0,)))
    return sequences, torch.cat(expected)


def make_buffers(runner, **limits):
    few = FEW if "prefill_products" in runner.options.features else 0
    buffers = PrefillBuffers(SIZES, MAX_SEQUENCES, runner.max_blocks, runner.device, few=few, **limits)
    buffers.numbers.fill_(GARBAGE)
    return buffers


def fill(buffers, sequences):
    """What a captured model call is given."""
    assert buffers.fits(sequences)
    size = buffers.fill(sequences, 16).size
    buffers.upload(size)
    return buffers.inputs(size)


@torch.inference_mode()
def padded_logits(runner, sequences):
    step = fill(make_buffers(runner), sequences)
    return runner.model.lm_head(runner.model(*step)[: len(sequences)])


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
    sequences, expected = make_step(lengths, unforgiving.num_blocks)
    assert_close(padded_logits(unforgiving, sequences), expected)


@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_through_the_cache(runner, lengths):
    """The backends that read keys from the cache through block tables; the cache holds nothing but this step."""
    sequences, expected = make_step(lengths, runner.num_blocks)
    runner.cache.fill_(float("nan"))
    assert_close(padded_logits(runner, sequences), expected)
    written = ~runner.cache.isnan().flatten(4).any(-1)  # [2, layers, blocks, block_size]
    slots = torch.zeros(runner.num_blocks * 16, dtype=torch.bool)
    slots[PrefillInputs.of(sequences, 16).slot_mapping] = True
    assert torch.equal(written, slots.view(-1, 16).expand_as(written))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
def test_interpreted_kernels():
    with kernels.use("triton"):
        runner = Fused(reference.config(options={"attention_backend": "triton"})).runner
        sequences, expected = make_step((3, 18), runner.num_blocks)
        runner.cache.fill_(float("nan"))
        assert_close(padded_logits(runner, sequences), expected)


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
    context = fill(make_buffers(runner), make_step((5, 18), runner.num_blocks)[0])[2]
    assert context.cu_seqlens_q.tolist() == [0, 5, 23, 23, 23, 32]
    assert context.cu_seqlens_k.tolist() == [0, 5, 23, 23, 23, 23]
    assert context.seqlens_k.tolist() == [5, 18, 0, 0, 0]


def test_smallest_size_that_holds_the_step(runner):
    buffers = make_buffers(runner)
    sizes = {n: buffers.fill(make_step((n,), runner.num_blocks)[0], 16).size for n in (1, 16, 17, 64, 65, 128)}
    assert sizes == {1: 16, 16: 16, 17: 32, 64: 64, 65: 128, 128: 128}


def test_sizes_end_at_the_largest_step():
    assert token_sizes(100, 8192) == (16, 32, 64, 100)
    assert token_sizes(64, 8192) == (16, 32, 64)
    assert token_sizes(16384, 8192)[-2:] == (8192, 16384)
    assert token_sizes(16385, 8192)[-1] == 8192
    assert token_sizes(4096, 1536)[-2:] == (1536, 4096)
    assert token_sizes(16385, 1536)[-1] == 1536


def test_large_models_are_padded_to_small_sizes():
    """Qwen3-0.6B's, 4B's and 8B's layers, by their published sizes; and one that no padding suits."""
    qkv_o = [(32 + 8 + 8 + 32) * 128 * hidden for hidden in (2560, 4096)]
    layers = [(16 + 8 + 8 + 16) * 128 * 1024 + 3 * 1024 * 3072, qkv_o[0] + 3 * 2560 * 9728, qkv_o[1] + 3 * 4096 * 12288]
    assert [most_padded(weights) for weights in (*layers, 10**12)] == [8192, 1536, 1024, 16]


def test_a_large_graph_runs_full_steps_only(runner):
    buffers = make_buffers(runner, most=64)
    fits = [buffers.fits(make_step((n,), runner.num_blocks)[0]) for n in (64, 65, 125, 126, 128)]
    assert fits == [True, False, False, True, True]


@pytest.mark.parametrize(
    "lengths, fits", [((128,), True), ((129,), False), ((1,) * 4, True), ((1,) * 5, False), ((64, 65), False)]
)
def test_steps_that_fit(runner, lengths, fits):
    assert make_buffers(runner).fits(make_step(lengths, runner.num_blocks)[0]) == fits


@torch.inference_mode()
def test_steps_of_a_budget_of_one_token_are_padded(monkeypatch):
    """One token in one row would be a decode step to attention."""
    runner = Fused(reference.config(max_num_batched_tokens=1)).runner
    captured = []
    monkeypatch.setattr("engines.fused.runner.Graphs", lambda *_: SimpleNamespace(pool=None))
    monkeypatch.setattr(
        "engines.fused.runner.PrefillGraphs", lambda _model, _draw, buffers, **_: captured.append(buffers)
    )
    monkeypatch.setattr(runner, "features", runner.features | {"prefill_graphs"})
    runner._capture()
    (buffers,) = captured
    sequences, expected = make_step((1,), runner.num_blocks)
    step = fill(buffers, sequences)
    assert not step[2].is_decode
    assert_close(runner.model.lm_head(runner.model(*step)[:1]), expected)


def test_a_cached_prefix_does_not_fit(runner):
    sequence = Sequence(Request("", tuple(range(40)), SamplingParams()))
    sequence.num_cached, sequence.num_scheduled, sequence.block_table = 16, 24, [0, 1, 2]
    assert not make_buffers(runner).fits([sequence])


@pytest.mark.parametrize(("limit", "fused"), [(32, True), (31, False)])
def test_norm_and_linear_are_one_kernel_up_to_a_padded_size(limit, fused):
    options = {"max_fused_prefill_rows": limit, "features": ("-prefill_products",)}
    runner = Fused(reference.config(options=options)).runner
    sequences, expected = make_step((30,), runner.num_blocks)
    rows = []
    for layer in runner.model.layers:
        layer.norm_qkv.register_forward_hook(lambda _module, args, _out: rows.append(len(args[0])))
    assert_close(padded_logits(runner, sequences), expected)
    assert rows == [32] * len(runner.model.layers) * fused


def test_the_last_layer_goes_on_with_the_rows_to_draw_from(runner):
    sequences, _ = make_step((5, 11), runner.num_blocks)
    attended, ended = [], []
    first, last = runner.model.layers[0], runner.model.layers[-1]
    for layer in (first, last):
        layer.plain.self_attn.attention.register_forward_hook(lambda _module, args, _out: attended.append(len(args[0])))
        layer.added_down.register_forward_hook(lambda _module, args, _out: ended.append(len(args[0])))
    runner._prefill(runner._inputs(sequences))
    assert ended == [16, 2]
    if "prefill_attention" not in runner.features:
        assert attended == ([16, 2] if "last_rows" in runner.features else [16, 16])
    else:
        assert attended == []


class LaunchedGraphs(PrefillGraphs):
    """Runs launch by launch what a GPU would replay."""

    def __init__(self, runner) -> None:
        self.model, self.draw, self.buffers = runner.model, runner.step.draw, make_buffers(runner)
        self.stream = torch.full((MAX_SEQUENCES, self.model.config.hidden_size), float("nan"))
        self.graphs = {size: SimpleNamespace(replay=partial(self.launch, size)) for size in SIZES}
        self.ends = SimpleNamespace(replay=self.end)
        self.sizes = []

    def launch(self, size):
        self.sizes.append(size)
        self.buffers.upload(size)
        run_layers(self.model, *self.buffers.inputs(size, self.stream))

    def end(self, rows):
        return self.draw(self.stream[: bucket(rows)], self.buffers.rows)[:rows]


def bucket(rows):
    """Of at most MAX_SEQUENCES."""
    return next(size for size in (1, 2, 4) if size >= rows)


@pytest.fixture
def graphs(runner, monkeypatch):
    graphs = LaunchedGraphs(runner)
    monkeypatch.setattr(runner, "graphs", SimpleNamespace(prefill=graphs, largest=0))
    return graphs


HOT = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
SAMPLINGS = (replace(HOT, temperature=4.0), replace(HOT, temperature=0.0), HOT, replace(HOT, temperature=10.0))


def seeded(sequences, round_):
    """Each with settings and a seed of its own, large ones too."""
    for row, sequence in enumerate(sequences):
        sequence.sampling = SAMPLINGS[(row + round_) % 4]
        sequence.seed = ((round_ << 58) + 1000 * round_ + row) % (1 << 63)
    return sequences


@torch.inference_mode()
@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_draws_are_those_of_a_step_launch_by_launch(runner, graphs, lengths):
    """More steps than the ring has rows; of it nothing is written but the step's own rows and their padding."""
    count, rows = len(lengths), bucket(len(lengths))
    drawn = set()
    for round_ in range(STAGES + 2):
        sequences = seeded(make_step(lengths, runner.num_blocks)[0], round_)
        graphs.buffers.rows.ring.fill_(-7)
        step = runner._inputs(sequences)
        logits = runner._prefill(step)
        tokens = graphs.buffers.rows.flight(sequences).read()
        assert isinstance(step, Padded)
        assert tokens == runner._draw(sequences, logits).tolist()
        ring = graphs.buffers.rows.ring.tolist()
        assert ring.pop(round_ % STAGES) == tokens + [0] * (rows - count) + [-7] * (MAX_SEQUENCES - rows)
        assert ring == [[-7] * MAX_SEQUENCES] * (STAGES - 1)
        drawn |= set(tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "graphs", None)
            step = runner._inputs(sequences)
            assert isinstance(step, HostInputs)
            assert_close(logits, runner._prefill(step))
            assert tokens == runner.run(sequences, True)
    assert len(drawn) > 2


def test_rows_to_draw_from(runner):
    buffers = make_buffers(runner)
    sequences = seeded(make_step((5, 11, 2), runner.num_blocks)[0], 3)
    fill(buffers, sequences)
    rows = buffers.rows
    assert rows.seeds.tolist() == [*[s.seed for s in sequences], 0]
    assert rows.temperatures.tolist() == pytest.approx([*[s.sampling.temperature for s in sequences], 0])
    assert rows.positions.tolist() == [4, 10, 1, -1]
    assert rows.steps.tolist() == [0] * 4


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
def test_draws_of_interpreted_kernels():
    """Of a head in one kernel and apart."""
    for features in (tuple(FEATURES), ("-head",)):
        with kernels.use("triton"), torch.inference_mode():
            runner = Fused(reference.config(options={"features": features, "attention_backend": "triton"})).runner
            sequences, expected = make_step((3, 18, 1), runner.num_blocks)
            seeded(sequences, 1)
            launched = runner.run(sequences, True)
            graphs = LaunchedGraphs(runner)
            runner.graphs = SimpleNamespace(prefill=graphs, largest=0)
            logits = runner._prefill(runner._inputs(sequences))
            assert graphs.buffers.rows.flight(sequences).read() == launched
            assert_close(logits, expected)


def test_requests_through_captured_steps(monkeypatch):
    """Cut prompts, cached prefixes, top_k and top_p beside rows without: the tokens of steps launch by launch."""
    prompts = reference.text_prompts((3, 17, 40, 70, 33))
    hottest = replace(HOT, temperature=10.0)
    samplings = (HOT, replace(hottest, top_k=9), replace(HOT, temperature=0.0), replace(hottest, top_p=0.6), hottest)
    samplings = [replace(sampling, seed=seed) for seed, sampling in enumerate(samplings)]
    requests = [Request(f"{i}", tuple(p), s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]
    requests += [replace(request, request_id=f"{request.request_id} again") for request in requests]
    tokens, kinds = [], []
    for captured in (False, True):
        llm = Fused(reference.config(max_num_batched_tokens=64, prefix_caching=True))
        if captured:
            llm.runner.graphs = SimpleNamespace(prefill=LaunchedGraphs(llm.runner), largest=0)
            run = llm.runner._prefill
            monkeypatch.setattr(llm.runner, "_prefill", lambda step: kinds.append(type(step)) or run(step))  # noqa: B023
        tokens.append([result.token_ids for result in llm.serve(requests)])
    assert tokens[0] == tokens[1]
    assert set(kinds) == {Padded, HostInputs}


def test_logits_of_captured_steps(monkeypatch):
    llm = Fused(reference.config())
    llm.runner.graphs = SimpleNamespace(prefill=LaunchedGraphs(llm.runner), largest=0)
    prompts = reference.text_prompts((3, 17, 40))
    for scored in llm.score(reference.requests(prompts, 3)):
        assert_close(scored.logits, reference.logits(scored.prompt_token_ids, scored.token_ids))
    assert llm.runner.graphs.prefill.sizes == [64]


def test_a_failed_draw_leaves_nothing_behind(monkeypatch):
    """The step's inputs were uploaded and its tokens drawn; run again, it draws the same ones."""
    llm = Fused(reference.config())
    llm.runner.graphs = SimpleNamespace(prefill=LaunchedGraphs(llm.runner), largest=0)
    prompts = reference.text_prompts((3, 17, 40))
    requests = reference.requests(prompts, 6, temperature=1.5, top_k=8, seed=5)
    expected = [result.token_ids for result in llm.serve(requests)]
    choose, calls = llm.runner._choose, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("made up")
        choose(*arguments)

    monkeypatch.setattr(llm.runner, "_choose", fail_once)
    sequences = [llm.add(request) for request in requests]
    with pytest.raises(torch.OutOfMemoryError):
        llm.advance()
    while llm.has_unfinished():
        llm.advance()
    assert [tuple(s.output_token_ids) for s in sequences] == expected
