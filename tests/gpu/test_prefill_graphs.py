"""Captured prefill steps: logits of transformers, logits and tokens of the same step launch by launch, whatever ran
before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.base import Request, SamplingParams
from engines.fused import LLM, attention, products
from engines.fused.prefill_graphs import PrefillBuffers, PrefillGraphs
from engines.fused.state import STAGES
from engines.nano.prefill import PrefillInputs
from kernels.prefill_linear import Launch
from tests.engines import reference
from tests.engines.test_prefill_graphs import FEW, SIZES, STEPS, make_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Of the logits' norm: against transformers in float32, and against the same step unpadded.
PRECISION = {"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 3e-2)}


@pytest.fixture(scope="module", params=PRECISION)
def runner(request):
    config = reference.config(
        options={"enforce_eager": True}, device="cuda", dtype=request.param, kv_cache_tokens=2048, max_num_seqs=8
    )
    engine = LLM(config)
    yield engine.runner
    engine.close()


@pytest.fixture(scope="module", params=((0, 0), (SIZES[-1], 0), (0, FEW)), ids=("apart", "one kernel", "as in decode"))
def graphs(runner, request):
    fused_rows, few = request.param
    buffers = PrefillBuffers(SIZES, 4, runner.max_blocks, runner.device, dependent=True, few=few)
    for layer in runner.model.layers:
        layer.max_prefill_rows = fused_rows
    made = PrefillGraphs(runner.model, runner.step.draw, buffers)
    for layer in runner.model.layers:
        layer.max_prefill_rows = 0
    return made


def run(graphs, sequences):
    """Logits of a captured step."""
    assert graphs.fits(sequences)
    return graphs.run(graphs.buffers.fill(sequences, 16))


def error(logits, expected):
    assert logits.shape == expected.shape
    return ((logits.float() - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def poison(graphs, blocks):
    """Make NaN of all that the graphs' memory holds, by a full step of each size from an embedding of NaN."""
    weight = graphs.model.model.embed_tokens.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    for size in SIZES:
        assert run(graphs, make_step((size,), blocks)[0]).isnan().all()
    weight.copy_(kept)
    assert graphs.stream[0].isnan().all()


@torch.inference_mode()
def test_replays(runner, graphs):
    of_reference, of_launches = PRECISION[str(runner.dtype).removeprefix("torch.")]
    for lengths in (*STEPS, *reversed(STEPS)):  # each after a larger and after a smaller one
        sequences, expected = make_step(lengths, runner.num_blocks)
        expected = expected.cuda()
        runner.cache.zero_()
        launched = runner._prefill(runner._inputs(sequences)).float()
        cached = runner.cache.clone()
        poison(graphs, runner.num_blocks)
        runner.cache.fill_(float("nan"))
        logits = run(graphs, sequences)
        assert error(launched, expected) < of_reference, lengths
        assert error(logits, expected) < of_reference, lengths
        assert error(logits, launched) < of_launches, lengths
        written = ~runner.cache.flatten(2, 3).isnan()
        slots = torch.zeros(written.shape[2], dtype=torch.bool, device="cuda")
        slots[torch.from_numpy(PrefillInputs.of(sequences, 16).slot_mapping).long().cuda()] = True
        assert torch.equal(written.flatten(3).all(-1), slots.expand(written.shape[:3])), lengths
        assert torch.equal(written.flatten(3).any(-1), slots.expand(written.shape[:3])), lengths
        assert error(runner.cache.flatten(2, 3)[:, :, slots], cached.flatten(2, 3)[:, :, slots].float()) < of_launches


@torch.inference_mode()
def test_steps_in_flight_do_not_share_their_inputs(runner, graphs):
    """All launched before any is read, the first behind a kernel that keeps the GPU busy: what is in the host's memory
    has been copied before the next step is written to it."""
    steps = [make_step(lengths, runner.num_blocks) for lengths in STEPS]
    torch.cuda._sleep(50_000_000)
    logits = [run(graphs, sequences).clone() for sequences, _ in steps]
    of_reference, _ = PRECISION[str(runner.dtype).removeprefix("torch.")]
    for got, (_, expected) in zip(logits, steps, strict=True):
        assert error(got, expected.cuda()) < of_reference


@torch.inference_mode()
def test_products_with_their_ends(runner, monkeypatch):
    """Their descriptors are part of the graph: replayed on other steps' rows, they give these steps' logits."""
    launches = {"prefill_qkv_rope": Launch(64, 64, 32, 4, 3), "prefill_gate_up": Launch(64, 32, 32, 4, 3, per_sm=0)}
    asked = []
    monkeypatch.setattr(products, "best_prefill_launch", lambda kernel, *_: asked.append(kernel) or launches[kernel])
    monkeypatch.setattr(attention, "MAX_PREFILL_ATTENTION", 0)
    buffers = PrefillBuffers(SIZES, 4, runner.max_blocks, runner.device)
    graphs = PrefillGraphs(runner.model, runner.step.draw, buffers)
    assert set(asked) == set(launches)
    of_reference, _ = PRECISION[str(runner.dtype).removeprefix("torch.")]
    for lengths in STEPS:
        sequences, expected = make_step(lengths, runner.num_blocks)
        if graphs.fits(sequences):
            assert error(run(graphs, sequences), expected.cuda()) < of_reference


LENGTHS = (3, 17, 40, 1, 16, 33, 8, 5, 21, 2, 61, 9, 30, 12, 7, 15)
HOT = SamplingParams(temperature=3.0, max_tokens=6, ignore_eos=True)
SAMPLINGS = {
    "greedy": [replace(HOT, temperature=0.0)],
    "sampled": [HOT, replace(HOT, temperature=0.8), replace(HOT, temperature=10.0)],
    "with top_k and top_p": [HOT, replace(HOT, top_k=9), replace(HOT, temperature=0.0), replace(HOT, top_p=0.6)],
}


@pytest.fixture(scope="module", params=["head in one kernel", "head apart"])
def engines(request):
    """With graphs and launch by launch."""
    apart = {} if request.param == "head in one kernel" else {"features": ["-head"]}
    made = [
        LLM(
            reference.config(
                options=apart | {"enforce_eager": eager}, device="cuda", dtype="float32", kv_cache_tokens=4096,
                max_num_seqs=16, max_num_batched_tokens=512,
            )
        )
        for eager in (False, True)
    ]  # fmt: skip
    yield made
    for engine in made:
        engine.close()


def asked(count, samplings):
    prompts = reference.text_prompts(LENGTHS[:count], seed=count)
    return [
        Request(f"{row}", tuple(prompt), replace(samplings[row % len(samplings)], seed=(row << 59) + 7 * row))
        for row, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("samplings", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_those_of_steps_launch_by_launch(engines, count, samplings, monkeypatch):
    """Often enough that the ring comes round; the first tokens, which prefill draws, and some of decode."""
    captured, eager = engines
    replayed, replay = [], captured.runner.graphs.prefill.run
    monkeypatch.setattr(captured.runner.graphs.prefill, "run", lambda step: replayed.append(step.rows) or replay(step))
    requests = asked(count, samplings)
    expected = [result.token_ids for result in eager.serve(requests)]
    for _ in range(STAGES + 1):
        assert [result.token_ids for result in captured.serve(requests)] == expected
    assert replayed == [count] * (STAGES + 1)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("samplings", SAMPLINGS.values(), ids=SAMPLINGS)
def test_draws_from_the_same_logits(engines, count, samplings):
    """What the graph draws is what separate launches draw from the logits that it leaves; rows of padding draw 0, and
    of the ring nothing else is written."""
    runner = engines[0].runner
    graphs = runner.graphs.prefill
    rows, bucket = graphs.buffers.rows, next(size for size in graphs.ends.sizes if size >= count)
    sequences = [engines[0].add(request) for request in asked(count, samplings)]
    assert engines[0].scheduler.schedule() == (sequences, True)
    torch.cuda.synchronize()
    rows.ring.fill_(-7)
    stage = rows.launched % STAGES
    logits = runner._prefill(runner._inputs(sequences))
    kept = logits.clone()
    tokens = runner._take_off(sequences, logits, rows).read()
    assert torch.equal(kept, logits)
    assert tokens == runner._draw(sequences, logits).tolist()
    ring = rows.ring.tolist()
    assert ring.pop(stage) == tokens + [0] * (bucket - count) + [-7] * (16 - bucket)
    assert ring == [[-7] * 16] * (STAGES - 1)
    engines[0].abort([request.request_id for request in asked(count, samplings)])


@pytest.mark.parametrize("count", [1, 3, 16])
def test_logits_that_are_kept(engines, count):
    """Of steps of every number of rows, one after the other."""
    for scored in engines[0].score(asked(count, SAMPLINGS["greedy"])):
        expected = reference.logits(scored.prompt_token_ids, scored.token_ids)
        assert error(scored.logits, expected) < PRECISION["float32"][0]
