"""After an error, or beside another call, an engine goes on as if there had been none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engines.base import InputError, Request, SamplingParams
from engines.fused import LLM as Fused
from engines.nano import LLM as Nano
from tests.engines import reference

LENGTHS = (3, 17, 40)
MANY = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=MANY, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    return reference.text_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(prompts):
    return reference.greedy(prompts, MANY)


@pytest.fixture(params=(Nano, Fused), ids=("nano", "fused"))
def make(request):
    return lambda **changes: request.param(reference.config(**changes))


def fail(monkeypatch, owner, name: str, calls: tuple[int, ...] = (0,)) -> None:
    """Calls of these numbers (0: the next one) of the method `name` raise before they do anything."""
    method, seen = getattr(owner, name), []

    def failing(*args, **keywords):
        seen.append(None)
        if len(seen) - 1 in calls:
            raise torch.OutOfMemoryError("made up")
        return method(*args, **keywords)

    monkeypatch.setattr(owner, name, failing)


def run_through(llm) -> int:
    """Step to the end, whatever fails; how many steps failed."""
    failures = 0
    while llm.has_unfinished():
        try:
            llm.advance()
        except torch.OutOfMemoryError:
            failures += 1
    return failures


def assert_empty(llm) -> None:
    blocks = llm.scheduler.blocks
    assert not llm.has_unfinished()
    assert len(blocks.free) == blocks.num_blocks and not any(blocks.ref_counts)


@pytest.mark.parametrize("seen", [1, 2, 3])
def test_scores_beside_a_stream(make, prompts, expected, seen):
    """A decode step of the stream may be in the air."""
    llm = make()
    stream = llm.stream([prompts[0]], GREEDY)
    given = [next(stream).token_id for _ in range(seen)]
    for scored, tokens in zip(llm.score(reference.requests(prompts[1:], 5)), expected[1:], strict=True):
        assert list(scored.token_ids) == tokens[:5]
        want = reference.logits(scored.prompt_token_ids, scored.token_ids)
        assert scored.logits.shape == want.shape and (scored.logits - want).norm() / want.norm() < 1e-5
    assert llm.has_unfinished()
    assert [*given, *(output.token_id for output in stream)] == expected[0]
    assert_empty(llm)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_failed_score_takes_its_own_requests_out(monkeypatch, make, prompts, expected, step):
    llm = make()
    stream = llm.stream([prompts[0]], GREEDY)
    given = [next(stream).token_id for _ in range(2)]
    fail(monkeypatch, llm, "advance", (step,))
    with pytest.raises(torch.OutOfMemoryError):
        llm.score(reference.requests(prompts[1:], 5))
    assert not llm.runner.keep_logits and llm.runner.kept_logits is None
    assert len(llm.scheduler.waiting) + len(llm.scheduler.running) == 1
    assert [*given, *(output.token_id for output in stream)] == expected[0]
    assert_empty(llm)


def test_a_refused_score_queues_nothing(make, prompts):
    llm = make()
    with pytest.raises(InputError, match="prompt of 256 tokens"):
        llm.score([*reference.requests(prompts, 5), Request("long", (1,) * 256, GREEDY)])
    assert_empty(llm)


def test_a_cache_that_memory_does_not_hold_is_refused(make):
    """By its size, not by whatever the allocator says."""
    with pytest.raises(InputError, match="A cache of 1,000,000,000,000 tokens, as kv_cache_tokens asks for, takes"):
        make(kv_cache_tokens=10**12)


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1, 3), (2, 3)], ids=str)
def test_prompts_of_a_failed_prefill_are_computed_again(monkeypatch, make, prompts, expected, failing, prefix_caching):
    """In chunks of up to 24 tokens, among them parts of prompts; one request is in the middle of its output."""
    llm = make(max_num_batched_tokens=24, prefix_caching=prefix_caching)
    first, *others = reference.requests(prompts, MANY)
    sequences = [llm.add(first)]
    for _ in range(4):
        llm.advance()
    sequences += [llm.add(request) for request in others]
    sequences += [llm.add(replace(request, request_id=f"{request.request_id} again")) for request in others]
    fail(monkeypatch, llm.runner, "_prefill", failing)
    assert run_through(llm) == len(failing)
    assert [sequence.output_token_ids for sequence in sequences] == [*expected, *expected[1:]]
    assert_empty(llm)


@pytest.mark.parametrize("method", ["_decode", "_draw"])
def test_a_step_that_failed_on_its_way_is_run_again(monkeypatch, make, prompts, expected, method):
    """Before its model ran or after; of fused, `_draw` is of prefills alone."""
    llm = make(max_num_batched_tokens=24, prefix_caching=True)
    sequences = [llm.add(request) for request in reference.requests(prompts, MANY)]
    fail(monkeypatch, llm.runner, method, (1, 2))
    assert run_through(llm) == 2
    assert [sequence.output_token_ids for sequence in sequences] == expected
    assert_empty(llm)


def test_a_failed_prefill_keeps_the_order(monkeypatch, make, prompts):
    llm = make(max_num_batched_tokens=24)
    sequences = [llm.add(request) for request in reference.requests(prompts, MANY)]
    fail(monkeypatch, llm.runner, "_prefill")
    with pytest.raises(torch.OutOfMemoryError):
        llm.advance()
    assert list(llm.scheduler.waiting) == sequences and not llm.scheduler.running
    assert len(llm.scheduler.blocks.free) == llm.scheduler.blocks.num_blocks
    llm.abort([sequences[0].request_id])
    llm.advance()
    assert [scheduled.request_id for scheduled in llm.last_step().scheduled] == ["request 1", "request 2"]


@pytest.mark.parametrize("method", ["_prefill", "_decode"])
def test_the_last_step_is_the_last_that_ran(monkeypatch, make, prompts, method):
    """A step that failed is none: what is told is the one before it, and before the first one there is nothing."""
    llm = make()
    for name, prompt in zip("ab", prompts, strict=False):
        llm.add(Request(name, tuple(prompt), GREEDY))
    if method == "_decode":
        llm.advance()
        llm.advance()
    before = llm.last_step()
    decoded = ["b", "a"] if isinstance(llm, Fused) else ["a", "b"]  # fused's longest comes first
    assert [s.request_id for s in before.scheduled] == (decoded if method == "_decode" else [])
    if isinstance(llm, Fused):
        llm._ground()  # else the step in the air lands first
    fail(monkeypatch, llm.runner, method)
    with pytest.raises(torch.OutOfMemoryError):
        llm.advance()
    assert llm.last_step() == before
    llm.advance()
    assert llm.last_step().kind == ("decode" if method == "_decode" else "prefill")
    llm.close()


class Curious:
    """A probe that wants all of the first `patience` sites, then fails; and counts what it is told."""

    def __init__(self, patience: int) -> None:
        self.patience, self.told = patience, 0

    def wants(self, _site) -> bool:
        self.patience -= 1
        if self.patience < 0:
            raise torch.OutOfMemoryError("made up")
        return True

    def begin(self, _site, _rows) -> None:
        self.told += 1

    def end(self, _site) -> None:
        self.told += 1


@pytest.mark.parametrize("patience", [5, 1000], ids=("fails itself", "fails in capture"))
def test_a_probe_that_cannot_be_put_on_leaves_nothing_behind(monkeypatch, make, prompts, expected, patience):
    llm = make()
    sequences = [llm.add(request) for request in reference.requests(prompts, MANY)]
    for _ in range(3):
        llm.advance()
    graphs = llm.runner.graphs = object()  # there are none on a CPU; nothing is replayed before they are put away
    fail(monkeypatch, llm.runner, "_capture")
    probe = Curious(patience)
    with pytest.raises(torch.OutOfMemoryError):
        llm.attach(probe, "graph")
    assert llm.runner.graphs is graphs
    llm.runner.graphs = None
    llm.advance()
    llm.advance()
    assert getattr(llm, "_flight", True), "fused's decode loop does not run ahead"
    run_through(llm)
    assert probe.told == 0
    assert [sequence.output_token_ids for sequence in sequences] == expected


def test_a_second_probe_takes_the_firsts_place(make, prompts):
    llm = make()
    first, second = Curious(1000), Curious(1000)
    llm.attach(first, "eager")
    llm.attach(second, "eager")
    llm.serve(reference.requests(prompts, 2))
    assert first.told == 0 < second.told
    llm.detach()
    told = second.told
    llm.serve(reference.requests(prompts, 2))
    assert second.told == told


class Event:
    """Of a step in the air, which lands when it is waited for."""

    in_the_air = False

    def record(self) -> None:
        self.in_the_air = True

    def synchronize(self) -> None:
        self.in_the_air = False


@pytest.mark.parametrize("closed", [False, True], ids=("dropped", "closed"))
def test_a_step_in_the_air_is_waited_for_at_the_end(prompts, closed):
    """It writes to memory of the host, which somebody else may have once the engine is gone."""
    llm = Fused(reference.config())
    events = [Event() for _ in llm.runner.state._landed]
    llm.runner.state._landed[:] = events
    for request in reference.requests(prompts, MANY):
        llm.add(request)
    for _ in range(3):
        llm.advance()
    assert llm._flight is not None and [event.in_the_air for event in events].count(True) == 1
    if closed:
        llm.close()
    else:
        del llm  # nothing but this name holds it: no cycle that garbage collection would have to find first
    assert not any(event.in_the_air for event in events)
