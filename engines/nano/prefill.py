"""Inputs of a prefill step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.nano.sequence import Sequence
from engines.nano.utils.context import StepContext


@dataclass(slots=True)
class PrefillInputs:
    """The scheduled tokens of several sequences end to end, on the host. What `StepContext` names too means the same.

    token_ids, positions  [tokens] int64
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    cu_seqlens_q: np.ndarray
    seqlens_k: np.ndarray
    block_tables: np.ndarray
    max_seqlen_q: int
    max_seqlen_k: int
    nothing_cached: bool

    @classmethod
    def of(cls, sequences: list[Sequence], block_size: int) -> PrefillInputs:
        token_ids = array("q")
        positions, slots = [], []
        lengths_q, lengths_k = [], []
        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int32)
        for row, sequence in enumerate(sequences):
            start, end = sequence.num_cached, sequence.num_cached + sequence.num_scheduled
            tables[row, : len(sequence.block_table)] = sequence.block_table
            where = np.arange(start, end, dtype=np.int64)
            token_ids += sequence.token_ids[start:end]
            positions.append(where)
            slots.append(tables[row, where // block_size] * block_size + where % block_size)
            lengths_q.append(end - start)
            lengths_k.append(end)
        return cls(
            np.array(token_ids, np.int64), np.concatenate(positions), np.concatenate(slots).astype(np.int32),
            np.concatenate(([0], np.cumsum(lengths_q))).astype(np.int32), np.array(lengths_k, np.int32), tables,
            max(lengths_q), max(lengths_k), lengths_q == lengths_k,
        )  # fmt: skip

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor, StepContext]:
        """(token ids, positions, context) on the device."""

        def put(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        cu_seqlens_q = put(self.cu_seqlens_q)
        context = StepContext(
            slot_mapping=put(self.slot_mapping),
            cu_seqlens_q=cu_seqlens_q,
            seqlens_k=put(self.seqlens_k),
            block_tables=put(self.block_tables),
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            cu_seqlens_k=cu_seqlens_q if self.nothing_cached else None,
            last_tokens=put(self.cu_seqlens_q[1:].astype(np.int64) - 1),
        )
        return put(self.token_ids), put(self.positions), context
