"""Tensors in, tokens out: the model, its cache, and the steps it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.base import NO_LAYER, EngineConfig, InputError, Probe, Request, SamplingParams, Site, TraceMode, hook
from engines.nano.graphs import BATCH_SIZES, DecodeBuffers, DecodeGraphs
from engines.nano.layers.attention import choose_backend
from engines.nano.layers.sampler import Sampler, SamplingBatch
from engines.nano.models import Decoder, read_model
from engines.nano.sequence import Sequence
from engines.nano.utils.context import StepContext
from engines.nano.utils.loader import load_weights

CPU_CACHE_BYTES = 4 * 2**30


class ModelRunner:
    """One model on one device, with its paged cache [2, layers, blocks, block_size, kv_heads, head_dim]."""

    def __init__(
        self, config: EngineConfig, block_size: int, attention: str, eager: bool, prepare: Callable[[ModelRunner], None]
    ):
        self.config = config
        self.block_size = block_size
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        if self.device.type == "cuda":
            self.free_at_start = torch.cuda.mem_get_info()[0]
        self.model_config, family = read_model(Path(config.checkpoint))
        self.max_model_len = self._check_length(config.max_model_len)
        self.backend_name, backend = choose_backend(attention, self.device, self.dtype)
        with torch.device(self.device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                self.model = Decoder(self.model_config, family, self.max_model_len, backend)
            finally:
                torch.set_default_dtype(default)
        load_weights(self.model, Path(config.checkpoint))
        self.model.eval().requires_grad_(False)
        prepare(self)  # an engine with layers of its own puts them in here
        self.sampler = Sampler()
        self.kept_logits: Tensor | None = None
        self.keep_logits = False
        self.max_blocks = -(-self.max_model_len // block_size)
        self.buffers = DecodeBuffers(config.max_num_seqs, self.max_blocks, self.max_model_len, self.device)
        self.num_blocks = self._allocate_cache()
        self.graphs: DecodeGraphs | None = None
        self._plain_graphs: DecodeGraphs | None = None
        self._unhook = lambda: None
        if self.device.type == "cuda" and not eager:
            self.graphs = self._capture()

    @property
    def sites(self) -> list[tuple[Site, torch.nn.Module]]:
        return [*self.model.sites(), (Site(NO_LAYER, "sample", "sample"), self.sampler)]

    @torch.inference_mode()
    def run(self, sequences: list[Sequence], is_prefill: bool) -> list[int]:
        """Compute the scheduled tokens of `sequences` and draw one token for each."""
        if is_prefill:
            token_ids, positions, context = self._prepare_prefill(sequences)
            logits = self.model.logits(self.model(token_ids, positions, context), context)
            self.buffers.forget()
        else:
            rows = self.buffers.fill(sequences, self.block_size)
            logits = self._decode(rows, max(len(s) for s in sequences))
        settings = [(s.sampling, len(s)) for s in sequences]
        tokens = self.sampler(logits, SamplingBatch.of(settings, self.model_config.vocab_size, self.device))
        if self.keep_logits:
            self.kept_logits = logits.float().cpu()
        return tokens.tolist()

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        """Hooks on; graphs off (`eager`) or captured anew with the hooks inside (`graph`)."""
        self._plain_graphs = self.graphs
        self._unhook = hook(self.sites, probe)
        self.graphs = self._capture() if mode == "graph" else None

    def detach(self) -> None:
        self._unhook()
        self._unhook = lambda: None
        self.graphs, self._plain_graphs = self._plain_graphs or self.graphs, None

    def close(self) -> None:
        """Drop every tensor; the memory goes back to the GPU."""
        self.graphs = self._plain_graphs = self.kept_logits = None
        for name in ("model", "buffers", "cache", "sampler"):
            if hasattr(self, name):
                delattr(self, name)

    def _check_length(self, wanted: int) -> int:
        if wanted > self.model_config.max_position:
            raise InputError(f"max_model_len {wanted} is more than the model takes, {self.model_config.max_position}.")
        return wanted

    def _decode(self, rows: int, longest: int) -> Tensor:
        if self.graphs is not None and rows <= self.graphs.largest:
            hidden = self.graphs.replay(rows)
            return self.model.lm_head(hidden)
        context = self.buffers.context(rows, longest)
        return self.model.logits(self.model(*self.buffers.inputs(rows), context), context)

    def _prepare_prefill(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor, StepContext]:
        token_ids: list[int] = []
        positions, slots = [], []
        lengths_q, lengths_k = [], []
        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int32)
        for row, sequence in enumerate(sequences):
            start, end = sequence.num_cached, sequence.num_cached + sequence.num_scheduled
            tables[row, : len(sequence.block_table)] = sequence.block_table
            where = np.arange(start, end, dtype=np.int64)
            token_ids += sequence.token_ids[start:end]
            positions.append(where)
            slots.append(tables[row, where // self.block_size] * self.block_size + where % self.block_size)
            lengths_q.append(end - start)
            lengths_k.append(end)
        starts = np.concatenate(([0], np.cumsum(lengths_q))).astype(np.int32)
        cu_seqlens_q = self._upload(starts)
        context = StepContext(
            slot_mapping=self._upload(np.concatenate(slots).astype(np.int32)),
            cu_seqlens_q=cu_seqlens_q,
            seqlens_k=self._upload(np.array(lengths_k, np.int32)),
            block_tables=self._upload(tables),
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            cu_seqlens_k=cu_seqlens_q if lengths_q == lengths_k else None,
            last_tokens=self._upload(starts[1:].astype(np.int64) - 1),
        )
        return self._upload(np.array(token_ids, np.int64)), self._upload(np.concatenate(positions)), context

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _capture(self) -> DecodeGraphs:
        largest = min(self.config.max_num_seqs, BATCH_SIZES[-1])
        sizes = [size for size in BATCH_SIZES if size < largest] + [largest]
        return DecodeGraphs(self.model, self.buffers, sizes)

    # --- memory ---

    @property
    def _token_bytes(self) -> int:
        c = self.model_config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize

    def _allocate_cache(self) -> int:
        """Size the cache and make it; returns its blocks."""
        if self.device.type == "cuda":
            largest_step = self._warm_up()
        if self.config.kv_cache_tokens is not None:
            blocks = self.config.kv_cache_tokens // self.block_size
        elif self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            ours = self.free_at_start - free
            budget = int(total * self.config.gpu_memory_utilization) - ours - largest_step
            blocks = min(budget, free - largest_step) // (self._token_bytes * self.block_size)
        else:
            wanted = self.config.max_num_seqs * self.max_blocks
            blocks = max(1, min(wanted, CPU_CACHE_BYTES // (self._token_bytes * self.block_size)))
        if blocks < 1:
            raise InputError(
                f"No memory is left for the cache: gpu_memory_utilization {self.config.gpu_memory_utilization} "
                f"or kv_cache_tokens {self.config.kv_cache_tokens} gives less than a block of {self.block_size} tokens."
            )
        self._bind_cache(blocks)
        return blocks

    def _bind_cache(self, blocks: int) -> None:
        c = self.model_config
        shape = (2, c.num_layers, blocks, self.block_size, c.num_kv_heads, c.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for layer, holder in enumerate(self.model.caches()):
            holder.k_cache, holder.v_cache = self.cache[0, layer], self.cache[1, layer]

    def _warm_up(self) -> int:
        """Run the largest prefill once, and small ones so that everything is compiled; returns the bytes it took."""
        length = min(self.max_model_len, self.config.max_num_batched_tokens)
        count = max(1, min(self.config.max_num_batched_tokens // length, self.config.max_num_seqs))
        per_sequence = -(-length // self.block_size)
        self._bind_cache(count * per_sequence)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for sequences, tokens in ((count, length), (min(2, count), min(8, length)), (1, 1)):
            for temperature in (0.0, 1.0):
                batch = [self._warm_up_sequence(i, tokens, temperature, per_sequence) for i in range(sequences)]
                self.run(batch, is_prefill=True)
        taken = torch.cuda.max_memory_allocated() - before
        for holder in self.model.caches():
            holder.k_cache = holder.v_cache = torch.empty(0)
        del self.cache
        torch.cuda.empty_cache()
        return taken

    @staticmethod
    def _warm_up_sequence(index: int, tokens: int, temperature: float, blocks: int) -> Sequence:
        sequence = Sequence(Request(f"warm-up {index}", (0,) * tokens, SamplingParams(temperature=temperature)))
        sequence.num_scheduled = tokens
        sequence.block_table = list(range(index * blocks, (index + 1) * blocks))
        return sequence
