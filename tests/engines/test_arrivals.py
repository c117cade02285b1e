"""Requests that arrive while an engine serves: on a clock of the test's own, where waiting is known exactly, and on
the real one."""

from __future__ import annotations

import importlib.util
import queue
import threading
import time

import pytest

from engines.arrivals import Arrivals
from engines.base import EngineConfig, InputError
from engines.hf import HF
from engines.nano import LLM
from engines.vllm import VLLM, serving
from tests.engines import reference

LENGTHS = (1, 15, 16, 17, 40, 65)
NUM_TOKENS = 20
OFFSETS = (0.05, 0.0, 0.02, 0.2, 0.02, 0.12)
"""Neither in order nor all different."""
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


class Clock:
    """Stands in for the module `time`: nothing passes unless it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("arrivals", "hf", "nano.engine"):
        monkeypatch.setattr(f"engines.{module}.time", made)
    return made


def one_at_a_time(kind: str, clock: Clock, service_s: float):
    """A real engine with room for one sequence, each step of which takes `service_s`."""
    config = EngineConfig(reference.TINY, "float32", "cpu", max_model_len=256, max_num_seqs=1)
    engine = HF(config) if kind == "hf" else LLM(config)
    owner, name = (engine, "_forward") if kind == "hf" else (engine.runner, "run")
    step = getattr(owner, name)

    def slow(*args):
        clock.now_s += service_s
        return step(*args)

    setattr(owner, name, slow)
    return engine


@pytest.mark.parametrize("kind", ["hf", "nano"])
@pytest.mark.parametrize(("gap_ms", "waits"), [(8, True), (12, False)])
def test_waiting_in_a_queue_of_known_length(kind: str, gap_ms: int, waits: bool, clock: Clock) -> None:
    """D/D/1: 10 ms of service for every request. Of one each 8 ms, request k waits 2k ms; of one each 12 ms, none."""
    engine = one_at_a_time(kind, clock, 0.010)
    requests = reference.requests([[7, 8, 9]] * 30, num_tokens=1)
    results = engine.serve(requests, arrivals_s=[k * gap_ms / 1e3 for k in range(30)])
    assert [r.arrival_s - 1000 for r in results] == pytest.approx([k * gap_ms / 1e3 for k in range(30)])
    latency_ms = [1e3 * (r.token_times_s[0] - r.arrival_s) for r in results]
    assert latency_ms == pytest.approx([10 + 2 * k if waits else 10 for k in range(30)])
    # It never sleeps while there is work, and else as long as nothing comes, in one go.
    assert clock.slept_s == pytest.approx([] if waits else [0.002] * 29)


@pytest.mark.parametrize("kind", ["hf", "nano"])
def test_a_request_is_not_known_before_it_arrives(kind: str, clock: Clock) -> None:
    engine = one_at_a_time(kind, clock, 0.010)
    short, long = reference.requests([[7], [8]], 1)[0], reference.requests([[7], [8]], 5)[1]
    first, second = engine.serve([short, long], arrivals_s=[0.015, 0.0])
    # The long one came first and keeps the only place for its five steps.
    assert second.token_times_s[-1] == pytest.approx(1000.05)
    assert first.token_times_s == pytest.approx((1000.06,))


@pytest.mark.parametrize("kind", ["hf", "nano"])
def test_tokens_are_the_same_whenever_requests_arrive(kind: str) -> None:
    prompts = reference.text_prompts(LENGTHS)
    engine = HF(EngineConfig(reference.TINY, "float32", "cpu", 256, 4)) if kind == "hf" else LLM(reference.config())
    seen = []
    start_s = time.perf_counter()
    results = engine.serve(reference.requests(prompts, NUM_TOKENS), seen.append, OFFSETS)
    check(results, start_s, prompts)
    assert sorted(r.request_id for r in seen) == sorted(r.request_id for r in results)
    engine.close()


def check(results, start_s, prompts):
    assert [list(r.token_ids) for r in results] == reference.greedy(prompts, NUM_TOKENS)
    assert [r.request_id for r in results] == [f"request {i}" for i in range(len(results))]
    offsets = [r.arrival_s - results[1].arrival_s for r in results]
    assert offsets == pytest.approx(OFFSETS, abs=1e-6)
    assert start_s <= results[1].arrival_s
    for result in results:
        times = (result.arrival_s, *result.token_times_s)
        assert len(times) == 1 + NUM_TOKENS and list(times) == sorted(times) and times[0] < times[1]


def test_bad_times_are_refused() -> None:
    requests = reference.requests([[1], [2]], 1)
    with pytest.raises(InputError, match="2 requests and 1 arrival times"):
        Arrivals(requests, [0.0])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="seconds from 0 on"):
            Arrivals(requests, [0.0, bad])


def test_waiting_is_exact_and_costs_no_processor_time() -> None:
    arrivals = Arrivals(reference.requests([[1]] * 40, 1), [k / 100 for k in range(40)])
    late_ms, busy_s = [], time.process_time()
    while arrivals.wait():
        for request in arrivals.take():
            late_ms.append(1e3 * (time.perf_counter() - arrivals.due_s(request.request_id)))
    assert time.process_time() - busy_s < 0.1  # of 0.39 s
    assert len(late_ms) == 40 and min(late_ms) >= 0
    assert sorted(late_ms)[10] < 1  # a busy machine is late itself, but not always
    assert arrivals.max_late_s == pytest.approx(max(late_ms) / 1e3, abs=1e-3)


def test_what_arrives_while_an_answer_is_awaited_is_handed_over_at_once() -> None:
    answers: queue.Queue[str] = queue.Queue()
    arrivals = Arrivals(reference.requests([[1]] * 3, 1), [0.02, 0.04, 30.0])
    handed: list[str] = []
    waiting = serving._Interruptible(answers, arrivals, lambda: handed.extend(r.request_id for r in arrivals.take()))
    threading.Timer(0.2, lambda: (answers.put(f"after {len(handed)}"), answers.put("next"))).start()
    assert waiting.get() == "after 2" and handed == ["request 0", "request 1"]
    assert waiting.get() == "next"
    assert arrivals.max_late_s < 0.1  # far sooner than the answer


@needs_vllm
@pytest.mark.parametrize("arm", ["default", "eager"])
def test_vllm(arm: str) -> None:
    """In a process of its own, and in this one."""
    options = {"arm": "eager", "serve_arm": arm, "engine_args": {"enforce_eager": True}}
    engine = VLLM(EngineConfig(reference.TINY, "float32", "cpu", 256, 8, 512, options=options))
    prompts = reference.text_prompts(LENGTHS)
    try:
        start_s = time.perf_counter()
        results = engine.serve(reference.requests(prompts, NUM_TOKENS), None, OFFSETS)
        check(results, start_s, prompts)
        assert engine.arm == arm
        assert 0 <= engine.notes["max_handover_ms"] < 1000
        assert engine.notes["request_clocks"]["requests"] == 6
        # Nothing of it is left to the next work.
        again = engine.serve(reference.requests(prompts, NUM_TOKENS))
        assert [r.token_ids for r in again] == [r.token_ids for r in results]
    finally:
        engine.close()


def test_what_is_in_the_way_of_arrivals_does_not_stay(clock: Clock) -> None:
    engine = one_at_a_time("nano", clock, 0.010)
    requests = [*reference.requests([[7]] * 2, 3), *reference.requests([[999_999]] * 3, 1)[2:]]
    with pytest.raises(InputError, match="outside the vocabulary"):
        engine.serve(requests, arrivals_s=[0.0, 0.0, 0.02])
    assert not engine.has_unfinished()
