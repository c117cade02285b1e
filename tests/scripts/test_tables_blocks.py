"""The worked example of scheduler and blocks: its slots, its events, and its table."""

import torch

from engines.base import Request, SamplingParams
from engines.nano.graphs import DecodeBuffers
from engines.nano.sequence import Sequence
from scripts.tables import blocks
from tests.scripts.table_runs import cells


def test_slots_are_those_that_a_decode_step_writes() -> None:
    sequence = Sequence(Request("a", tuple(range(7)), SamplingParams()))
    sequence.block_table = [5, 2]
    assert blocks.slots_of(sequence, 2, 7) == (22, 23, 8, 9, 10)
    buffers = DecodeBuffers(1, 2, 16, torch.device("cpu"))
    buffers.fill([sequence], blocks.BLOCK_SIZE)
    assert blocks.slots_of(sequence, 6, 7) == (int(buffers.numbers[2, 0]),)


def test_the_worked_example_shows_what_the_text_says_of_it() -> None:
    events = blocks.play()
    by_name = [{share.name: share for share in event.shares} for event in events]
    kinds = [event.kind for event in events]
    assert kinds == ["prefill"] * 2 + ["decode"] * 3 + ["prefill"] + ["decode"] * 4 + ["prefill"]
    # the budget of 12 tokens cuts B's prompt after 5
    assert [(s.name, s.start, s.end) for s in events[0].shares] == [("A", 0, 7), ("B", 0, 5)]
    assert by_name[1]["B"].slots == (13,)
    # A and B computed the same first block in one step: only A's is known by its hash, neither is shared
    assert [block for block, _ in events[0].hashes] == [0]
    assert (events[4].finished, events[4].ref_counts, events[4].free) == (("A",), (0, 0, 1, 1, 0, 1), (4, 1, 0))
    # C starts behind A's first block, which is its again; its second block differs from A's in its last token
    assert (by_name[5]["C"].start, by_name[5]["C"].block_table) == (4, (0, 4, 1))
    assert dict(events[5].hashes)[0] == dict(events[4].hashes)[0]
    # B needs a block and none is free: C, which came last, gives way and comes back behind its first two blocks
    assert (events[8].free, events[9].preempted, by_name[9]["B"].block_table) == ((), ("C",), (2, 3, 5, 1))
    assert (by_name[10]["C"].start, by_name[10]["C"].block_table) == (8, (0, 4, 1, 5))
    assert sorted(events[-1].free) == list(range(blocks.NUM_BLOCKS))


def test_the_worked_example_as_a_table() -> None:
    rows = cells(blocks.blocks())
    assert rows[1][:6] == ["1", "prefill:<br>B token 5", "B [2, 3]", "B 13", "1 1 1 1 0 0", "4, 5"]
    assert rows[9][1] == "decode:<br>B token 12<br>preempts C<br>ends B"
