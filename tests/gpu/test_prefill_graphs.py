"""Captured prefill steps: the logits of transformers and of the same step launch by launch, whatever ran before.

Run as a program it says for each size of step what capture, replay and a whole step take, with norm and linear as one
kernel and apart:

    python -m tests.gpu.test_prefill_graphs [model, by default qwen3-0.6b]
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

import pytest
import torch

from engines.base import EngineConfig, Request, SamplingParams
from engines.fused import LLM
from engines.fused.prefill_graphs import MAX_SEQUENCES, PrefillBuffers, PrefillGraphs, token_sizes
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from tests.engines import reference
from tests.engines.test_prefill_graphs import FEW, SIZES, STEPS, make_inputs

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
    return PrefillGraphs(runner.model, buffers, max_fused_rows=fused_rows)


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
        graphs.run(make_inputs((size,), blocks)[0])
    weight.copy_(kept)
    assert all(rows[0].isnan().all() for rows in graphs.outputs.values())


@torch.inference_mode()
def test_replays(runner, graphs):
    of_reference, of_launches = PRECISION[str(runner.dtype).removeprefix("torch.")]
    for lengths in (*STEPS, *reversed(STEPS)):  # each after a larger and after a smaller one
        inputs, expected = make_inputs(lengths, runner.num_blocks)
        expected = expected.cuda()
        runner.cache.zero_()
        launched = runner._prefill(inputs).float()
        cached = runner.cache.clone()
        poison(graphs, runner.num_blocks)
        runner.cache.fill_(float("nan"))
        logits = graphs.run(inputs)
        assert error(launched, expected) < of_reference, lengths
        assert error(logits, expected) < of_reference, lengths
        assert error(logits, launched) < of_launches, lengths
        written = ~runner.cache.flatten(2, 3).isnan()
        slots = torch.zeros(written.shape[2], dtype=torch.bool, device="cuda")
        slots[torch.from_numpy(inputs.slot_mapping).long().cuda()] = True
        assert torch.equal(written.flatten(3).all(-1), slots.expand(written.shape[:3])), lengths
        assert torch.equal(written.flatten(3).any(-1), slots.expand(written.shape[:3])), lengths
        assert error(runner.cache.flatten(2, 3)[:, :, slots], cached.flatten(2, 3)[:, :, slots].float()) < of_launches


@torch.inference_mode()
def test_steps_in_flight_do_not_share_their_inputs(runner, graphs):
    """All launched before any is read, behind a kernel that keeps the GPU busy."""
    steps = [make_inputs(lengths, runner.num_blocks) for lengths in STEPS]
    torch.cuda._sleep(50_000_000)
    logits = [graphs.run(inputs) for inputs, _ in steps]
    of_reference, _ = PRECISION[str(runner.dtype).removeprefix("torch.")]
    for got, (_, expected) in zip(logits, steps, strict=True):
        assert error(got, expected.cuda()) < of_reference


def random_inputs(tokens: int, sequences: int, block_size: int, vocab: int) -> PrefillInputs:
    made, block = [], 0
    for length in [tokens // sequences] * sequences:
        token_ids = torch.randint(vocab, (length,)).tolist()
        sequence = Sequence(Request("", tuple(token_ids), SamplingParams()))
        sequence.num_scheduled = length
        sequence.block_table = list(range(block, block := block - (-length // block_size)))
        made.append(sequence)
    return PrefillInputs.of(made, block_size)


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
        call().argmax(-1).tolist()
        return 1000 * (time.perf_counter() - start)

    return statistics.median(once() for _ in range(REPEATS))


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
        inputs = random_inputs(size, 1, runner.block_size, conf.vocab_size)
        many = random_inputs(size, 16, runner.block_size, conf.vocab_size)
        for max_fused_rows in (size, 0):  # compiles
            PrefillGraphs(runner.model, buffers, max_fused_rows)
        one = PrefillGraphs(runner.model, buffers, size)
        torch.cuda.synchronize()
        start = time.perf_counter()
        two = PrefillGraphs(runner.model, buffers, 0)
        torch.cuda.synchronize()
        capture_ms = 1000 * (time.perf_counter() - start)
        buffers.fill(inputs)
        replays = [gpu_ms(graphs.graphs[size].replay) for graphs in (one, two)]
        buffers.fill(many)
        replays.append(gpu_ms(two.graphs[size].replay))
        steps = [wall_ms(partial(graphs.run, inputs)) for graphs in (one, two)]
        launched = wall_ms(partial(runner._prefill, inputs))
        print(f"{size:>12}" + "".join(f"{ms:>12.3f}" for ms in (capture_ms, *replays, *steps, launched)), flush=True)
        del one, two
    for attempt in ("all sizes", "again"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        start = time.perf_counter()
        buffers = PrefillBuffers(token_sizes(tokens), MAX_SEQUENCES, runner.max_blocks, runner.device)
        graphs = PrefillGraphs(runner.model, buffers)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch.cuda.empty_cache()
        held = (torch.cuda.memory_reserved() - before) / 2**20
        print(f"{attempt}: {len(graphs.graphs)} graphs in {seconds:.2f} s, {held:.0f} MiB")
        del graphs, buffers
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
