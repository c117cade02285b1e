"""Inputs of a prefill step made without loops: nano's, number by number, wherever a sequence stands in its blocks."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from engines.base import Request, SamplingParams
from engines.fused.prefill import Prompts, upload
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence

BLOCK = 16


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
@pytest.mark.parametrize("known", [True, False], ids=["arrived", "never seen"])
def test_equal_to_nanos(step, known):
    sequences, prompts = [sequence_of(*sizes) for sizes in step], Prompts()
    for sequence in sequences if known else ():
        prompts.add(sequence)
    made, expected = prompts.inputs(sequences, BLOCK), PrefillInputs.of(sequences, BLOCK)
    for name in (field.name for field in fields(PrefillInputs)):
        np.testing.assert_array_equal(getattr(made, name), getattr(expected, name), name)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_upload(step):
    sequences = [sequence_of(*sizes) for sizes in step]
    inputs = PrefillInputs.of(sequences, BLOCK)
    token_ids, positions, context = upload(inputs, torch.device("cpu"))
    expected_ids, expected_positions, expected = inputs.upload(torch.device("cpu"))
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


def test_a_prompt_is_forgotten_with_its_sequence():
    prompts = Prompts()
    sequence = sequence_of(0, 4, 4)
    prompts.add(sequence)
    assert len(prompts._arrays) == 1
    del sequence
    assert len(prompts._arrays) == 0
