"""Scheduler and block manager under random traffic: nothing leaked, nothing owned twice, everything ends."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import InputError, Request, SamplingParams
from engines.nano.block_manager import BlockManager
from engines.nano.scheduler import Scheduler
from engines.nano.sequence import Sequence

BLOCK = 4


def check_blocks(blocks: BlockManager, sequences: list[Sequence]) -> None:
    """Reference counts are the number of owners; free and owned blocks together are all blocks, once each."""
    owners = Counter(block for sequence in sequences for block in sequence.block_table)
    assert blocks.ref_counts == [owners[block] for block in range(blocks.num_blocks)]
    assert set(blocks.free) == {block for block in range(blocks.num_blocks) if owners[block] == 0}
    for digest, block in blocks.block_of.items():
        assert blocks.hash_of[block] == digest
    for sequence in sequences:
        assert len(set(sequence.block_table)) == len(sequence.block_table)
        if sequence.block_table:
            assert len(sequence.block_table) * BLOCK >= sequence.num_cached + sequence.num_scheduled


class Cache:
    """A cache that remembers which token each slot was last given, to see what a sequence would read."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[int, int]] = {}

    def run(self, sequences: list[Sequence]) -> None:
        for s in sequences:
            for position in range(s.num_cached, s.num_cached + s.num_scheduled):
                slot = s.block_table[position // BLOCK] * BLOCK + position % BLOCK
                self.slots[slot] = (position, s.token_ids[position])
        for s in sequences:  # after all writes, as on a GPU: every earlier token must still be there
            for position in range(s.num_cached + s.num_scheduled):
                slot = s.block_table[position // BLOCK] * BLOCK + position % BLOCK
                assert self.slots[slot] == (position, s.token_ids[position])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(6, 20),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    prefix_caching=st.booleans(),
)
def test_random_traffic(seed, num_blocks, max_num_seqs, budget, prefix_caching):
    rng = random.Random(seed)
    blocks = BlockManager(num_blocks, BLOCK, prefix_caching)
    scheduler = Scheduler(blocks, max_num_seqs, budget, frozenset([0]))
    cache, alive, finished, total = Cache(), {}, {}, 0
    for _ in range(10_000):
        if total < 12 and rng.random() < 0.5:
            # Few distinct tokens, so that prompts share prefixes.
            prompt = tuple(rng.choice((1, 1, 1, 2)) for _ in range(rng.randint(1, 2 * BLOCK + 3)))
            room = num_blocks * BLOCK - len(prompt)
            request = Request(str(total), prompt, SamplingParams(max_tokens=rng.randint(1, min(12, room))))
            alive[request.request_id] = sequence = Sequence(request)
            scheduler.add(sequence)
            total += 1
        if alive and rng.random() < 0.03:
            doomed = rng.choice(list(alive))
            scheduler.abort([doomed])
            finished[doomed] = alive.pop(doomed)
        if not scheduler.has_unfinished():
            if total == 12:
                break
            continue
        sequences, is_prefill = scheduler.schedule()
        assert sequences, "a step that does nothing would never end"
        assert len(scheduler.running) <= max_num_seqs
        assert sum(s.num_scheduled for s in sequences) <= (budget if is_prefill else max_num_seqs)
        if not is_prefill:
            assert all(s.num_cached == len(s) - 1 for s in sequences)
        check_blocks(blocks, list(alive.values()))
        cache.run(sequences)
        for sequence in scheduler.postprocess(sequences, [rng.choice((0, 1, 2, 3)) for _ in sequences]):
            finished[sequence.request_id] = alive.pop(sequence.request_id)
        check_blocks(blocks, list(alive.values()))
    assert len(finished) == 12 and not alive
    assert len(blocks.free) == num_blocks
    for sequence in finished.values():
        if sequence.finish_reason == "length":
            assert sequence.num_output == sequence.sampling.max_tokens
        elif sequence.finish_reason == "stop":
            assert sequence.token_ids[-1] == 0 and 0 not in sequence.output_token_ids[:-1]
        else:
            assert sequence.finish_reason == "abort"


def test_what_can_never_fit_is_refused():
    scheduler = Scheduler(BlockManager(4, BLOCK), 8, 64, frozenset())
    scheduler.add(Sequence(Request("fits", (1,) * 10, SamplingParams(max_tokens=7))))
    with pytest.raises(InputError, match="needs 17 tokens of cache, but the whole cache holds 16"):
        scheduler.add(Sequence(Request("not", (1,) * 10, SamplingParams(max_tokens=8))))


def test_stop_tokens_end_a_request_that_ignores_eos():
    sequence = Sequence(Request("a", (1,), SamplingParams(ignore_eos=True, stop_token_ids=(9,), max_tokens=5)))
    for token in (0, 9):
        sequence.append(token, frozenset([0]))
    assert (sequence.finish_reason, sequence.output_token_ids) == ("stop", [0, 9])
