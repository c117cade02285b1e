"""Tensors in, tokens out: the model, its cache, and the steps it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import (
    NO_LAYER,
    EngineConfig,
    HostPhases,
    InputError,
    Probe,
    Request,
    SamplingParams,
    Site,
    TraceMode,
    hook,
)
from engines.nano.graphs import DecodeBuffers, DecodeGraphs, graph_sizes, why_no_graphs
from engines.nano.layers.attention import Backend, choose_backend
from engines.nano.layers.sampler import Sampler, SamplingBatch
from engines.nano.models import Decoder, read_model
from engines.nano.models.decoder import Family
from engines.nano.options import Options
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from engines.nano.utils.loader import Undrawn, load_weights
from engines.nano.utils.memory import Memory, untracked
from engines.nano.utils.stages import Stages
from kernels.paged_attention import tile_tokens

CPU_CACHE_BYTES = 4 * 2**30


class ModelRunner:
    """One model on one device, with its paged cache [2, layers, blocks, block_size, kv_heads, head_dim]."""

    prompt_steps: tuple[int, ...] = (1,)
    """Tokens of steps of prompts that are run at the start, so that no request waits for a kernel to be compiled."""

    def __init__(
        self, config: EngineConfig, options: Options, prepare: Callable[[ModelRunner], None], rank: int = 0
    ) -> None:
        self.config = config
        self.block_size = options.block_size
        self.rank, self.ranks = rank, options.tensor_parallel_size
        self.device = torch.device(config.device)
        self.no_graphs = "enforce_eager is set" if options.enforce_eager else why_no_graphs(self.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        if self.device.type == "cuda":
            self.untracked_at_start = untracked()
        self.model_config, family = read_model(Path(config.checkpoint))
        self.share = self.model_config.share(rank, self.ranks)
        self.max_model_len = self._check_length(config.max_model_len)
        self.backend_name, backend = choose_backend(options.attention_backend, self.device, self.dtype)
        self.stages = Stages()
        with self.stages("load weights"):
            self.model = self._load(family, backend)
        prepare(self)  # an engine with layers of its own puts them in here
        self.sampler = Sampler()
        self.kept_logits: Tensor | None = None
        self.keep_logits = False
        self.max_blocks = -(-self.max_model_len // self.block_size)
        self.buffers = self._make_buffers()
        self.graphs: Any = None  # of the decode steps; None: none
        self._plain_graphs: Any = None
        self.watched = False  # a probe is attached
        self._unhook = lambda: None
        self._meet()
        self.num_blocks = self._allocate_cache()
        if not self.no_graphs:
            with self.stages("capture graphs"):
                self.graphs = self._capture()

    @property
    def sites(self) -> list[tuple[Site, torch.nn.Module]]:
        return [*self.model.sites(), (Site(NO_LAYER, "sample", "sample"), self.sampler)]

    @torch.inference_mode()
    def run(self, sequences: list[Sequence], is_prefill: bool) -> list[int]:
        """Compute the scheduled tokens of `sequences` and draw one token for each."""
        if is_prefill:
            logits = self._prefill(self._inputs(sequences))
            self.buffers.forget()
        else:
            rows = self.buffers.fill(sequences, self.block_size)
            logits = self._decode(rows, max(len(s) for s in sequences))
        return self._sample(sequences, logits)

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        tokens = self._draw(sequences, logits)
        if self.keep_logits:
            self.kept_logits = logits.float().cpu()
        return tokens.tolist()

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        settings = [(s.sampling, len(s)) for s in sequences]
        return self.sampler(logits, SamplingBatch.of(settings, self.model_config.vocab_size, self.device))

    def host_phases(self) -> HostPhases:
        """The runner's part of what a step does on the host."""
        return {
            "prepare": [(self.buffers, "fill"), (self, "_inputs")],
            "launch": [(self, "_prefill"), (self, "_decode")],
            "sample": [(self, "_draw")],
        }

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        """Hooks on; graphs off (`eager`) or captured anew with them inside (`graph`). An error leaves all as it was."""
        self.detach()
        self._plain_graphs, self.watched = self.graphs, True
        try:
            self._unhook = hook(self.sites, probe)
            self.graphs = self._capture() if mode == "graph" else None
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        self._unhook()
        self._unhook, self.watched = lambda: None, False
        self.graphs, self._plain_graphs = self._plain_graphs or self.graphs, None

    def close(self) -> None:
        """Drop every tensor; the memory goes back to the GPU."""
        self.graphs = self._plain_graphs = self.kept_logits = None
        for name in ("model", "buffers", "cache", "sampler"):
            if hasattr(self, name):
                delattr(self, name)

    def _load(self, family: Family, backend: Backend) -> Decoder:
        with torch.device(self.device), Undrawn():
            default = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                model = Decoder(self.share, family, self.max_model_len, backend)
            finally:
                torch.set_default_dtype(default)
        load_weights(model, Path(self.config.checkpoint), self.rank, self.ranks)
        return model.eval().requires_grad_(False)

    def _make_buffers(self) -> Any:
        return DecodeBuffers(self.config.max_num_seqs, self.max_blocks, self.max_model_len, self.device)

    def _check_length(self, wanted: int) -> int:
        if wanted > self.model_config.max_position:
            raise InputError(f"max_model_len {wanted} is more than the model takes, {self.model_config.max_position}.")
        return wanted

    def _meet(self) -> None:
        """Called once the model is loaded: where other ranks would be met."""

    def _inputs(self, sequences: list[Sequence]) -> PrefillInputs:
        return PrefillInputs.of(sequences, self.block_size)

    def _prefill(self, inputs: PrefillInputs) -> Tensor:
        token_ids, positions, context = inputs.upload(self.device)
        return self.model.logits(self.model(token_ids, positions, context), context)

    def _decode(self, rows: int, longest: int) -> Tensor:
        if self.graphs is not None and rows <= self.graphs.largest:
            hidden = self.graphs.replay(rows)
            return self.model.lm_head(hidden)
        context = self.buffers.context(rows, longest)
        return self.model.logits(self.model(*self.buffers.inputs(rows), context), context)

    def _capture(self) -> DecodeGraphs:
        def step(rows: int) -> Tensor:
            return self.model(*self.buffers.inputs(rows), self.buffers.context(rows))

        return DecodeGraphs(step, self.buffers.clear, graph_sizes(self.config.max_num_seqs))

    # --- memory ---

    @property
    def _token_bytes(self) -> int:
        c = self.share
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize

    def _allocate_cache(self) -> int:
        """Size the cache and make it; returns its blocks."""
        blocks = self._fit_cache()
        if blocks < 1:
            raise InputError(
                f"No memory is left for the cache: gpu_memory_utilization {self.config.gpu_memory_utilization} "
                f"or kv_cache_tokens {self.config.kv_cache_tokens} gives less than a block of {self.block_size} tokens."
            )
        try:
            self._bind_cache(blocks)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; without a GPU it has no type of its own
            if self.config.kv_cache_tokens is None or "memory" not in str(error):
                raise
            size = blocks * self.block_size * self._token_bytes / 2**30
            raise InputError(
                f"A cache of {blocks * self.block_size:,} tokens, as kv_cache_tokens asks for, takes {size:.1f} GiB, "
                f"which are not there on {self.device}."
            ) from None
        return blocks

    def _fit_cache(self) -> int:
        """How many blocks the cache may have."""
        on_gpu, step_bytes = self.device.type == "cuda", 0
        if on_gpu:
            self._compile_ahead()
            with self.stages("run steps of all kinds"):
                step_bytes = self._warm_up()
        if self.config.kv_cache_tokens is not None:
            return self.config.kv_cache_tokens // self.block_size
        block_bytes = self._token_bytes * self.block_size
        if on_gpu:
            memory = self._memory_with_graphs()
            return memory.cache_blocks(step_bytes, self.config.gpu_memory_utilization, block_bytes)
        return max(1, min(self.config.max_num_seqs * self.max_blocks, CPU_CACHE_BYTES // block_bytes))

    def _compile_ahead(self) -> None:
        """Called before anything runs: where what steps launch could be compiled all at once."""

    def _warm_up(self) -> int:
        """Run the largest steps once, and others so that everything is compiled; returns the bytes they took for as
        long as they ran."""
        length = min(self.max_model_len, self.config.max_num_batched_tokens)
        self._bind_cache(-(-length // self.block_size))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        greedy, hot = SamplingParams(temperature=0.0), SamplingParams()
        everything = SamplingParams(top_k=1, top_p=0.5)  # sorts the whole vocabulary
        drawn: set[int] = set()  # for how many sequences; drawing does not depend on their tokens
        for sequences, tokens in self._prompts_to_warm_up(length):
            for sampling in (greedy,) if sequences in drawn else (greedy, hot, everything):
                self.run([self._warm_up_sequence(tokens, 0, sampling)] * sequences, is_prefill=True)
            drawn.add(sequences)
            if tokens > 1:  # as chunks of prompts whose beginnings are in the cache, which other kernels may compute
                self.run([self._warm_up_sequence(tokens, 1, greedy)] * sequences, is_prefill=True)
        for tokens in self._tokens_apart(length):
            for cached in (0, length - tokens):  # of a short context, and of the longest, which programs may share
                self.run([self._warm_up_sequence(cached + tokens, cached, greedy)], is_prefill=True)
        for sampling in (hot, everything):
            self.run([self._warm_up_sequence(length, length - 1, sampling)] * self.config.max_num_seqs, False)
        most = torch.cuda.max_memory_reserved() - self.cache.nbytes
        self._unbind_cache()
        return most - torch.cuda.memory_reserved()

    def _tokens_apart(self, length: int) -> list[int]:
        """Numbers of new tokens, up to `length`, at which our own attention is another kernel; none where it is not
        what runs."""
        if self.backend_name != "triton":
            return []
        group = self.share.num_heads // self.share.num_kv_heads
        return [tokens for tokens in tile_tokens(group, self.dtype.itemsize) if tokens <= length]

    def _prompts_to_warm_up(self, length: int) -> list[tuple[int, int]]:
        """(sequences, tokens of each, up to `length`) of steps: the largest, one of several short ones, others."""
        budget, most = self.config.max_num_batched_tokens, self.config.max_num_seqs
        several = min(8, most, budget)
        steps = [(max(1, min(budget // length, most)), length), (several, min(8, length, budget // several))]
        for tokens in (min(tokens, budget) for tokens in self.prompt_steps):
            sequences = -(-tokens // length)
            if sequences <= most:
                steps.append((sequences, tokens // sequences))
        return list(dict.fromkeys(steps))

    def _memory_with_graphs(self) -> Memory:
        """What the GPU's memory looks like with all there but the cache: decode graphs are captured once to see it."""
        self._bind_cache(1)
        graphs = None
        if not self.no_graphs:
            with self.stages("capture graphs to see what memory they take"):
                graphs = self._capture()
        memory = Memory.now(self.untracked_at_start)
        del graphs
        self._unbind_cache()
        return memory

    def _warm_up_sequence(self, tokens: int, cached: int, sampling: SamplingParams) -> Sequence:
        """One that may stand in a step many times: what it writes to its blocks is the same each time."""
        sequence = Sequence(Request("warm-up", (0,) * tokens, sampling))
        sequence.num_cached, sequence.num_scheduled = cached, tokens - cached
        sequence.block_table = list(range(-(-tokens // self.block_size)))
        return sequence

    def _bind_cache(self, blocks: int) -> None:
        c = self.share
        shape = (2, c.num_layers, blocks, self.block_size, c.num_kv_heads, c.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for layer, holder in enumerate(self.model.caches()):
            holder.k_cache, holder.v_cache = self.cache[0, layer], self.cache[1, layer]

    def _unbind_cache(self) -> None:
        for holder in self.model.caches():
            holder.k_cache = holder.v_cache = torch.empty(0)
        del self.cache
        torch.cuda.empty_cache()
