"""Decode steps as CUDA graphs: one graph per batch size, replayed on buffers that never move."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from engines.nano.sequence import Sequence
from engines.nano.utils.context import StepContext

BATCH_SIZES = (1, 2, 4, 8, *range(16, 513, 16))


def why_no_graphs(device: torch.device) -> str:
    """Why steps cannot be captured on `device`; "" if they can."""
    if device.type != "cuda":
        return "there are no graphs without a GPU"
    return "" if kernels.HAVE_TRITON else "without the package triton plain PyTorch runs, which waits for the host"


class DecodeBuffers:
    """Inputs of a decode step, at fixed addresses, for up to `max_rows` sequences.

    One row of four numbers a sequence (token, position, cache slot, context length) goes over in a single copy from
    pinned memory. Block tables follow only when some row of them changed, which is once in block_size steps.
    """

    def __init__(self, max_rows: int, max_blocks: int, max_model_len: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.max_model_len = max_model_len
        self.host = torch.zeros(4, max_rows, dtype=torch.int32, pin_memory=pinned)
        self.host_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)
        self.numbers = torch.zeros(4, max_rows, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._numbers_view = self.host.numpy()
        self._tables_view = self.host_tables.numpy()
        self._shown: list[tuple[str, int]] = []  # (request, blocks) of each row of the table on the device
        self._changed = False  # whether the step's tables differ from the ones before

    def fill(self, sequences: list[Sequence], block_size: int) -> int:
        """Write the step's inputs; returns the number of rows. Rows beyond it are made harmless."""
        rows, view = len(sequences), self._numbers_view
        lengths = [len(s.token_ids) for s in sequences]
        view[0, :rows] = [s.token_ids[-1] for s in sequences]
        view[1, :rows] = lengths
        view[1, :rows] -= 1
        view[2, :rows] = [s.block_table[-1] for s in sequences]
        view[2, :rows] *= block_size
        view[2, :rows] += view[1, :rows] % block_size
        view[3, :rows] = lengths
        self._upload(rows)
        self._fill_tables(sequences)
        return rows

    def written(self, rows: int, blocks: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Copies of what `fill` wrote, for another rank: [4, rows], and tables [rows, blocks] if any row changed."""
        return self._numbers_view[:, :rows].copy(), self._tables_view[:rows, :blocks].copy() if self._changed else None

    def take(self, numbers: np.ndarray, tables: np.ndarray | None) -> int:
        """Be filled with what another rank has `written`; returns the number of rows."""
        rows = numbers.shape[1]
        self._numbers_view[:, :rows] = numbers
        self._upload(rows)
        if tables is not None:
            self._tables_view[:rows, : tables.shape[1]] = tables
            self.block_tables[:rows].copy_(self.host_tables[:rows], non_blocking=True)
        return rows

    def clear(self) -> None:
        """Empty contexts and no cache slots: a step of no sequences."""
        self.numbers.zero_()
        self.numbers[2].fill_(-1)

    def forget(self) -> None:
        """Call after a prefill, the only step that gives a sequence new blocks in place of old ones."""
        self._shown = []

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """Token ids and positions, [rows] int32 each."""
        return self.numbers[0, :rows], self.numbers[1, :rows]

    def context(self, rows: int, max_seqlen_k: int | None = None) -> StepContext:
        return StepContext(
            slot_mapping=self.numbers[2, :rows],
            cu_seqlens_q=self.cu_seqlens[: rows + 1],
            seqlens_k=self.numbers[3, :rows],
            block_tables=self.block_tables[:rows],
            max_seqlen_q=1,
            max_seqlen_k=max_seqlen_k or self.max_model_len,
        )

    def _upload(self, rows: int) -> None:
        self._numbers_view[:, rows:] = 0
        self._numbers_view[2, rows:] = -1  # writes nothing
        self.numbers.copy_(self.host, non_blocking=True)

    def _fill_tables(self, sequences: list[Sequence]) -> None:
        shown = [(s.request_id, len(s.block_table)) for s in sequences]
        self._changed = shown != self._shown
        if not self._changed:
            return
        for row, sequence in enumerate(sequences):
            if row >= len(self._shown) or shown[row] != self._shown[row]:
                self._tables_view[row, : len(sequence.block_table)] = sequence.block_table
        self.block_tables[: len(sequences)].copy_(self.host_tables[: len(sequences)], non_blocking=True)
        self._shown = shown


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows to capture where up to `max_rows` run: those of BATCH_SIZES, the last cut to `max_rows`."""
    largest = min(max_rows, BATCH_SIZES[-1])
    return [size for size in BATCH_SIZES if size < largest] + [largest]


class DecodeGraphs:
    """A decode step captured for each number of rows in `sizes` (ascending), sharing one memory pool: `pool`, where
    other graphs have one that never run beside these.

    step: launches it for so many rows and returns its output [rows, ...]
    clear: makes what it reads a step of no sequences: what capture and its warm-up compute is never read
    """

    def __init__(
        self, step: Callable[[int], Tensor], clear: Callable[[], None], sizes: list[int], pool: Any = None
    ) -> None:
        self.sizes = sizes
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.outputs: dict[int, Tensor] = {}
        self.pool = pool or torch.cuda.graph_pool_handle()
        for rows in reversed(self.sizes):  # the largest first: the others fit into its memory
            self._capture(step, clear, rows)

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def bucket(self, rows: int) -> int:
        """The size whose graph runs a step of `rows`."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def replay(self, rows: int) -> Tensor:
        """Run the step on what its inputs hold now; its output for `rows` rows, until the next replay."""
        bucket = self.bucket(rows)
        self.graphs[bucket].replay()
        return self.outputs[bucket][:rows]

    @torch.inference_mode()
    def _capture(self, step: Callable[[int], Tensor], clear: Callable[[], None], rows: int) -> None:
        clear()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, loads modules and picks algorithms, none of which a capture may do
            step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.outputs[rows] = step(rows)
        self.graphs[rows] = graph
