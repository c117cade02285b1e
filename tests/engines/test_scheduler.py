"""Scheduler and block manager under random traffic: nothing leaked, nothing owned twice, everything ends."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines.base import InputError, Request, SamplingParams
from engines.nano.block_manager import BlockManager
from engines.nano.scheduler import Scheduler
from engines.nano.sequence import Sequence

BLOCK = 4
EOS = 0

# Few different blocks, so that prompts share prefixes, and have equal blocks behind different ones.
prompts = st.builds(
    lambda blocks, tail: [token for block in blocks for token in block] + tail,
    st.lists(st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 1, 2)]), max_size=3),
    st.lists(st.sampled_from([1, 2]), min_size=1, max_size=BLOCK),
)
samplings = st.builds(SamplingParams, max_tokens=st.integers(1, 12), ignore_eos=st.booleans())
drawn_tokens = st.lists(st.sampled_from([1, 2, 1, 2, 3, EOS]), min_size=1, max_size=8)


class Traffic(RuleBasedStateMachine):
    """Requests come, run and are aborted. What should be is kept here in the test's own books, from what steps show:

    tokens: prompt and output of each unfinished request; limits: its sampling settings
    tables: the blocks that each of them holds; computed: how many of its tokens are in them
    cache: slot -> the tokens up to the one whose keys and values were written there last. They depend on all of these.
    """

    @initialize(
        num_blocks=st.integers(2, 16),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 2 * BLOCK + 1) | st.integers(1, 40),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, max_num_seqs: int, budget: int, prefix_caching: bool) -> None:
        self.num_blocks, self.max_num_seqs, self.budget = num_blocks, max_num_seqs, budget
        self.prefix_caching = prefix_caching
        self.blocks = BlockManager(num_blocks, BLOCK, prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget, frozenset([EOS]))
        self.tokens: dict[str, list[int]] = {}
        self.limits: dict[str, SamplingParams] = {}
        self.outputs: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.cache: dict[int, tuple[int, ...]] = {}
        self.count = 0

    @rule(arriving=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=3))
    def arrive(self, arriving: list[tuple[list[int], SamplingParams]]) -> None:
        for prompt, sampling in arriving:
            self.add(prompt, sampling)

    def add(self, prompt: list[int], sampling: SamplingParams) -> None:
        self.count += 1
        name = f"request {self.count}"
        sequence = Sequence(Request(name, tuple(prompt), sampling))
        if len(prompt) + sampling.max_tokens - 1 > self.num_blocks * BLOCK:
            with pytest.raises(InputError, match="the whole cache holds"):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.tokens[name], self.limits[name], self.outputs[name] = list(prompt), sampling, 0

    @rule(which=st.integers(0, 5))
    def abort(self, which: int) -> None:
        """One of the unfinished, in the middle of its prompt if any is; or one that has ended or was never there."""
        names = sorted(self.tokens, key=lambda name: self.computed.get(name, 0) in (0, len(self.tokens[name]) - 1))
        name = [*names, *["request 1"] * 6][which]
        self.scheduler.abort([name])
        if name in self.tokens:
            self.forget(name)

    @rule(num_steps=st.just(1) | st.integers(1, 10), drawn=drawn_tokens)
    def run(self, num_steps: int, drawn: list[int]) -> None:
        source = cycle(drawn)
        for _ in range(num_steps):
            if self.tokens:
                self.step([next(source) for _ in range(self.max_num_seqs)])

    @rule(num_steps=st.integers(1, 2))
    def fail(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.tokens:
                self.step([1] * self.max_num_seqs, prefill_fails=True)

    @invariant()
    def blocks_belong_to_their_holders(self) -> None:
        if not hasattr(self, "tables"):
            return  # before `start`
        holders = self.holders()
        assert self.blocks.ref_counts == [len(holders[block]) for block in range(self.num_blocks)]
        assert sorted(self.blocks.free) == [block for block in range(self.num_blocks) if not holders[block]]
        assert len(holders) <= self.num_blocks and set(holders) <= set(range(self.num_blocks))
        assert self.scheduler.has_unfinished() == bool(self.tokens)

    def teardown(self) -> None:
        """Everything ends: until the next token there are at most the prefills of what fits into the cache."""
        if not hasattr(self, "tables"):
            return
        to_come = sum(self.limits[name].max_tokens - self.outputs[name] for name in self.tokens)
        bound = to_come * (1 + self.max_num_seqs + self.num_blocks * BLOCK // self.budget)
        for _ in range(bound):
            if self.tokens:
                self.step([1] * self.max_num_seqs)
                self.blocks_belong_to_their_holders()
        assert not self.tokens and not self.scheduler.has_unfinished()
        assert len(self.blocks.free) == self.num_blocks

    def step(self, drawn: list[int], prefill_fails: bool = False) -> None:
        """One step, as the engine makes it. A prefill that fails leaves what it has written half done."""
        sequences, is_prefill = self.scheduler.schedule()
        self.check_limits(sequences, is_prefill)
        self.follow_tables(sequences, is_prefill)
        self.check_sharing(sequences)
        self.blocks_belong_to_their_holders()
        if is_prefill and prefill_fails:
            self.spoil_cache(sequences)
            self.scheduler.take_back(sequences)
            for sequence in sequences:
                self.release(sequence.request_id)
            return
        self.run_cache(sequences)
        drawn = drawn[: len(sequences)]
        scheduled = [(sequence.request_id, sequence.num_scheduled) for sequence in sequences]
        finished = {s.request_id: s.finish_reason for s in self.scheduler.postprocess(sequences, drawn)}
        assert finished == self.take_tokens(scheduled, drawn)
        for name in finished:
            self.forget(name)

    def check_limits(self, sequences: list[Sequence], is_prefill: bool) -> None:
        names = [sequence.request_id for sequence in sequences]
        assert names, "a step that does nothing would never end"
        assert len(set(names)) == len(names) and set(names) <= set(self.tokens)
        assert len(self.tables.keys() | set(names) if is_prefill else names) <= self.max_num_seqs
        assert sum(sequence.num_scheduled for sequence in sequences) <= self.budget
        for sequence in sequences:
            left = len(self.tokens[sequence.request_id]) - sequence.num_cached
            assert sequence.token_ids.tolist() == self.tokens[sequence.request_id]
            assert 1 <= sequence.num_scheduled <= left
            assert is_prefill or left == 1

    def follow_tables(self, sequences: list[Sequence], is_prefill: bool) -> None:
        """Who holds what now. Who holds blocks and sits out a decode step was preempted."""
        if not is_prefill:
            for name in self.tables.keys() - {sequence.request_id for sequence in sequences}:
                self.release(name)
        for sequence in sequences:
            name = sequence.request_id
            before = self.tables.get(name, [])
            if name not in self.tables:  # what is there already was computed for others
                assert sequence.num_cached % BLOCK == 0 and (self.prefix_caching or sequence.num_cached == 0)
                self.computed[name] = sequence.num_cached
            assert sequence.num_cached == self.computed[name]
            assert sequence.block_table[: len(before)] == before
            assert len(sequence.block_table) == -(-len(self.tokens[name]) // BLOCK)
            self.tables[name] = list(sequence.block_table)

    def check_sharing(self, sequences: list[Sequence]) -> None:
        """A block has several holders only where it is full for each of them; a step writes to nobody else's."""
        for block, holders in self.holders().items():
            for name in holders if len(holders) > 1 else ():
                assert self.prefix_caching
                assert (self.tables[name].index(block) + 1) * BLOCK <= self.computed[name]
        for table in self.tables.values():
            assert len(set(table)) == len(table)

    def run_cache(self, sequences: list[Sequence]) -> None:
        """Write the scheduled tokens; then, as on a GPU, read all up to them: each must be there, after its prefix."""
        for read in (False, True):
            for s in sequences:
                tokens, table = self.tokens[s.request_id], self.tables[s.request_id]
                end = s.num_cached + s.num_scheduled
                for position in range(0 if read else s.num_cached, end):
                    slot = table[position // BLOCK] * BLOCK + position % BLOCK
                    if read:
                        assert self.cache[slot] == tuple(tokens[: position + 1])
                    else:
                        self.cache[slot] = tuple(tokens[: position + 1])

    def spoil_cache(self, sequences: list[Sequence]) -> None:
        for s in sequences:
            for position in range(s.num_cached, s.num_cached + s.num_scheduled):
                self.cache[s.block_table[position // BLOCK] * BLOCK + position % BLOCK] = ()

    def take_tokens(self, scheduled: list[tuple[str, int]], drawn: list[int]) -> dict[str, str]:
        """Append what was drawn to each request whose tokens are all computed; who is done by that, and why."""
        done = {}
        for (name, new), token in zip(scheduled, drawn, strict=True):
            self.computed[name] += new
            if self.computed[name] < len(self.tokens[name]):
                continue
            self.tokens[name].append(token)
            self.outputs[name] += 1
            if token == EOS and not self.limits[name].ignore_eos:
                done[name] = "stop"
            elif self.outputs[name] == self.limits[name].max_tokens:
                done[name] = "length"
        return done

    def holders(self) -> dict[int, set[str]]:
        holders = defaultdict(set)
        for name, table in self.tables.items():
            for block in table:
                holders[block].add(name)
        return holders

    def release(self, name: str) -> None:
        self.tables.pop(name, None)
        self.computed.pop(name, None)

    def forget(self, name: str) -> None:
        self.release(name)
        for book in (self.tokens, self.limits, self.outputs):
            del book[name]


Traffic.TestCase.settings = settings(max_examples=200, stateful_step_count=25)
TestTraffic = Traffic.TestCase


def test_what_can_never_fit_is_refused():
    scheduler = Scheduler(BlockManager(4, BLOCK), 8, 64, frozenset())
    scheduler.add(Sequence(Request("fits", (1,) * 10, SamplingParams(max_tokens=7))))
    with pytest.raises(InputError, match="needs 17 tokens of cache, but the whole cache holds 16"):
        scheduler.add(Sequence(Request("not", (1,) * 10, SamplingParams(max_tokens=8))))


def test_the_block_of_an_aborted_chunk_is_not_found():
    """It is full of tokens by its owner's count only: the keys and values of half of them were never computed."""
    scheduler = Scheduler(BlockManager(4, BLOCK), 8, BLOCK + 2, frozenset())
    first, second = (Sequence(Request(name, (1,) * 11, SamplingParams(max_tokens=1))) for name in ("first", "second"))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.postprocess(scheduler.schedule()[0], [1])
    scheduler.abort(["first"])
    assert scheduler.schedule()[0] == [second]
    assert second.num_cached == BLOCK, "only the first block was computed to its end"


def test_stop_tokens_end_a_request_that_ignores_eos():
    sequence = Sequence(Request("a", (1,), SamplingParams(ignore_eos=True, stop_token_ids=(9,), max_tokens=5)))
    for token in (0, 9):
        sequence.append(token, frozenset([0]))
    assert (sequence.finish_reason, sequence.output_token_ids) == ("stop", [0, 9])
