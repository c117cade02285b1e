"""Inputs of a prefill step, written where they are copied from: nano's, number by number."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Request, SamplingParams
from engines.fused.prefill import HostInputs, views
from engines.fused.prefill_graphs import PrefillBuffers
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence

BLOCK = 16
CPU = torch.device("cpu")


def sequence_of(cached: int, new: int, total: int, drawn: int = 0) -> Sequence:
    """`new` tokens on top of `cached`, of `total` in all; its last `drawn` were drawn, not given."""
    numbers = np.random.default_rng([cached, new, total])
    sequence = Sequence(Request("", tuple(numbers.integers(1000, size=total).tolist()), SamplingParams()))
    sequence.num_prompt -= drawn
    sequence.num_cached, sequence.num_scheduled = cached, new
    sequence.block_table = numbers.permutation(64)[: -(-total // BLOCK)].tolist()
    return sequence


# (cached, new, total[, drawn]) of each sequence
STEPS = [
    [(0, 1, 1)],
    [(0, 16, 16), (0, 17, 17), (0, 5, 5)],
    [(16, 24, 40), (0, 33, 33)],
    [(5, 3, 40), (31, 2, 40)],  # chunks that begin and end inside a block
    [(0, 20, 20, 6), (32, 3, 35, 4)],  # preempted: tokens that were drawn are computed again
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_equal_to_nanos(step):
    sequences = [sequence_of(*sizes) for sizes in step]
    made, expected = HostInputs.of(sequences, BLOCK, CPU), PrefillInputs.of(sequences, BLOCK)
    inputs = views(made.numbers.numpy(), made.parts)
    for name in ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seqlens_k", "block_tables"):
        np.testing.assert_array_equal(getattr(inputs, name), getattr(expected, name), name)
    for name in ("nothing_cached", "max_seqlen_q", "max_seqlen_k"):
        assert getattr(made, name) == getattr(expected, name), name


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_upload(step):
    sequences = [sequence_of(*sizes) for sizes in step]
    token_ids, positions, context = HostInputs.of(sequences, BLOCK, CPU).upload(CPU)
    expected_ids, expected_positions, expected = PrefillInputs.of(sequences, BLOCK).upload(CPU)
    assert torch.equal(token_ids.long(), expected_ids) and torch.equal(positions.long(), expected_positions)
    for name in (field.name for field in fields(expected)):
        ours, theirs = getattr(context, name), getattr(expected, name)
        if isinstance(theirs, torch.Tensor):
            ours, theirs = ours.tolist(), theirs.tolist()
        assert ours == theirs, name
    tail = context.tail
    assert tail.is_decode and tail.cu_seqlens_q.tolist() == list(range(len(sequences) + 1))
    assert tail.seqlens_k.tolist() == expected.seqlens_k.tolist()
    assert tail.block_tables.tolist() == expected.block_tables.tolist()
    assert tail.max_seqlen_k == expected.max_seqlen_k


LENGTHS = st.lists(st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from([BLOCK, 2 * BLOCK])), min_size=1, max_size=5)


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_buffers_hold_what_nano_would_upload(steps):
    """Step after step through the same memory; what a step leaves there is nothing to the next."""
    buffers = PrefillBuffers((16, 64, 300), 5, 4, CPU)
    for step, lengths in enumerate(steps):
        sequences = [sequence_of(0, length, length) for length in lengths]
        assert buffers.fits(sequences)
        size = buffers.fill(sequences, BLOCK).size
        buffers.numbers.fill_(2**30)
        buffers.upload(size)
        expected, count = PrefillInputs.of(sequences, BLOCK), len(sequences)
        tokens = len(expected.token_ids)
        assert size == next(size for size in buffers.sizes if size >= tokens)
        token_ids, positions, context = buffers.inputs(size)
        padding = size - tokens
        assert token_ids.tolist() == [*expected.token_ids, *[0] * padding]
        assert positions.tolist() == [*expected.positions, *[0] * padding]
        assert context.slot_mapping.tolist() == [*expected.slot_mapping, *[-1] * padding]
        missing = 5 - count
        assert context.cu_seqlens_k.tolist() == [*expected.cu_seqlens_q, *[tokens] * (missing + 1)]
        assert context.cu_seqlens_q.tolist() == [*expected.cu_seqlens_q, *[tokens] * missing, size]
        assert context.seqlens_k.tolist() == [*expected.seqlens_k, *[0] * (missing + 1)]
        assert context.last_tokens.tolist() == [*expected.cu_seqlens_q[1:] - 1, *[0] * missing]
        for row, sequence in enumerate(sequences):
            table = sequence.block_table
            assert context.block_tables[row, : len(table)].tolist() == table
        assert context.block_tables.max() < 64
        tail = context.tail
        assert tail.is_decode and tail.cu_seqlens_q.tolist() == list(range(6))
        assert tail.seqlens_k.tolist() == context.seqlens_k[:5].tolist()
        assert buffers.rows.positions.tolist() == [*[length - 1 for length in lengths], *[-1] * missing]
        assert buffers.rows.steps.tolist() == [step] * 5
        buffers.rows.flight(sequences)


@pytest.mark.parametrize("cached", [1, BLOCK, BLOCK + 3])
def test_buffers_take_no_cached_tokens(cached):
    """Prompts of which some is in the cache go the other way, alone and beside others."""
    buffers = PrefillBuffers((16, 64, 300), 5, 4, CPU)
    whole, rest = sequence_of(0, 20, 20), sequence_of(cached, 3, cached + 3)
    assert buffers.fits([whole]) and buffers.fits([whole, whole])
    assert not buffers.fits([rest]) and not buffers.fits([whole, rest])
