"""Prefill steps as CUDA graphs: one graph per number of tokens, replayed on buffers that never move.

A step of few tokens is bound by the host, which launches some ten kernels a layer. A step is padded to the next
captured size. The padding is a sequence of its own, after all others, that sees no key: attention gives its rows zeros.
Were they left unwritten, what they hold by chance could be NaN, become values of the next layer, and reach the rows
beside them, because attention kernels that read whole tiles multiply masked values by zero.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.fused.context import DecodeContext, PrefillContext
from engines.fused.draw import Draw
from engines.fused.prefill import Inputs, aligned, count, shapes, step_of, views, write
from engines.fused.state import Rows
from engines.nano.graphs import DecodeGraphs, graph_sizes
from engines.nano.models.decoder import Decoder
from engines.nano.sequence import Sequence

TOKEN_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Reading the weights bounds steps up to about 256 tokens, and padding costs nothing; above, it costs its share, up to
HOST_WORK less than the host needs to launch the step."""
HOST_WORK = 2e11
"""Multiply-adds of a layer: an H200 makes about so many in the time in which the host launches a layer's kernels."""
FULL_STEP = 16384
"""Tokens: a budget of up to so many has a graph too, for steps that use nearly all of it."""
FULL = 63 / 64
MAX_SEQUENCES = 64
FEW_TOKENS = 256
"""Steps of up to so many tokens try decode's kernels for their products, which are measured for so many rows."""


def most_padded(layer_weights: int) -> int:
    """Up to how many tokens steps are padded, of a model whose layers have so many weights each."""
    return max((size for size in TOKEN_SIZES if size * layer_weights <= HOST_WORK), default=TOKEN_SIZES[0])


def token_sizes(max_tokens: int, most: int) -> tuple[int, ...]:
    """The sizes to capture for steps of up to `max_tokens` tokens, padded up to `most`, one of TOKEN_SIZES."""
    largest = max_tokens if max_tokens <= FULL_STEP else most
    return (*(size for size in TOKEN_SIZES if size <= most and size < largest), largest)


class PrefillBuffers:
    """Inputs of a prefill step at fixed addresses, int32, padded to one of `sizes` tokens (ascending, each above 1) and
    to `max_sequences` sequences and the padding's. They go over in a single copy from pinned memory, behind what
    drawing reads of the sequences' `rows`.

    `dependent`: kernels that can may be launched dependently, as in decode. Steps of up to `few` tokens try decode's
    kernels for their products. Only steps that nearly fill it are padded to a size above `most`.
    """

    def __init__(
        self, sizes: Listing[int], max_sequences: int, max_blocks: int, device: torch.device, dependent: bool = False,
        few: int = 0, most: int = TOKEN_SIZES[-1],
    ) -> None:  # fmt: skip
        self.sizes, self.most = tuple(sizes), most
        self.max_sequences, self.max_blocks, self.dependent, self.few = max_sequences, max_blocks, dependent, few
        lines = (Rows.LINES, max_sequences)
        self._start = aligned(prod(lines))  # of the step's own inputs
        lengths = {size: self._start + count(self._shapes(size)) for size in self.sizes}
        self.numbers = torch.zeros(lengths[self.sizes[-1]], dtype=torch.int32, device=device)
        self.rows = Rows(self.numbers[: prod(lines)].view(lines))
        host = torch.zeros(len(self.numbers), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copies = {size: (self.numbers[:length], host[:length]) for size, length in lengths.items()}
        self._host_rows = host.numpy()[: prod(lines)].reshape(lines)
        self._host_inputs = {size: views(host.numpy()[self._start :], self._shapes(size)) for size in self.sizes}
        self._host_inputs[self.sizes[0]].of_each[:] = np.arange(max_sequences + 1)  # the same in steps of all sizes
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fits(self, sequences: list[Sequence]) -> bool:
        """Whether the step can be padded: no sequence has earlier tokens, and there are not too many of either."""
        tokens = sum(s.num_scheduled for s in sequences)
        if tokens > self.sizes[-1] or len(sequences) > self.max_sequences or any(s.num_cached for s in sequences):
            return False
        size = self._size(tokens)
        return size <= self.most or tokens >= FULL * size

    def fill(self, sequences: list[Sequence], block_size: int) -> Padded:
        """Write a step that `fits` to memory of the host."""
        size = self._size(sum(s.num_scheduled for s in sequences))
        self._write(size, sequences, block_size)
        return Padded(size, len(sequences))

    def upload(self, size: int) -> None:
        """Bring what was filled to the device. Captured steps do it themselves: the host launches less."""
        numbers, host = self._copies[size]
        numbers.copy_(host, non_blocking=True)

    def uploaded(self) -> None:
        """To be called after it, and after the step's launch, which should not wait for this."""
        if self._copied is not None:
            self._copied.record()

    def clear(self, size: int) -> None:
        """Make it a step of no sequences, which draws nothing and reads and writes nothing of the cache."""
        self._write(size, [], 1)
        self.upload(size)
        self.uploaded()

    def inputs(self, size: int, stream: Tensor | None = None) -> tuple[Tensor, Tensor, PrefillContext]:
        """Token ids [size], positions [size] and context, whose rows to draw from are [max_sequences]; their residual
        stream is left in `stream`, if given."""
        inputs = step_of(
            self.numbers[self._start :], self._shapes(size), True, size, size, tail=DecodeContext,
            dependent=self.dependent,
        )  # fmt: skip
        inputs[2].few, inputs[2].stream = size <= self.few, stream
        return inputs

    def _write(self, size: int, sequences: list[Sequence], block_size: int) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # the step before is read by now, unless it failed
        self.rows.write(self._host_rows, sequences, [len(s) - 1 for s in sequences])
        to, rows = self._host_inputs[size], len(sequences)
        tokens = write(sequences, block_size, to)
        to.cu_seqlens_q[rows + 1 :] = tokens  # missing sequences are empty
        to.cu_seqlens_k[:] = to.cu_seqlens_q  # the padding has no keys
        to.cu_seqlens_q[-1] = size
        to.seqlens_k[rows:] = to.last_tokens[rows:] = 0
        # What a step of another size has left there can be no token and no position.
        to.token_ids[tokens:] = to.positions[tokens:] = 0
        to.slot_mapping[tokens:] = -1  # writes nothing

    def _size(self, tokens: int) -> int:
        return self.sizes[bisect_left(self.sizes, tokens)]

    def _shapes(self, size: int) -> Inputs:
        return shapes(self.max_sequences + 1, self.max_sequences, self.max_blocks, size)


@dataclass(slots=True)
class Padded:
    """A step in the host's memory of `PrefillBuffers`: `size` tokens with its padding, and the rows to draw from."""

    size: int
    rows: int


class PrefillGraphs:
    """The model's prefill step in two graphs that share one memory pool: `pool`, where other graphs have one that never
    run beside these. One, for each size of `buffers`, is of the inputs' copy, embedding and layers. It leaves the
    residual stream of the rows to draw from in `stream` [max_sequences, hidden], where the other goes on, for each
    number of rows: `draw`.
    """

    def __init__(self, model: Decoder, draw: Draw, buffers: PrefillBuffers, pool: Any = None) -> None:
        self.model = model
        self.buffers = buffers
        self.stream = model.model.norm.weight.new_zeros(buffers.max_sequences, model.config.hidden_size)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = pool or torch.cuda.graph_pool_handle()
        for size in reversed(buffers.sizes):  # the largest first: the others fit into its memory
            self._capture(size, pool)
        self.ends = DecodeGraphs(
            lambda rows: draw(self.stream[:rows], buffers.rows), partial(buffers.clear, buffers.sizes[0]),
            graph_sizes(buffers.max_sequences), pool,
        )  # fmt: skip

    def fits(self, sequences: list[Sequence]) -> bool:
        """Whether `run` can take the step; others run launch by launch."""
        return self.buffers.fits(sequences)

    def run(self, step: Padded) -> Tensor:
        """Launch it; logits [sequences, vocab] of each sequence's last token, until the next step."""
        self.graphs[step.size].replay()
        self.buffers.uploaded()
        return self.ends.replay(step.rows)

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> None:
        self.buffers.clear(size)  # what capture and its warm-up compute is never read
        inputs = self.buffers.inputs(size, self.stream)
        run_layers(self.model, *inputs)  # compiles, loads modules and picks algorithms, none of which a capture may do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):  # gives the memory of the run before back to the GPU first
            self.buffers.upload(size)
            run_layers(self.model, *inputs)
        self.graphs[size] = graph


def run_layers(model: Decoder, token_ids: Tensor, positions: Tensor, context: PrefillContext) -> None:
    """A step up to the final norm, of which the context's `stream` is left."""
    hidden, residual = model.model.embed_tokens(token_ids), None
    for layer in model.layers:
        hidden, residual = layer(hidden, residual, positions, context)
    assert hidden is context.stream, "the residual stream of the rows to draw from must be changed in place"
