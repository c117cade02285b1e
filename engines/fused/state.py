"""What steps keep on the device, and the way of the host's decisions to it and of its tokens back."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from engines.nano.sequence import Sequence

STAGES = 4
"""Host buffers that take turns: the copy from one may still wait behind a step while the next is written."""


@dataclass(slots=True)
class Flight:
    """A launched step. `sequences` are its rows; its tokens land in `tokens`, memory of the host."""

    sequences: list[Sequence]
    tokens: np.ndarray
    landed: Any  # the event after which they are there; None where there is no GPU

    def read(self) -> list[int]:
        """Wait for the tokens, one for each sequence."""
        if self.landed is not None:
            self.landed.synchronize()
        return self.tokens[: len(self.sequences)].tolist()


class Rows:
    """What drawing reads and writes, of up to `max_rows` rows.

    tokens        [max_rows] int32: the newest token of each row
    positions     [max_rows] int32: where it stands; -1: no sequence
    temperatures  [max_rows] float32, 0 is greedy; seeds [max_rows] int64
    steps         [max_rows] int32: number of the step; the row of `ring` that its tokens go to is this modulo STAGES
    ring          [STAGES, max_rows] int32, in memory of the host that the device can write

    All but the ring lie in the given `numbers` [LINES, max_rows] int32, of which the host writes the whole.
    """

    LINES = 6

    def __init__(self, numbers: Tensor) -> None:
        self.seeds = numbers[:2].reshape(-1).view(torch.int64)
        self.tokens, self.positions, self.steps = numbers[2], numbers[3], numbers[5]
        self.temperatures = numbers[4].view(torch.float32)
        self.ring = torch.zeros(STAGES, numbers.shape[1], dtype=torch.int32, pin_memory=numbers.is_cuda)
        self._ring_view = self.ring.numpy()
        self._landed = [torch.cuda.Event() for _ in range(STAGES)] if numbers.is_cuda else [None] * STAGES
        weakref.finalize(self, _wait_for, self._landed, self.ring)
        self.launched = 0

    def write(self, numbers: np.ndarray, sequences: list[Sequence], positions: list[int]) -> None:
        """Write to `numbers`, of the host, what the next step is to start from, all but the tokens."""
        rows = len(sequences)
        numbers[:] = 0
        numbers[:2].reshape(-1).view(np.int64)[:rows] = [s.seed for s in sequences]
        numbers[3, :rows] = positions
        numbers[3, rows:] = -1
        numbers[4, :rows].view(np.float32)[:] = [s.sampling.temperature for s in sequences]
        numbers[5] = self.launched & 0x3FFFFFFF

    def flight(self, sequences: list[Sequence]) -> Flight:
        """To be called right after a step for `sequences` was launched."""
        stage, self.launched = self.launched % STAGES, self.launched + 1
        landed = self._landed[stage]
        if landed is not None:
            landed.record()
        return Flight(sequences, self._ring_view[stage], landed)

    def embedding(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """The table by which drawn tokens are embedded, and the first `rows` of where to; None: they are not."""
        return None


class DecodeState(Rows):
    """Inputs of a decode step, at fixed addresses, for up to `max_rows` sequences. The step itself moves them on.

    block_tables  [max_rows, max_blocks] int32
    stream        [max_rows, hidden], of the dtype of `table` [vocab, hidden]: the embeddings of `tokens` before a step,
                  which changes it in place and ends by embedding what it draws; finite in all rows

    As long as the same sequences run, nothing but new cache blocks goes to the device. When they change, all rows are
    written anew; a token that has not been read yet is then taken from the row where it was drawn.
    """

    def __init__(self, max_rows: int, max_blocks: int, table: Tensor) -> None:
        device = table.device
        pinned = device.type == "cuda"
        self._stages = [torch.zeros(self.LINES, max_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)]
        self._table_stages = [
            torch.zeros(max_rows, max_blocks, dtype=torch.int32, pin_memory=pinned) for _ in range(STAGES)
        ]
        self.device = device
        self.max_rows = max_rows
        self._numbers = torch.zeros(self.LINES, max_rows, dtype=torch.int32, device=device)
        super().__init__(self._numbers)
        # A token still to be read comes from another row of `tokens`, which must not be written before.
        self._incoming, self.tokens = self.tokens, torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.table = table
        self.stream = table.new_zeros(max_rows, table.shape[1])
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self._tables = np.zeros((max_rows, max_blocks), np.int32)
        self._rows: list[Sequence] = []  # whose state the device holds
        self._blocks: list[int] = []  # how many blocks of each it has been told
        self.clear()

    def clear(self) -> None:
        """No row holds a sequence: a step changes nothing then."""
        self.forget()
        self._numbers.zero_()
        self.positions.fill_(-1)

    def embedding(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.table, self.stream[:rows]

    def embed(self) -> None:
        """Let the next step start from `tokens`: for whoever writes them, if it is not a step."""
        kernels.embed_rows(self.tokens, self.table, out=self.stream)

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

    def _write_rows(self, sequences: list[Sequence], unread: Flight | None, stage: int) -> None:
        staged = self._stages[stage]
        drawn_in = {id(s): row for row, s in enumerate(unread.sequences)} if unread is not None else {}
        sources = [drawn_in.get(id(s)) for s in sequences]
        # A token still to be read is named by its row, as ~row.
        tokens = [s.token_ids[-1] if at is None else ~at for s, at in zip(sequences, sources, strict=True)]
        positions = [len(s) - (at is None) for s, at in zip(sequences, sources, strict=True)]
        view = staged.numpy()
        self.write(view, sequences, positions)
        view[2, : len(sequences)] = tokens
        self._numbers.copy_(staged, non_blocking=True)
        incoming = self._incoming
        if drawn_in:
            self.tokens.copy_(torch.where(incoming < 0, self.tokens[(~incoming).clamp_min(0)], incoming))
        else:
            self.tokens.copy_(incoming)
        self.embed()

    def _write_tables(self, sequences: list[Sequence], blocks: list[int], stage: int) -> None:
        for row, sequence in enumerate(sequences):
            if blocks[row] != self._blocks[row]:
                self._tables[row, : blocks[row]] = sequence.block_table
        staged = self._table_stages[stage][: len(sequences)]
        staged.numpy()[:] = self._tables[: len(sequences)]
        self.block_tables[: len(sequences)].copy_(staged, non_blocking=True)


def _wait_for(landed: list[Any], _ring: Tensor) -> None:
    """Steps that nobody reads any more still write to the ring: until then it must not become someone else's memory."""
    for event in landed:
        if event is not None:
            event.synchronize()
