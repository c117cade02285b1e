"""Prefill steps as CUDA graphs: one graph per number of tokens, replayed on buffers that never move.

A step of few tokens is bound by the host, which launches some ten kernels a layer. A step is padded to the next
captured size. The padding is a sequence of its own, after all others, that sees no key: attention gives its rows zeros.
Were they left unwritten, what they hold by chance could be NaN, become values of the next layer, and reach the rows
beside them, because attention kernels that read whole tiles multiply masked values by zero.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.fused.layers import DecodeContext, PrefillContext
from engines.fused.prefill import count, shapes, step_of, views
from engines.nano.models.decoder import Decoder
from engines.nano.prefill import PrefillInputs

TOKEN_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Reading the weights bounds steps up to about 256 tokens, and padding costs nothing; above, it costs its share. Up to
the last size the host takes longer to launch a step than padding costs."""
FULL_STEP = 16384
"""Tokens: a budget of up to so many has a graph too, for steps that use nearly all of it."""
FULL = 63 / 64
MAX_SEQUENCES = 16
FEW_TOKENS = 256
"""Steps of up to so many tokens try decode's kernels for their products, which are measured for so many rows."""


def token_sizes(max_tokens: int) -> tuple[int, ...]:
    """The sizes to capture for steps of up to `max_tokens` tokens."""
    largest = max_tokens if max_tokens <= FULL_STEP else TOKEN_SIZES[-1]
    return (*(size for size in TOKEN_SIZES if size < largest), largest)


class PrefillBuffers:
    """Inputs of a prefill step at fixed addresses, int32, padded to one of `sizes` tokens (ascending, each above 1) and
    to `max_sequences` sequences and the padding's. They go over in a single copy from pinned memory.

    `dependent`: kernels that can may be launched dependently, as in decode. Steps of up to `few` tokens try decode's
    kernels for their products.
    """

    def __init__(
        self, sizes: Sequence[int], max_sequences: int, max_blocks: int, device: torch.device, dependent: bool = False,
        few: int = 0,
    ) -> None:  # fmt: skip
        self.sizes = tuple(sizes)
        self.max_sequences, self.max_blocks, self.dependent, self.few = max_sequences, max_blocks, dependent, few
        self.numbers = torch.zeros(count(self._shapes(self.sizes[-1])), dtype=torch.int32, device=device)

    def fits(self, inputs: PrefillInputs) -> bool:
        """Whether the step can be padded: no sequence has earlier tokens, and there are not too many of either."""
        tokens, sequences = len(inputs.token_ids), len(inputs.seqlens_k)
        if not inputs.nothing_cached or tokens > self.sizes[-1] or sequences > self.max_sequences:
            return False
        size = self._size(tokens)
        return size <= TOKEN_SIZES[-1] or tokens >= FULL * size

    def fill(self, inputs: PrefillInputs) -> int:
        """Write a step that `fits`; returns the size that it is padded to."""
        tokens, sequences = len(inputs.token_ids), len(inputs.seqlens_k)
        size = self._size(tokens)
        parts = self._shapes(size)
        # From torch's cache of pinned memory, which keeps it from being written again before it is copied.
        host = torch.zeros(count(parts), dtype=torch.int32, pin_memory=self.numbers.is_cuda)
        cu_seqlens_q, cu_seqlens_k, seqlens_k, last_tokens, of_each, tables, token_ids, positions, slots = views(
            host.numpy(), parts
        )
        cu_seqlens_q[: sequences + 1] = inputs.cu_seqlens_q
        cu_seqlens_q[sequences + 1 :] = tokens  # missing sequences are empty
        cu_seqlens_k[:] = cu_seqlens_q  # the padding has no keys
        cu_seqlens_q[-1] = size
        seqlens_k[:sequences] = inputs.seqlens_k
        last_tokens[:sequences] = inputs.cu_seqlens_q[1:] - 1
        of_each[:] = np.arange(self.max_sequences + 1)
        tables[:sequences, : inputs.block_tables.shape[1]] = inputs.block_tables
        token_ids[:tokens] = inputs.token_ids
        positions[:tokens] = inputs.positions
        slots[:tokens] = inputs.slot_mapping
        slots[tokens:] = -1  # writes nothing
        self.numbers[: len(host)].copy_(host, non_blocking=True)
        return size

    def clear(self, size: int) -> None:
        """Make it a step of no sequences, which reads and writes nothing of the cache."""
        self.numbers.zero_()
        views(self.numbers, self._shapes(size))[-1].fill_(-1)

    def inputs(self, size: int) -> tuple[Tensor, Tensor, PrefillContext]:
        """Token ids [size], positions [size] and context, whose rows to draw from are [max_sequences]."""
        inputs = step_of(
            self.numbers, self._shapes(size), True, size, size, tail=DecodeContext, dependent=self.dependent
        )
        inputs[2].few = size <= self.few
        return inputs

    def _size(self, tokens: int) -> int:
        return self.sizes[bisect_left(self.sizes, tokens)]

    def _shapes(self, size: int) -> tuple[tuple[int, ...], ...]:
        return shapes(self.max_sequences + 1, self.max_sequences, self.max_blocks, size)


class PrefillGraphs:
    """The model's prefill step (embedding to final norm, and each sequence's last row of it) captured for each size of
    `buffers`, sharing one memory pool: `pool`, where other graphs have one that never run beside these.

    The head runs outside, for as many rows as there are sequences: its one launch is made while the graph runs.
    With `max_fused_rows`, norm and linear are one kernel in graphs of up to so many tokens, whatever the layers' own
    limit, which weighs the host's launches too.
    """

    def __init__(
        self, model: Decoder, buffers: PrefillBuffers, max_fused_rows: int | None = None, pool: Any = None
    ) -> None:
        self.model = model
        self.buffers = buffers
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.outputs: dict[int, Tensor] = {}
        pool = pool or torch.cuda.graph_pool_handle()
        with fused_up_to(model.layers, max_fused_rows):
            for size in reversed(buffers.sizes):  # the largest first: the others fit into its memory
                self._capture(size, pool)

    def fits(self, inputs: PrefillInputs) -> bool:
        """Whether `run` can take the step; others run launch by launch."""
        return self.buffers.fits(inputs)

    def run(self, inputs: PrefillInputs) -> Tensor:
        """Logits [sequences, vocab] of each sequence's last token."""
        size = self.buffers.fill(inputs)
        self.graphs[size].replay()
        return self.model.lm_head(self.outputs[size][: len(inputs.seqlens_k)])

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> None:
        self.buffers.clear(size)  # what capture and its warm-up compute is never read
        inputs = self.buffers.inputs(size)
        self.model(*inputs)  # compiles, loads modules and picks algorithms, none of which a capture may do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):  # gives the memory of the run before back to the GPU first
            self.outputs[size] = self.model(*inputs)
        self.graphs[size] = graph


@contextmanager
def fused_up_to(layers: list[Any], rows: int | None) -> Iterator[None]:
    """Within, prefill steps of up to `rows` tokens run norm and linear as one kernel; None: as each layer has it."""
    before = [] if rows is None else [(layer, layer.max_prefill_rows) for layer in layers]
    try:
        for layer, _ in before:
            layer.max_prefill_rows = rows
        yield
    finally:
        for layer, own in before:
            layer.max_prefill_rows = own
