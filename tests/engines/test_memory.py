"""How many cache blocks a GPU's memory leaves: the arithmetic, by hand, and the steps that the warm-up runs.

tests/gpu/test_memory.py measures the same on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from engines.base import SamplingParams
from engines.fused import LLM as Fused
from engines.fused.prefill_graphs import PrefillGraphs
from engines.nano import LLM
from engines.nano.graphs import DecodeGraphs
from engines.nano.utils import memory
from engines.nano.utils.memory import Memory
from tests.engines import reference

GIB = 2**30


def test_blocks_within_utilization():
    # 80 × 0.5 = 40 may be held; 6 are, a step takes 4 more: 30 are left for blocks of 0.25.
    assert Memory(80 * GIB, 70 * GIB, 6 * GIB).cache_blocks(4 * GIB, 0.5, GIB // 4) == 120


def test_blocks_within_what_others_leave_free():
    # 40 may be held, but of 12 that are free a step needs 4.
    assert Memory(80 * GIB, 12 * GIB, 6 * GIB).cache_blocks(4 * GIB, 0.5, GIB) == 8


def test_blocks_are_whole_and_never_negative():
    assert Memory(80 * GIB, 70 * GIB, 6 * GIB).cache_blocks(4 * GIB + 1, 0.5, GIB) == 29
    assert Memory(80 * GIB, 3 * GIB, 6 * GIB).cache_blocks(4 * GIB, 0.5, GIB) == 0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GiB: what others hold, what torch's allocator reserved here, and what else this process holds."""
    state = {"others": 10 * GIB, "reserved": 2 * GIB, "rest": GIB // 2, "told": None}

    def mem_get_info() -> tuple[int, int]:
        return 80 * GIB - state["others"] - state["reserved"] - state["rest"], 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state["reserved"])
    monkeypatch.setattr(memory, "_told_by_driver", lambda: state["told"])
    return state


def test_ours_is_what_the_driver_tells(gpu):
    gpu["told"] = 5 * GIB
    assert Memory.now(memory.untracked()) == Memory(80 * GIB, 80 * GIB - 25 * GIB // 2, 5 * GIB)


def test_ours_without_the_driver(gpu):
    """Allocator, context, and what came on top of them since the start: here 0.25 GiB of modules and graphs."""
    before = memory.untracked()
    gpu["reserved"], gpu["rest"] = 6 * GIB, gpu["rest"] + GIB // 4
    assert Memory.now(before).ours == 6 * GIB + GIB // 2 + GIB // 4


def test_what_others_take_meanwhile_is_not_ours(gpu):
    before = memory.untracked()
    gpu["others"] += 30 * GIB
    now = Memory.now(before)
    assert now.ours <= 2 * GIB + GIB // 2 + memory.MOST_GROWTH_BYTES
    assert now.free == 80 * GIB - 85 * GIB // 2
    gpu["others"] = 0  # and what they give back is no gain
    assert Memory.now(before).ours == 2 * GIB + GIB // 2


def test_a_number_of_another_process_is_not_believed(gpu):
    gpu["told"] = GIB  # less than torch's allocator holds here
    assert Memory.now(memory.untracked()).ours == 2 * GIB + GIB // 2


def test_warm_up_runs_the_largest_steps(monkeypatch):
    engine = LLM(reference.config(max_model_len=96, max_num_seqs=7, max_num_batched_tokens=300))
    runner, steps, run = engine.runner, [], engine.runner.run

    def record(sequences, is_prefill):
        tokens = run(sequences, is_prefill)
        longest = max(sequence.num_cached + sequence.num_scheduled for sequence in sequences)
        steps.append((is_prefill, len(sequences), sum(s.num_scheduled for s in sequences), longest))
        assert len(tokens) == len(sequences)
        return tokens

    monkeypatch.setattr(runner, "run", record)
    cache_bytes = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(
        torch.cuda, "max_memory_reserved", lambda: cache_bytes.append(runner.cache.nbytes) or 1000 * 2**20
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 600 * 2**20)
    assert runner._warm_up() == 400 * 2**20 - cache_bytes[0]
    assert (True, 3, 288, 96) in steps  # the largest prefill: 300 tokens hold three whole prompts
    assert (True, 3, 285, 96) in steps  # and as chunks, of which something is in the cache
    assert (True, 7, 56, 8) in steps  # several short prompts
    assert (False, 7, 7, 96) in steps  # the largest decode
    assert all(holder.k_cache.numel() == 0 for holder in runner.model.caches())


def test_prompts_of_all_sizes_run_at_the_start():
    """Launches are chosen for all numbers of tokens up to a power of two."""
    runner = Fused(reference.config(max_model_len=64, max_num_seqs=7, max_num_batched_tokens=300)).runner
    steps = runner._prompts_to_warm_up(64)
    assert {1, 32, 64, 128, 256, 512} <= {1 << (sequences * tokens - 1).bit_length() for sequences, tokens in steps}
    assert all(sequences <= 7 and tokens <= 64 and sequences * tokens <= 300 for sequences, tokens in steps)


def test_kernels_of_our_own_attention_run_at_the_start(monkeypatch):
    """By new tokens and earlier ones; three query heads share a key/value head."""
    runner, ran = LLM(reference.config(max_model_len=96, max_num_seqs=7, max_num_batched_tokens=300)).runner, []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_reserved", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(runner, "run", lambda s, is_prefill: ran.append((len(s), s[0].num_scheduled, s[0].num_cached)))
    monkeypatch.setattr(runner, "dtype", torch.bfloat16)
    runner._warm_up()
    assert (1, 11, 85) not in ran
    ran.clear()
    runner.backend_name = "triton"
    runner._warm_up()
    assert {(1, tokens, cached) for tokens in (2, 6, 11, 86) for cached in (0, 96 - tokens)} <= set(ran)
    assert all(tokens + cached <= 96 for _, tokens, cached in ran)


class Launches(list):
    """Of a fused runner, in place of its step."""

    def __call__(self, rows, longest):
        self.append(("decode", rows, longest))

    def draw(self, stream, _rows):
        self.append(("draw", len(stream)))

    def prefill(self, _model, token_ids, *_):
        self.append(("prefill", len(token_ids)))


def test_all_that_is_captured_is_compiled_ahead(monkeypatch):
    runner = Fused(reference.config(max_model_len=600, max_num_seqs=20, max_num_batched_tokens=300)).runner
    runner.features |= {"prefill_graphs"}  # as on a GPU
    launches = runner.step = Launches()
    monkeypatch.setattr("engines.fused.runner.run_layers", launches.prefill)
    monkeypatch.setattr("engines.fused.runner.has_short_launch", lambda rows, *_: rows in (1, 16))
    runner._launch_captured()
    ahead = set(launches)
    launches.clear()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda _self, step, _clear, rows: step(rows))
    monkeypatch.setattr(PrefillGraphs, "_capture", lambda _self, size, _pool: launches.append(("prefill", size)))
    runner._capture()
    assert set(launches) == ahead
    decodes = {("decode", rows, 600) for rows in (1, 2, 4, 8, 16, 20)} | {("decode", rows, 512) for rows in (1, 16)}
    prefills = {("prefill", size) for size in (16, 32, 64, 128, 256, 300)}
    assert ahead == decodes | prefills | {("draw", rows) for rows in (1, 2, 4, 8, 16, 20)}


def test_steps_compiled_ahead_have_no_contexts():
    """The cache is a single block then, and steps before have left rows that reach beyond it."""
    runner = Fused(reference.config(max_model_len=64, options={"features": ["-attention"]})).runner
    runner._bind_cache(4)
    runner.run([runner._warm_up_sequence(60, 59, SamplingParams())] * 2, False)
    runner._bind_cache(1)
    runner._launch_captured()
    assert runner.state.positions.max() < 0


def test_two_layers_are_the_first_and_the_last():
    runner = Fused(reference.config()).runner
    layers = list(runner.model.layers)
    with runner._two_layers():
        assert runner.model.layers == [layers[0], layers[-1]]
    assert runner.model.layers == layers


@pytest.mark.parametrize("given", [None, 640])
@pytest.mark.parametrize("no_graphs", ["", "enforce_eager is set"])
def test_a_start_on_a_gpu_tells_what_it_does(given, no_graphs, monkeypatch):
    """Graphs are captured once more where that is to tell how much the cache may have."""
    runner = LLM(reference.config(kv_cache_tokens=given)).runner
    done = []
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    monkeypatch.setattr(runner, "no_graphs", no_graphs)
    monkeypatch.setattr(runner, "_compile_ahead", lambda: done.append("compile"))
    monkeypatch.setattr(runner, "_warm_up", lambda: done.append("run") or 0)
    monkeypatch.setattr(runner, "_capture", lambda: done.append("capture"))
    monkeypatch.setattr(runner, "_bind_cache", lambda blocks: None)
    monkeypatch.setattr(runner, "_unbind_cache", lambda: None)
    monkeypatch.setattr(runner, "untracked_at_start", 0, raising=False)
    monkeypatch.setattr(Memory, "now", lambda untracked_at_start: Memory(GIB, GIB, 0))
    assert runner._fit_cache() > 0
    captures = given is None and not no_graphs
    assert done == ["compile", "run", *["capture"] * captures]
    told = ["load weights", "run steps of all kinds", *["capture graphs to see what memory they take"] * captures]
    assert list(runner.stages.seconds) == told
