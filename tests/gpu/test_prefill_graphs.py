"""Captured prefill steps: logits of transformers, logits and tokens of the same step launch by launch, whatever ran
before.

Run as a program it says for each size of step what capture, replay and a whole step take, with norm and linear as one
kernel and apart:

    python -m tests.gpu.test_prefill_graphs [model, by default qwen3-0.6b]
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from engines.base import EngineConfig, Request, SamplingParams
from engines.fused import LLM, layers
from engines.fused.prefill_graphs import MAX_SEQUENCES, PrefillBuffers, PrefillGraphs, token_sizes
from engines.fused.state import STAGES
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from kernels.prefill_linear import Launch
from tests.engines import reference
from tests.engines.test_prefill_graphs import FEW, SIZES, STEPS, make_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Of the logits' norm: against transformers in float32, and against the same step unpadded.
PRECISION = {"float32": (1e-4, 1e-4), "bfloat16": (5e-2, 3e-2)}
REPEATS = 20


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
    return PrefillGraphs(runner.model, runner.step.draw, buffers, max_fused_rows=fused_rows)


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
    monkeypatch.setattr(layers, "best_prefill_launch", lambda kernel, *_: asked.append(kernel) or launches[kernel])
    monkeypatch.setattr(layers, "MAX_PREFILL_ATTENTION", 0)
    buffers = PrefillBuffers(SIZES, 4, runner.max_blocks, runner.device)
    graphs = PrefillGraphs(runner.model, runner.step.draw, buffers, max_fused_rows=0)
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


def random_step(tokens: int, sequences: int, block_size: int, vocab: int) -> list[Sequence]:
    made, block = [], 0
    for length in [tokens // sequences] * sequences:
        token_ids = torch.randint(vocab, (length,)).tolist()
        sequence = Sequence(Request("", tuple(token_ids), SamplingParams()))
        sequence.num_scheduled = length
        sequence.block_table = list(range(block, block := block - (-length // block_size)))
        made.append(sequence)
    return made


def gpu_ms(call) -> float:
    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)  # so that the host is ahead
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return statistics.median(once() for _ in range(REPEATS))


def wall_ms(call) -> float:
    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)

    return statistics.median(once() for _ in range(REPEATS))


def step_through(graphs: PrefillGraphs, sequences: list[Sequence], block_size: int) -> list[int]:
    """From the sequences to their tokens on the host."""
    buffers = graphs.buffers
    graphs.run(buffers.fill(sequences, block_size))
    return buffers.rows.flight(sequences).read()


@torch.inference_mode()
def main(model: str = "qwen3-0.6b") -> None:
    """Print the table of this module's docstring."""
    from harness.checkpoints import random_checkpoint
    from harness.config import compose

    conf = compose([f"model={model}"]).model
    tokens = 4096
    engine = LLM(
        EngineConfig(
            random_checkpoint(conf, 0), max_model_len=tokens, max_num_seqs=16, max_num_batched_tokens=4 * tokens,
            kv_cache_tokens=4 * tokens, options={"enforce_eager": True},
        )
    )  # fmt: skip
    runner = engine.runner
    print(f"{model}, {torch.cuda.get_device_name()}, attention {runner.backend_name}; ms, medians of {REPEATS}")
    print("'one' and 'two': norm and linear as one kernel, and apart; x16: the same tokens in 16 sequences")
    columns = ("tokens", "capture", "replay one", "replay two", "two, x16", "step one", "step two", "launched")
    print("".join(f"{name:>12}" for name in columns), flush=True)
    for size in token_sizes(tokens):
        buffers = PrefillBuffers((size,), MAX_SEQUENCES, runner.max_blocks, runner.device)
        single = random_step(size, 1, runner.block_size, conf.vocab_size)
        many = random_step(size, 16, runner.block_size, conf.vocab_size)
        for max_fused_rows in (size, 0):  # compiles
            PrefillGraphs(runner.model, runner.step.draw, buffers, max_fused_rows)
        one = PrefillGraphs(runner.model, runner.step.draw, buffers, size)
        torch.cuda.synchronize()
        start = time.perf_counter()
        two = PrefillGraphs(runner.model, runner.step.draw, buffers, 0)
        torch.cuda.synchronize()
        capture_ms = 1000 * (time.perf_counter() - start)
        buffers.upload(buffers.fill(single, runner.block_size).size)
        replays = [gpu_ms(graphs.graphs[size].replay) for graphs in (one, two)]
        buffers.upload(buffers.fill(many, runner.block_size).size)
        replays.append(gpu_ms(two.graphs[size].replay))
        steps = [wall_ms(partial(step_through, graphs, single, runner.block_size)) for graphs in (one, two)]
        launched = wall_ms(lambda: runner.run(single, True))  # noqa: B023
        print(f"{size:>12}" + "".join(f"{ms:>12.3f}" for ms in (capture_ms, *replays, *steps, launched)), flush=True)
        del one, two
    for attempt in ("all sizes", "again"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        start = time.perf_counter()
        buffers = PrefillBuffers(token_sizes(tokens), MAX_SEQUENCES, runner.max_blocks, runner.device)
        graphs = PrefillGraphs(runner.model, runner.step.draw, buffers)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch.cuda.empty_cache()
        held = (torch.cuda.memory_reserved() - before) / 2**20
        print(f"{attempt}: {len(graphs.graphs)} graphs in {seconds:.2f} s, {held:.0f} MiB")
        del graphs, buffers
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
