"""Inputs of a prefill step: written in few operations, because the GPU waits for them, and uploaded in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engines.fused.context import PrefillContext
from engines.nano.sequence import Sequence
from engines.nano.utils.context import StepContext

ALIGNMENT = 4
"""Numbers: every input starts at a multiple of 16 bytes, for which kernels are compiled already."""


class Inputs(NamedTuple):
    """A step's inputs in the order in which they lie in memory: their shapes, arrays on the host, or tensors, of int32.

    `of_each` is cu_seqlens of a step of one token each; `StepContext` names the others. What depends on the number of
    tokens comes last, so that the copy of a small step is small.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqlens_k: Any
    last_tokens: Any
    of_each: Any
    block_tables: Any
    token_ids: Any
    positions: Any
    slot_mapping: Any


def shapes(sequences: int, drawn: int, blocks: int, tokens: int) -> Inputs:
    """Of the inputs; of the `sequences`, the first `drawn` have tokens drawn for them."""
    lengths = ((sequences + 1,), (sequences + 1,), (sequences,), (drawn,), (drawn + 1,))
    return Inputs(*lengths, (sequences, blocks), (tokens,), (tokens,), (tokens,))


def aligned(numbers: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-numbers // ALIGNMENT) * ALIGNMENT


def count(parts: Inputs) -> int:
    """Numbers that inputs of these shapes take."""
    return sum(aligned(prod(shape)) for shape in parts)


def views(numbers: Any, parts: Inputs) -> Inputs:
    """Of all inputs, in `numbers`, an array or a tensor."""
    found, start = [], 0
    for shape in parts:
        found.append(numbers[start : start + prod(shape)].reshape(shape))
        start += aligned(prod(shape))
    return Inputs(*found)


def write(sequences: list[Sequence], block_size: int, to: Inputs) -> int:
    """Write a step to arrays of the host, which may have room for more; returns its number of tokens.

    Nothing else is changed: of `cu_seqlens_q` the first number stays too.
    """
    start = 0
    for row, sequence in enumerate(sequences):
        cached, end = sequence.num_cached, start + sequence.num_scheduled
        length = cached + sequence.num_scheduled
        to.cu_seqlens_q[row + 1], to.seqlens_k[row], to.last_tokens[row] = end, length, end - 1
        to.block_tables[row, : len(sequence.block_table)] = sequence.block_table
        to.token_ids[start:end] = np.frombuffer(sequence.token_ids, np.int64)[cached:length]
        to.positions[start:end] = np.arange(cached, length, dtype=np.int32)
        before = cached // block_size  # blocks in which there is nothing new
        blocks = to.block_tables[row, before : -(-length // block_size)]
        of_tokens = blocks.repeat(block_size)
        to.slot_mapping[start:end] = of_tokens[cached - before * block_size : length - before * block_size]
        start = end
    slots = to.slot_mapping[:start]  # as yet the blocks; of all sequences at once, they become slots
    slots *= block_size
    slots += to.positions[:start] & (block_size - 1)
    return start


@dataclass(slots=True)
class HostInputs:
    """Inputs of a step as long as it is, in pinned memory."""

    numbers: Tensor
    parts: Inputs
    nothing_cached: bool
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, sequences: list[Sequence], block_size: int, device: torch.device) -> HostInputs:
        """The scheduled tokens of `sequences`, for `device`."""
        rows, blocks = len(sequences), max(len(s.block_table) for s in sequences)
        parts = shapes(rows, rows, blocks, sum(s.num_scheduled for s in sequences))
        # From torch's cache of pinned memory, which keeps it from being written again before it is copied.
        numbers = torch.empty(count(parts), dtype=torch.int32, pin_memory=device.type == "cuda")
        to = views(numbers.numpy(), parts)
        to.cu_seqlens_q[0] = 0
        to.block_tables[:] = 0
        write(sequences, block_size, to)
        to.cu_seqlens_k[:] = to.cu_seqlens_q
        to.of_each[:] = np.arange(rows + 1)
        return cls(
            numbers, parts, not any(s.num_cached for s in sequences), max(s.num_scheduled for s in sequences),
            int(to.seqlens_k.max()),
        )  # fmt: skip

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor, PrefillContext]:
        """(token ids, positions, context) on the device."""
        numbers = self.numbers.to(device, non_blocking=True)
        return step_of(numbers, self.parts, self.nothing_cached, self.max_seqlen_q, self.max_seqlen_k)


def step_of(
    numbers: Tensor, parts: Inputs, nothing_cached: bool, max_seqlen_q: int, max_seqlen_k: int,
    tail: type[StepContext] = StepContext, **of_both: Any,
) -> tuple[Tensor, Tensor, PrefillContext]:  # fmt: skip
    """Token ids [tokens], positions [tokens] and context of a step whose inputs lie in `numbers`.

    `tail` is the kind of context in which the last layer ends; it and the step's own are made with `of_both` besides.
    """
    inputs = views(numbers, parts)
    drawn = len(inputs.last_tokens)
    end = tail(
        slot_mapping=inputs.slot_mapping,
        cu_seqlens_q=inputs.of_each,
        seqlens_k=inputs.seqlens_k[:drawn],
        block_tables=inputs.block_tables[:drawn],
        max_seqlen_q=1,
        max_seqlen_k=max_seqlen_k,
        **of_both,
    )
    context = PrefillContext(
        slot_mapping=inputs.slot_mapping,
        cu_seqlens_q=inputs.cu_seqlens_q,
        seqlens_k=inputs.seqlens_k,
        block_tables=inputs.block_tables,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cu_seqlens_k=inputs.cu_seqlens_k if nothing_cached else None,
        last_tokens=inputs.last_tokens,
        tail=end,
        **of_both,
    )
    return inputs.token_ids, inputs.positions, context
