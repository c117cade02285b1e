"""What the decode loop keeps on the device, and the way of the host's decisions to it and of its tokens back."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.nano.sequence import Sequence

STAGES = 4
"""Host buffers that take turns: the copy from one may still wait behind a step while the next is written."""


@dataclass(slots=True)
class Flight:
    """A launched decode step. `sequences` are its rows; its tokens land in `tokens`, memory of the host."""

    sequences: list[Sequence]
    tokens: np.ndarray
    landed: Any  # the event after which they are there; None where there is no GPU

    def read(self) -> list[int]:
        """Wait for the tokens, one for each sequence."""
        if self.landed is not None:
            self.landed.synchronize()
        return self.tokens[: len(self.sequences)].tolist()


class DecodeState:
    """Inputs of a decode step, at fixed addresses, for up to `max_rows` sequences. The step itself moves them on.

    tokens        [max_rows] int32: the newest token of each row
    positions     [max_rows] int32: where it stands; -1: no sequence
    temperatures  [max_rows] float32, 0 is greedy; seeds [max_rows] int64
    steps         [max_rows] int32: number of the step; the row of `ring` that its tokens go to is this modulo STAGES
    block_tables  [max_rows, max_blocks] int32
    ring          [STAGES, max_rows] int32, in memory of the host that the device can write

    As long as the same sequences run, nothing but new cache blocks goes to the device. When they change, all rows are
    written anew; a token that has not been read yet is then taken from the row where it was drawn.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._stages = [torch.zeros(6, max_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)]
        self._table_stages = [
            torch.zeros(max_rows, max_blocks, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)
        ]
        self.device = device
        self.max_rows = max_rows
        self._numbers = torch.zeros(6, max_rows, dtype=torch.int32, device=device)
        self.seeds = self._numbers[:2].reshape(-1).view(torch.int64)
        self._incoming, self.positions, self.steps = self._numbers[2], self._numbers[3], self._numbers[5]
        self.temperatures = self._numbers[4].view(torch.float32)
        self.tokens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self.ring = torch.zeros(STAGES, max_rows, dtype=torch.int32, pin_memory=pinned)
        self._landed = [torch.cuda.Event() for _ in range(STAGES)] if pinned else [None] * STAGES
        weakref.finalize(self, _wait_for, self._landed, self.ring)
        self._ring_view = self.ring.numpy()
        self._tables = np.zeros((max_rows, max_blocks), np.int32)
        self._rows: list[Sequence] = []  # whose state the device holds
        self._blocks: list[int] = []  # how many blocks of each it has been told
        self.launched = 0
        self.clear()

    def clear(self) -> None:
        """No row holds a sequence: a step changes nothing then."""
        self.forget()
        self._numbers.zero_()
        self.positions.fill_(-1)

    def forget(self) -> None:
        """Whatever the device holds is not to be continued; call after a prefill."""
        self._rows = []

    def arrange(self, sequences: list[Sequence], unread: Flight | None = None) -> None:
        """Make row i that of `sequences[i]`. Those that are in `unread` too go on with the token they draw there."""
        stage = self.launched % STAGES
        if sequences != self._rows:
            self._write_rows(sequences, unread, stage)
            self._rows, self._blocks = list(sequences), [0] * len(sequences)
        blocks = [len(s.block_table) for s in sequences]
        if blocks != self._blocks:
            self._write_tables(sequences, blocks, stage)
            self._blocks = blocks

    def take_off(self) -> Flight:
        """To be called right after a step was launched."""
        stage, self.launched = self.launched % STAGES, self.launched + 1
        landed = self._landed[stage]
        if landed is not None:
            landed.record()
        return Flight(self._rows, self._ring_view[stage], landed)

    def _write_rows(self, sequences: list[Sequence], unread: Flight | None, stage: int) -> None:
        staged = self._stages[stage]
        view, rows = staged.numpy(), len(sequences)
        drawn_in = {id(s): row for row, s in enumerate(unread.sequences)} if unread is not None else {}
        sources = [drawn_in.get(id(s)) for s in sequences]
        view[:] = 0
        view[:2].reshape(-1).view(np.int64)[:rows] = [s.seed for s in sequences]
        # A token still to be read is named by its row, as ~row.
        view[2, :rows] = [s.token_ids[-1] if at is None else ~at for s, at in zip(sequences, sources, strict=True)]
        view[3, :rows] = [len(s) - (at is None) for s, at in zip(sequences, sources, strict=True)]
        view[3, rows:] = -1
        view[4, :rows].view(np.float32)[:] = [s.sampling.temperature for s in sequences]
        view[5] = self.launched & 0x3FFFFFFF
        self._numbers.copy_(staged, non_blocking=True)
        incoming = self._incoming
        if drawn_in:
            self.tokens.copy_(torch.where(incoming < 0, self.tokens[(~incoming).clamp_min(0)], incoming))
        else:
            self.tokens.copy_(incoming)

    def _write_tables(self, sequences: list[Sequence], blocks: list[int], stage: int) -> None:
        for row, sequence in enumerate(sequences):
            if blocks[row] != self._blocks[row]:
                self._tables[row, : blocks[row]] = sequence.block_table
        staged = self._table_stages[stage][: len(sequences)]
        staged.numpy()[:] = self._tables[: len(sequences)]
        self.block_tables[: len(sequences)].copy_(staged, non_blocking=True)


def _wait_for(landed: list[Any], _ring: torch.Tensor) -> None:
    """Steps that nobody reads any more still write to the ring: until then it must not become someone else's memory."""
    for event in landed:
        if event is not None:
            event.synchronize()
