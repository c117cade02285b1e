"""Inputs of a prefill step: made in few operations, because the GPU waits for them, and uploaded in a single copy."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from engines.fused.layers import PrefillContext
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from engines.nano.utils.context import StepContext

ALIGNMENT = 4
"""Numbers: every input starts at a multiple of 16 bytes, for which kernels are compiled already."""


class Prompts:
    """Each sequence's prompt as an array, made when it arrives: for 16,384 tokens that takes a third of a millisecond,
    which would stand between the step's start and its first kernel."""

    def __init__(self) -> None:
        self._arrays: WeakKeyDictionary[Sequence, np.ndarray] = WeakKeyDictionary()

    def add(self, sequence: Sequence) -> np.ndarray:
        array = self._arrays[sequence] = np.array(sequence.token_ids[: sequence.num_prompt], np.int32)
        return array

    def scheduled(self, sequence: Sequence) -> np.ndarray:
        """The token ids that the step computes, int32."""
        start, end = sequence.num_cached, sequence.num_cached + sequence.num_scheduled
        if end > sequence.num_prompt:  # preempted: what it had drawn is computed again
            return np.array(sequence.token_ids[start:end], np.int32)
        array = self._arrays.get(sequence)
        return (self.add(sequence) if array is None else array)[start:end]

    def inputs(self, sequences: list[Sequence], block_size: int) -> PrefillInputs:
        """What `PrefillInputs.of` gives, all int32, without a loop over tokens or blocks."""
        starts = np.array([s.num_cached for s in sequences], np.int32)
        lengths = np.array([s.num_scheduled for s in sequences], np.int32)
        ends = starts + lengths
        cu_seqlens_q = np.zeros(len(sequences) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int32)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.block_table)] = sequence.block_table
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int32)
        positions -= np.repeat(cu_seqlens_q[:-1] - starts, lengths)
        # A block's new tokens lie as far from their positions as its first slot from its first position.
        first = np.arange(tables.shape[1], dtype=np.int32) * block_size
        new = np.minimum(ends[:, None], first + block_size) - np.maximum(starts[:, None], first)
        shifts = np.repeat((tables * block_size - first).ravel(), new.clip(0).ravel())
        return PrefillInputs(
            np.concatenate([self.scheduled(s) for s in sequences]), positions, positions + shifts, cu_seqlens_q, ends,
            tables, int(lengths.max()), int(ends.max()), not starts.any(),
        )  # fmt: skip


def shapes(sequences: int, drawn: int, blocks: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Of a step's inputs, in the order in which they lie in memory: cu_seqlens_q, cu_seqlens_k, seqlens_k, last_tokens,
    cu_seqlens of a step of one token each, block_tables; then what depends on the tokens, so that the copy of a small
    step is small: token_ids, positions, slot_mapping. Of the `sequences`, the first `drawn` have tokens drawn for them.
    """
    lengths = ((sequences + 1,), (sequences + 1,), (sequences,), (drawn,), (drawn + 1,))
    return (*lengths, (sequences, blocks), (tokens,), (tokens,), (tokens,))


def count(parts: Listing[tuple[int, ...]]) -> int:
    """Numbers that inputs of these shapes take."""
    return sum(_aligned(prod(shape)) for shape in parts)


def views(numbers: Any, parts: Listing[tuple[int, ...]]) -> list[Any]:
    """Of all inputs, in `numbers`, an array or a tensor."""
    found, start = [], 0
    for shape in parts:
        found.append(numbers[start : start + prod(shape)].reshape(shape))
        start += _aligned(prod(shape))
    return found


def step_of(
    numbers: Tensor, parts: Listing[tuple[int, ...]], nothing_cached: bool, max_seqlen_q: int, max_seqlen_k: int,
    tail: type[StepContext] = StepContext, **of_both: Any,
) -> tuple[Tensor, Tensor, PrefillContext]:  # fmt: skip
    """Token ids [tokens], positions [tokens] and context of a step whose inputs lie in `numbers`.

    `tail` is the kind of context in which the last layer ends; it and the step's own are made with `of_both` besides.
    """
    cu_seqlens_q, cu_seqlens_k, seqlens_k, last_tokens, of_each, tables, token_ids, positions, slots = views(
        numbers, parts
    )
    drawn = len(last_tokens)
    end = tail(
        slot_mapping=slots,
        cu_seqlens_q=of_each,
        seqlens_k=seqlens_k[:drawn],
        block_tables=tables[:drawn],
        max_seqlen_q=1,
        max_seqlen_k=max_seqlen_k,
        **of_both,
    )
    context = PrefillContext(
        slot_mapping=slots,
        cu_seqlens_q=cu_seqlens_q,
        seqlens_k=seqlens_k,
        block_tables=tables,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cu_seqlens_k=cu_seqlens_k if nothing_cached else None,
        last_tokens=last_tokens,
        tail=end,
        **of_both,
    )
    return token_ids, positions, context


def upload(inputs: PrefillInputs, device: torch.device) -> tuple[Tensor, Tensor, PrefillContext]:
    """(token ids, positions, context) on the device, of a step as long as it is."""
    sequences, blocks = inputs.block_tables.shape
    parts = shapes(sequences, sequences, blocks, len(inputs.token_ids))
    # From torch's cache of pinned memory, which keeps it from being written again before it is copied.
    host = torch.empty(count(parts), dtype=torch.int32, pin_memory=device.type == "cuda")
    cu_seqlens_q, cu_seqlens_k, seqlens_k, last_tokens, of_each, tables, token_ids, positions, slots = views(
        host.numpy(), parts
    )
    cu_seqlens_q[:] = cu_seqlens_k[:] = inputs.cu_seqlens_q
    seqlens_k[:], tables[:] = inputs.seqlens_k, inputs.block_tables
    last_tokens[:] = inputs.cu_seqlens_q[1:] - 1
    of_each[:] = np.arange(sequences + 1)
    token_ids[:], positions[:], slots[:] = inputs.token_ids, inputs.positions, inputs.slot_mapping
    numbers = host.to(device, non_blocking=True)
    return step_of(numbers, parts, inputs.nothing_cached, inputs.max_seqlen_q, inputs.max_seqlen_k)


def _aligned(numbers: int) -> int:
    return -(-numbers // ALIGNMENT) * ALIGNMENT
