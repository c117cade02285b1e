"""nano and fused against transformers: the same greedy tokens, whatever the scheduler does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from engines.fused import LLM as Fused
from engines.fused import attention, draw, products
from engines.fused.features import FusedOptions
from engines.nano import LLM as Nano
from engines.nano.layers.activation import SiluMul
from engines.nano.layers.norm import HeadNorm, RMSNorm
from engines.nano.layers.rotary import RotaryEmbedding
from engines.nano.layers.sampler import Sampler
from kernels.causal_attention import Launch as CausalLaunch
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_linear import decode_linear_half_norm
from kernels.decode_linear_launch import Launch
from kernels.prefill_linear import Launch as PrefillLaunch
from tests.engines import reference

LENGTHS = (1, 16, 17, 40)
NUM_TOKENS = 6

VARIANTS = {
    "nano": (Nano, {}),
    "fused": (Fused, {}),
    "fused, norm and linear apart in long prompts": (Fused, {"max_fused_prefill_rows": 30}),
    "fused, attention apart": (Fused, {"features": ("device_loop", "rope_cache", "norm_gate_up")}),
    "fused, nothing fused": (Fused, {"features": ()}),
}
INTERPRETED = {
    "nano": (Nano, {"attention_backend": "triton"}),
    "fused": (Fused, {"attention_backend": "triton", "max_fused_prefill_rows": 64}),
}


@pytest.fixture(scope="module")
def prompts():
    return reference.text_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(prompts):
    return reference.greedy(prompts, NUM_TOKENS)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    engine, options = request.param
    return lambda **changes: engine(reference.config(options=options, **changes))


def tokens_of(engine, requests):
    return [list(result.token_ids) for result in engine.serve(requests)]


def step(engine):
    engine.advance()
    return engine.last_step()


def test_ragged_batch(variant, prompts, expected):
    assert tokens_of(variant(), reference.requests(prompts, NUM_TOKENS)) == expected


def test_chunked_prefill(variant, prompts, expected):
    engine = variant(max_num_batched_tokens=24)
    requests = reference.requests(prompts, NUM_TOKENS)
    for request in requests:
        engine.add(request)
    first = step(engine)
    second = step(engine)
    assert (first.kind, first.new_tokens, second.kind, second.new_tokens) == ("prefill", 24, "prefill", 24)
    assert first.scheduled[-1].new_tokens < len(prompts[2])  # cut in the middle
    assert second.scheduled[0] == (requests[2].request_id, len(prompts[2]) - 7, 7)
    engine.abort([request.request_id for request in requests])
    assert tokens_of(engine, requests) == expected


def test_a_chunk_one_token_short_of_its_prompt_yields_no_token(variant, prompts):
    engine = variant(max_num_batched_tokens=16)
    (request,) = reference.requests([prompts[2]], 1)
    assert len(request.prompt_token_ids) == 17
    engine.add(request)
    assert step(engine).tokens == ()
    assert len(step(engine).tokens) == 1


def test_preemption(variant, prompts, expected):
    engine = variant(kv_cache_tokens=64)
    assert tokens_of(engine, reference.requests(prompts, NUM_TOKENS)) == expected
    assert engine.notes["preemptions"] > 0


def test_prefix_reuse(variant, prompts, expected):
    engine = variant(prefix_caching=True)
    requests = reference.requests(prompts, NUM_TOKENS)
    assert tokens_of(engine, requests) == expected
    for request in requests:
        engine.add(request)
    first = step(engine)
    # All full blocks of each prompt but the one with its last token come from the first round's cache.
    assert [s.context_len for s in first.scheduled] == [(len(p) - 1) // 16 * 16 for p in prompts]
    engine.abort([request.request_id for request in requests])
    assert tokens_of(engine, requests) == expected


def test_scores_are_the_models_logits(variant, prompts):
    for scored in variant().score(reference.requests(prompts[:3], 6)):
        want = reference.logits(scored.prompt_token_ids, scored.token_ids)
        assert scored.logits.shape == want.shape
        assert (scored.logits - want).norm() / want.norm() < 1e-5
        assert torch.equal(scored.logits.argmax(-1), torch.tensor(scored.token_ids))


HALVES = {
    "all": ((), (), 5),
    "of gate and up alone": (("-norm_qkv",), (), 3),
    "none": (("-half_norm",), (), 0),
    "none after o_proj's launch": ((), (192,), 2),
    "none after down_proj's launch": ((), (256,), 3),
    "none after either launch": ((), (192, 256), 0),
}
"""What is left out, K of products whose launches make none → norms of a decode step that are made in halves, with 3
layers: not the first, nor the head's."""


@pytest.mark.parametrize(("features", "apart", "halves"), HALVES.values(), ids=HALVES.keys())
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_norms_in_halves(path, features, apart, halves, monkeypatch, prompts, expected):
    """As with many rows. Counted, because the tokens do not tell how they were made."""
    if path == "triton" and not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    made = []

    def half_norm(*arguments, **keywords):
        made.append(decode_linear_half_norm(*arguments, **keywords))
        return made[-1]

    def tiled(rows, out, k, gated, *_):
        return Launch("tiled", 16, 32, 4, block_m=16, num_stages=2, halves=k not in apart or gated)

    monkeypatch.setattr(products, "best_launch", tiled)
    monkeypatch.setattr(products, "decode_linear_half_norm", half_norm)
    with kernels.use(path):
        engine = Fused(reference.config(options={"features": features or FusedOptions().features}))
        assert tokens_of(engine, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]
    assert len(made) == 2 * halves


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_decode_may_use_prefills_kernel(path, prompts, expected, monkeypatch):
    """Where that was measured to be faster for gate and up, behind a norm; nothing makes half of that norm."""
    if path == "triton" and not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    tiled, prefills = Launch("tiled", 16, 32, 4, block_m=16, num_stages=2), PrefillLaunch(16, 32, 32, 4, 2)
    monkeypatch.setattr(products, "best_launch", lambda rows, out, k, gated, *_: None if gated else tiled)
    monkeypatch.setattr(products, "best_prefill_gate_up", lambda *shape: prefills)
    ran, made = [], []
    gate_up, half_norm = kernels.prefill_gate_up, decode_linear_half_norm
    monkeypatch.setattr(kernels, "prefill_gate_up", lambda *a, **options: ran.append(a[2]) or gate_up(*a, **options))
    monkeypatch.setattr(
        products, "decode_linear_half_norm", lambda *a, **options: made.append(1) or half_norm(*a, **options)
    )
    with kernels.use(path):
        engine = Fused(reference.config())
        assert tokens_of(engine, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]
    assert ran == [prefills] * 2 * 3 and len(made) == 2 * 2


EPILOGUES = {
    "wherever they can": (("-prefill_attention",), 3 * 3, 3 * 2),
    "all rows to the end": (("-prefill_attention", "-last_rows"), 3 * 3, 3 * 2),
    "but in short prompts' attention": (("-head",), 2 * 3, 3 * 2),
    "nowhere": (("-prefill_epilogues",), 0, 0),
}
"""What is left out → launches in three steps and three layers: of projections that rotate, of gates and ups that end
with their activation. The first step is of a new prompt alone; the last layer's gate and up are of rows to draw from.
"""


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
@pytest.mark.parametrize(("left_out", "qkv", "gate_up"), EPILOGUES.values(), ids=EPILOGUES.keys())
def test_products_of_prefill_with_their_ends(left_out, qkv, gate_up, prompts, expected, monkeypatch):
    """As where they were measured to be faster: the same tokens, from the kernels that were asked for."""
    launches = {"prefill_qkv_rope": PrefillLaunch(16, 64, 32, 4, 2), "prefill_gate_up": PrefillLaunch(16, 32, 32, 4, 2)}
    monkeypatch.setattr(products, "best_prefill_launch", lambda kernel, *shape: launches[kernel])
    ran = []
    for name in launches:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, kernel=kernel, **options: ran.append(kernel) or kernel(*a, **options)
        )
    options = {"attention_backend": "triton", "features": left_out}
    with kernels.use("triton"):
        engine = Fused(reference.config(options=options, max_num_batched_tokens=12))
        assert tokens_of(engine, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]
    assert ran.count(kernels.FUSIONS["prefill_qkv_rope"].function) == qkv
    assert ran.count(kernels.FUSIONS["prefill_gate_up"].function) == gate_up


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("rotated", ["prefill_qkv_rope", "rope_cache"])
def test_attention_of_longer_prompts(rotated, path, prompts, expected, monkeypatch):
    """Where it was measured to be faster, in the steps in which nothing of the prompts is in the cache."""
    if path == "triton" and not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    launch, ran = CausalLaunch(16, 16, 4, 2), []
    attend = kernels.causal_attention
    monkeypatch.setattr(attention, "MAX_PREFILL_ATTENTION", 0)
    monkeypatch.setattr(attention, "best_causal_launch", lambda *shape: launch)
    if rotated == "prefill_qkv_rope":
        qkv = PrefillLaunch(16, 64, 32, 4, 2)
        monkeypatch.setattr(products, "best_prefill_launch", lambda kernel, *_: qkv if kernel == rotated else None)
    monkeypatch.setattr(
        kernels, "causal_attention", lambda *a, **options: ran.append(options["launch"]) or attend(*a, **options)
    )
    with kernels.use(path):
        engine = Fused(reference.config(options={"attention_backend": "torch"}, max_num_batched_tokens=12))
        assert tokens_of(engine, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]
    # Three steps, of which the first is of new prompts alone; the last layer goes on with single rows.
    assert ran == [launch] * 2


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
@pytest.mark.parametrize(("engine", "options"), INTERPRETED.values(), ids=INTERPRETED.keys())
def test_interpreted_kernels(engine, options, prompts, expected):
    """All of an engine's kernels at once, as they run on a GPU: two ragged sequences, one prompt in two chunks."""
    with kernels.use("triton"):
        made = engine(reference.config(options=options, max_num_batched_tokens=16))
        assert tokens_of(made, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]


@pytest.mark.parametrize("features", [FusedOptions().features, ("-head",)], ids=["all features", "without the head"])
def test_fused_leaves_nothing_to_torchs_compiler(features, prompts, monkeypatch):
    """Which takes seconds to import: a start with nothing else to compile would wait for it alone."""

    def compiled(*_):
        raise AssertionError("nano's, which torch compiles on a GPU")

    methods = (RMSNorm, "normalise"), (RMSNorm, "add_and_normalise"), (HeadNorm, "normalise"), (SiluMul, "forward")
    for owner, method in (*methods, (RotaryEmbedding, "rotate"), (Sampler, "draw")):
        monkeypatch.setattr(owner, method, compiled)
    engine = Fused(reference.config(options={"features": features}, max_num_batched_tokens=24))
    requests = reference.requests(prompts, 3)
    hot = [replace(r, sampling=replace(r.sampling, temperature=0.7, top_k=5, top_p=0.9)) for r in requests[1:]]
    assert all(len(tokens) == 3 for tokens in tokens_of(engine, [requests[0], *hot]))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_many_rows_may_take_the_heads_kernel(path, prompts, expected, monkeypatch):
    """Where that was measured to be faster than cuBLAS; their logits go where cuBLAS would write them."""
    if path == "triton" and not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off")
    chosen = [HeadLaunch(tiles=PrefillLaunch(16, 128, 32, 4, 2)), HeadLaunch(), None]
    ran, head = [], kernels.decode_head

    def run_head(*arguments, out, **options):
        ran.append((out is not None, len(arguments[0])))
        return head(*arguments, out=out, launch=chosen[0], **options)

    monkeypatch.setattr(draw, "best_launch", lambda *shape: chosen[0])
    monkeypatch.setattr(kernels, "decode_head", run_head)
    monkeypatch.setattr(draw, "FEW_ROWS", 1)
    with kernels.use(path):
        for features, taken in ((FusedOptions().features, [(True, 2)] * 2), (("-head",), [])):
            engine = Fused(reference.config(options={"features": features}))
            assert tokens_of(engine, reference.requests(prompts[1:3], 3)) == [tokens[:3] for tokens in expected[1:3]]
            assert ran == taken
            ran.clear()
        logits = engine.runner.step.draw.lm_head.memory
        for launch, many in zip(chosen, (True, False, False), strict=True):
            chosen[0] = launch
            hidden = logits.new_empty(2, engine.runner.model.lm_head.matrix.shape[1])
            assert engine.runner.step.draw.head.takes(hidden) == many
            assert engine.runner.step.draw.head.takes(hidden[:1]) == (launch is not None)
