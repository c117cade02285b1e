"""fused's decode loop: it runs ahead of the host, and nobody can tell from the tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernels
from engines.base import Request, SamplingParams
from engines.fused import LLM
from engines.fused.decode import Graphs
from engines.fused.features import fallbacks
from engines.fused.state import STAGES, DecodeState, Flight
from engines.nano.graphs import BATCH_SIZES, graph_sizes
from engines.nano.sequence import Sequence
from kernels.decode_attention_launch import SHORT_CONTEXT
from tests.engines import reference

LENGTHS = (3, 17, 40)
MANY = 20


@pytest.fixture(scope="module")
def prompts():
    return reference.text_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(prompts):
    return reference.greedy(prompts, MANY)


def engine(**changes) -> LLM:
    return LLM(reference.config(**changes))


def tokens_of(llm, requests):
    return [list(result.token_ids) for result in llm.serve(requests)]


def test_the_next_step_is_launched_before_one_is_read(monkeypatch, prompts):
    llm = engine()
    ahead = []
    read = Flight.read
    monkeypatch.setattr(Flight, "read", lambda flight: ahead.append(llm._flight is not None) or read(flight))
    llm.serve(reference.requests(prompts, 5))
    assert ahead == [True, True, True, False]  # the last step is known to be the last


def test_the_longest_contexts_come_first(monkeypatch, prompts, expected):
    """In every step, also where the sequences that a step has change, and whatever order they came in."""
    llm = engine()
    orders = []
    launch = llm.runner.launch

    def noted(sequences, *unread):
        orders.append([len(s) for s in sequences])
        return launch(sequences, *unread)

    monkeypatch.setattr(llm.runner, "launch", noted)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    sizes = (MANY, 4, 9)  # the shortest prompt came first and stays longest
    requests = [
        Request(f"{i}", tuple(p), replace(sampling, max_tokens=n))
        for i, (p, n) in enumerate(zip(prompts, sizes, strict=True))
    ]
    assert tokens_of(llm, requests) == [tokens[:n] for tokens, n in zip(expected, sizes, strict=True)]
    assert len(orders[0]) == 3 and len(orders[-1]) == 1
    assert all(order == sorted(order, reverse=True) for order in orders)


def test_without_the_device_loop_each_step_is_read_first(monkeypatch, prompts, expected):
    llm = engine(options={"features": ("attention", "norm_qkv")})
    read = Flight.read

    def alone(flight):
        assert llm._flight is None
        return read(flight)

    monkeypatch.setattr(Flight, "read", alone)
    assert tokens_of(llm, reference.requests(prompts, MANY)) == expected


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_stop_token_that_is_noticed_late_ends_the_request_there(prompts, expected, at):
    stop = expected[0][at]
    first = expected[0].index(stop)
    sampling = SamplingParams(temperature=0.0, max_tokens=MANY, ignore_eos=True, stop_token_ids=(stop,))
    plain = replace(sampling, stop_token_ids=())
    requests = [Request(f"{i}", tuple(p), sampling if i == 0 else plain) for i, p in enumerate(prompts)]
    llm = engine()
    results = llm.serve(requests)
    assert list(results[0].token_ids) == expected[0][: first + 1]
    assert results[0].finish_reason == "stop"
    assert [list(r.token_ids) for r in results[1:]] == expected[1:]
    blocks = llm.scheduler.blocks
    assert len(blocks.free) == blocks.num_blocks  # the surplus step's too


def test_a_request_that_comes_while_a_step_is_in_the_air(prompts, expected):
    llm = engine()
    first, second, third = reference.requests(prompts, MANY)
    tokens = {r.request_id: [] for r in (first, second, third)}
    llm.add(first)
    for step in range(200):
        if step == 4:
            llm.add(second)
        if step == 9:
            llm.add(third)
        if not llm.has_unfinished():
            break
        llm.advance()
        for name, token in llm.last_step().tokens:
            tokens[name].append(token)
    assert list(tokens.values()) == expected


def test_aborted_in_the_air_and_its_place_taken(prompts, expected):
    """The rows move up while a step for the old rows is still to be read."""
    llm = engine(max_num_seqs=3)
    requests = reference.requests(prompts, MANY)
    for request in requests:
        llm.add(request)
    tokens = {r.request_id: [] for r in requests}
    for step in range(200):
        if step == 6:
            llm.abort([requests[0].request_id])
            llm.add(replace(requests[0], request_id="again"))
            tokens["again"] = []
        if not llm.has_unfinished():
            break
        llm.advance()
        for name, token in llm.last_step().tokens:
            tokens[name].append(token)
    dropped = tokens.pop(requests[0].request_id)
    assert 0 < len(dropped) < MANY and dropped == expected[0][: len(dropped)]
    assert tokens == {requests[1].request_id: expected[1], requests[2].request_id: expected[2], "again": expected[0]}


def test_draws_depend_on_seed_and_position_alone(prompts):
    sampling = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True, seed=11)
    alone = tokens_of(engine(), [Request("alone", tuple(prompts[1]), sampling)])[0]
    others = [Request(f"{i}", tuple(p), replace(sampling, seed=i)) for i, p in enumerate(prompts)]
    mixed = [others[0], Request("it", tuple(prompts[1]), sampling), *others[1:]]
    assert tokens_of(engine(), mixed)[1] == alone
    other_seed = tokens_of(engine(), [Request("alone", tuple(prompts[1]), replace(sampling, seed=12))])[0]
    assert other_seed != alone


def test_top_k_of_one_is_greedy_beside_requests_without_limits(prompts, expected):
    hot = SamplingParams(temperature=3.0, max_tokens=MANY, ignore_eos=True, top_k=1)
    free = replace(hot, top_k=0)
    requests = [Request(f"{i}", tuple(p), free if i == 1 else hot) for i, p in enumerate(prompts)]
    got = tokens_of(engine(), requests)
    assert (got[0], got[2]) == (expected[0], expected[2])


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4, 5])
def test_a_step_that_was_interrupted_is_run_again(monkeypatch, prompts, expected, interrupted):
    """Two steps are in the air when the user stops one call; the requests of another go on."""
    llm = engine()
    sequences = [llm.add(request) for request in reference.requests(prompts, MANY)]
    read, reads = Flight.read, []

    def interrupt_once(flight):
        reads.append(flight)
        if len(reads) == interrupted:
            raise KeyboardInterrupt
        return read(flight)

    monkeypatch.setattr(Flight, "read", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        while llm.has_unfinished():
            llm.advance()
    while llm.has_unfinished():
        llm.advance()
    assert [s.output_token_ids for s in sequences] == expected
    blocks = llm.scheduler.blocks
    assert len(blocks.free) == blocks.num_blocks


class Unwanted:
    """A probe that looks at nothing."""

    def wants(self, _site) -> bool:
        return False


@pytest.mark.parametrize("step", range(2, 2 + STAGES))
def test_a_probe_put_on_while_a_step_is_in_the_air(monkeypatch, prompts, expected, step):
    llm = engine()
    sequences = [llm.add(request) for request in reference.requests(prompts, MANY)]
    attach = llm.runner.attach

    def capturing(probe, mode):
        with torch.inference_mode():  # what a capture runs before it
            llm.runner.state.clear()
            llm.runner.step(len(prompts), 256)
        attach(probe, mode)

    monkeypatch.setattr(llm.runner, "attach", capturing)
    for _ in range(step):
        llm.advance()
    llm.attach(Unwanted(), "eager")
    llm.advance()
    llm.detach()
    while llm.has_unfinished():
        llm.advance()
    assert [s.output_token_ids for s in sequences] == expected


def test_cold_draws_are_the_greatest_logit_beside_top_k_and_top_p(prompts, expected):
    """So cold that the logits over the temperature are infinite."""
    cold = SamplingParams(temperature=1e-38, max_tokens=MANY, ignore_eos=True)
    settings = (cold, replace(cold, top_k=5), replace(cold, top_p=0.5))
    requests = [Request(f"{i}", tuple(p), s) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
    assert tokens_of(engine(), requests) == expected


@pytest.mark.parametrize("size", [1, 4, 8])
def test_blocks_smaller_than_the_attention_kernel_takes(prompts, expected, size):
    llm = engine(options={"block_size": size})
    assert tokens_of(llm, reference.requests(prompts, MANY)) == expected
    assert "attention" in fallbacks(llm.runner.model_config, torch.device("cuda"), size)
    assert "attention" not in fallbacks(llm.runner.model_config, torch.device("cuda"), 16)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="needs Triton's interpreter")
def test_blocks_smaller_than_the_attention_kernel_takes_are_not_given_to_it_interpreted(prompts, expected):
    """The interpreter runs the GPU's kernels, so it has their limits."""
    few = 3
    with kernels.use("triton"):
        llm = engine(options={"block_size": 8})
        assert tokens_of(llm, reference.requests(prompts, few)) == [tokens[:few] for tokens in expected]
    assert "16 tokens or more" in llm.notes["fallbacks"]["attention"]


def test_every_step_starts_from_the_embeddings_of_its_tokens(prompts):
    """Rows come, go, are preempted and drawn for twice: tokens are those of each request alone."""
    sampling = SamplingParams(temperature=1.2, max_tokens=MANY, ignore_eos=True, seed=5)
    settings = (
        replace(sampling, temperature=0.0),
        sampling,
        replace(sampling, temperature=3.0, top_k=7),
        replace(sampling, seed=6),
    )
    requests = [Request(f"{i}", tuple((prompts * 2)[i]), s) for i, s in enumerate(settings)]
    alone = [tokens_of(engine(), [request])[0] for request in requests]
    llm = engine(max_num_seqs=3, kv_cache_tokens=112)
    state, decode, seen = llm.runner.state, llm.runner._decode, []

    def checked(rows, longest):
        assert torch.equal(state.stream[:rows], state.table[state.tokens[:rows]])
        logits = decode(rows, longest)
        assert torch.equal(state.stream[:rows], state.table[state.tokens[:rows]])
        assert state.stream.isfinite().all()
        seen.append(rows)
        return logits

    llm.runner._decode = checked
    assert tokens_of(llm, requests) == alone
    assert llm.notes["preemptions"] > 0 and set(seen) == {1, 2, 3}


@pytest.mark.parametrize(("max_rows", "sizes"), [
    (1, [1]),
    (5, [1, 2, 4, 5]),
    (16, [1, 2, 4, 8, 16]),
    (512, list(BATCH_SIZES)),
    (1000, list(BATCH_SIZES)),  # larger steps run without a graph
])  # fmt: skip
def test_sizes_end_with_the_most_rows_that_can_run(max_rows, sizes):
    assert graph_sizes(max_rows) == sizes


def test_steps_of_short_contexts_may_have_graphs_of_their_own():
    """By the size that a step is padded to and by the longest context; without them, all steps are the others'."""

    def made(kind: str, sizes: list[int]) -> Graphs:
        graphs = object.__new__(Graphs)
        graphs.sizes, graphs.outputs = sizes, {size: torch.arange(size) for size in sizes}
        graphs.graphs = {size: SimpleNamespace(replay=lambda size=size: ran.append((kind, size))) for size in sizes}
        return graphs

    ran: list[tuple[str, int]] = []
    graphs = made("any", [1, 2, 4, 8, 16])
    assert len(graphs.replay_step(3, 10)) == 3
    graphs.short = made("short", [1, 8])
    for rows, longest in ((8, SHORT_CONTEXT), (5, 10), (1, 10), (2, 10), (9, 10), (1, SHORT_CONTEXT + 1)):
        assert len(graphs.replay_step(rows, longest)) == rows
    assert ran == [("any", 4), ("short", 8), ("short", 8), ("short", 1), ("any", 2), ("any", 16), ("any", 1)]


@pytest.mark.parametrize(("features", "longest", "captured"), [
    ((), 1024, [1, 4]),
    ((), SHORT_CONTEXT, None),  # no context is longer
    (("-attention",), 1024, None),
])  # fmt: skip
def test_short_contexts_have_graphs_where_their_launch_is_another(features, longest, captured, monkeypatch):
    runner = engine(options={"features": features} if features else {}).runner
    runner.max_model_len = longest
    seen: list[list[int]] = []
    monkeypatch.setattr("engines.fused.runner.Graphs", lambda *_: SimpleNamespace(pool=None))
    monkeypatch.setattr("engines.fused.runner.DecodeGraphs", lambda _step, _clear, sizes, _pool: seen.append(sizes))
    monkeypatch.setattr("engines.fused.runner.has_short_launch", lambda rows, *shape: rows in (1, 4))
    runner._capture()
    assert seen == ([] if captured is None else [captured])


def sequence(name: str, tokens: list[int], blocks: list[int], seed: int = 0) -> Sequence:
    made = Sequence(Request(name, tuple(tokens), SamplingParams(temperature=0.5)))
    made.block_table, made.seed = blocks, seed
    return made


def test_rows_follow_the_sequences():
    """What the device holds after each arrangement, written down by hand."""
    table = torch.randn(100, 8)
    state = DecodeState(4, 3, table)
    a, b, c = sequence("a", [5, 6], [0], 1 << 40), sequence("b", [7], [1], 3), sequence("c", [8, 9, 10], [2], -1)
    state.arrange([a, b])
    assert state.tokens.tolist() == [6, 7, 0, 0]
    assert torch.equal(state.stream, table[[6, 7, 0, 0]])
    assert state.positions.tolist() == [1, 0, -1, -1]
    assert state.seeds.tolist()[:2] == [1 << 40, 3]
    assert state.temperatures.tolist()[:2] == [0.5, 0.5]
    state.tokens[:2] = torch.tensor([60, 70])  # what the step draws
    state.stream.fill_(torch.nan)  # and what it might leave in the stream
    state.positions[:2] += 1
    state.steps += 1
    flight = state.flight([a, b])
    a.block_table = [0, 4]
    state.arrange([a, b], flight)  # the same rows: nothing but the new block
    assert state.tokens.tolist()[:2] == [60, 70] and state.positions.tolist()[:2] == [2, 1]
    assert state.block_tables.tolist()[:2] == [[0, 4, 0], [1, 0, 0]]
    second = state.flight([a, b])
    state.tokens[:2] = torch.tensor([61, 71])
    b.token_ids.append(70)  # the first flight is read, the second is not
    state.arrange([b, c], second)
    assert state.tokens.tolist() == [71, 10, 0, 0]
    assert torch.equal(state.stream, table[[71, 10, 0, 0]])
    assert state.positions.tolist() == [2, 2, -1, -1]
    assert state.steps.tolist()[:2] == [2, 2]
    assert state.block_tables[:2, 0].tolist() == [1, 2]
