"""Blocks, on an engine whose clock is ours: their values are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engines.base import Request, RequestResult, SamplingParams
from harness import machine, rounds
from harness.config import compose
from harness.instruments.nvtx import Ranges
from harness.limits import Work
from harness.measurement import Measurement
from harness.progress import Reporter
from harness.results import RunWriter, load
from harness.rounds import BlockFailed, Blocks, items
from harness.workloads import Prompts
from tests.harness.scripted_runs import Scripted


class Clocked:
    """Takes 7 ms for prompts and 2 ms for each further token of the longest request."""

    name, arm = "clocked", "default"
    PROMPT_S, TOKEN_S = 0.007, 0.002

    def __init__(self, short_of: int = 0) -> None:
        self.now_s = 100.0
        self.prompts: list[tuple[int, ...]] = []
        self.short_of = short_of

    def serve(self, requests):
        self.prompts += [r.prompt_token_ids for r in requests]
        self.now_s += self.PROMPT_S + self.TOKEN_S * (max(r.sampling.max_tokens for r in requests) - 1)
        return [
            RequestResult(r.request_id, 1, (0,) * (r.sampling.max_tokens - self.short_of), 0.0, (), "length")
            for r in requests
        ]


@pytest.fixture
def clocked(monkeypatch) -> Clocked:
    engine = Clocked()
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: engine.now_s))
    return engine


def _work(*overrides: str) -> Work:
    return Work.of(compose(["engine=nano", "model=tiny", *overrides]), "cuda")


def test_tpot_is_a_call_less_its_first_token(clocked) -> None:
    prefill, *_, decode = items(_work("workload=tpot"))
    blocks = Blocks(clocked, Prompts(100, 0), 0.6, [])
    assert blocks.measure(prefill) == pytest.approx([7.0] * 5)
    assert blocks.measure(decode) == pytest.approx([2.0])
    assert (decode.work.batch_size, decode.work.prompt_len, decode.work.output_len) == (256, 128, 129)
    assert decode.key == {
        "metric": "tpot_ms", "phase": "decode", "batch_size": 256, "tokens": 128, "output_len": 129
    }  # fmt: skip


def test_throughput_counts_output_tokens_per_second(clocked) -> None:
    requests = [
        Request(f"{i}", (1,) * 5, SamplingParams(max_tokens=n, ignore_eos=True)) for i, n in enumerate((11, 40))
    ]
    (item,) = items(Work([], requests))
    assert item.higher_is_better
    assert Blocks(clocked, Prompts(100, 0), 0.6, requests).measure(item) == pytest.approx([51 / (0.007 + 39 * 0.002)])


def test_no_prompt_comes_twice_and_every_engine_gets_the_same(clocked) -> None:
    prefill, *_, decode = items(_work("workload=tpot"))
    seen = []
    for _ in range(2):
        clocked.prompts = []
        blocks = Blocks(clocked, Prompts(10_000, 3), 0.6, [])
        for item in (prefill, decode, decode):
            blocks.measure(item)
        seen.append(clocked.prompts)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == len(seen[0]) == 6 + 4 * 256


def test_tokens_that_did_not_come_make_no_value(monkeypatch) -> None:
    engine = Clocked(short_of=1)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: engine.now_s))
    *_, decode = items(_work("workload=tpot"))
    blocks = Blocks(engine, Prompts(100, 0), 0.6, [])
    with pytest.raises(BlockFailed, match="256 tokens too few"):
        blocks.measure(decode)
    row = blocks.row(decode, 0, 3, 1.5)
    assert (row["value"], row["samples"], row["round"], row["status"]) == (None, 0, 3, "256 tokens too few came back.")


def test_a_tpot_below_nothing_is_no_value(clocked) -> None:
    clocked.TOKEN_S = 0.0
    *_, decode = items(_work("workload=tpot"))
    with pytest.raises(BlockFailed, match="no longer than one"):
        Blocks(clocked, Prompts(100, 0), 0.6, []).measure(decode)


def test_steps_that_still_warm_up_do_not_count(monkeypatch) -> None:
    """13 slow steps before 51 of 2 ms: the three batches of five that are slow go."""
    engine = Scripted()
    advance, now_ns = engine.advance, [0]

    def clocked_advance() -> None:
        advance()
        decoded = sum(line.startswith("decode") for line in engine.log)
        now_ns[0] += 2_000_000 if decoded > 16 else 9_000_000  # 3 come before those that are timed

    monkeypatch.setattr(engine, "advance", clocked_advance)
    monkeypatch.setattr("harness.passes.time", SimpleNamespace(perf_counter_ns=lambda: now_ns[0]))
    item = items(_work("workload=latency", "workload.prefill=[]", "workload.decode=[[4,256]]"))[0]
    samples = Blocks(engine, Prompts(100, 0), 0.6, []).measure(item)
    assert samples == pytest.approx([2.0] * 49)


@pytest.mark.parametrize(
    ("states", "marks", "kept"),
    [
        (
            [{"throttled": False, "throttle_reasons": ["gpu_idle"]}, {"throttled": True, "throttle_reasons": ["hot"]}],
            [False, True],
            [[], ["hot"]],
        ),
        ([None, {"throttled": None, "throttle_reasons": None}], [None, None], [[], []]),
    ],
)
def test_blocks_say_whether_the_gpu_was_throttled(tmp_path, monkeypatch, states, marks, kept) -> None:
    config = compose(["engine=nano", "model=tiny", "workload=latency", "workload.prefill=[[1,8]]"])
    coming = iter(states)
    monkeypatch.setattr(machine, "gpu_state", lambda: next(coming))
    writer = RunWriter(tmp_path, "run")
    measured = Measurement(config, Scripted(), "cuda", [], writer, Ranges(False), Reporter())
    item = items(Work.of(config, "cuda"))[0]
    for number in range(2):
        measured.block(item, 0, number, 0.0, [])
    writer.flush()
    writer.write_run({"engine": "scripted", "status": "ok"})
    assert [None if mark is None else bool(mark) for mark in load(tmp_path).rounds["throttled"]] == marks
    assert measured.throttled_blocks == kept
