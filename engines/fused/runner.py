"""nano's runner with the decode step on the device: a step can be launched before the one before it was read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from engines.base import EngineConfig, HostPhases, SamplingParams, Site
from engines.fused.decode import DecodeStep, Graphs
from engines.fused.features import FusedOptions, fallbacks
from engines.fused.layers import FusedLayer
from engines.fused.prefill import HostInputs
from engines.fused.prefill_graphs import (
    FEW_TOKENS,
    MAX_SEQUENCES,
    Padded,
    PrefillBuffers,
    PrefillGraphs,
    most_padded,
    run_layers,
    token_sizes,
)
from engines.fused.products import FinalNorm
from engines.fused.state import DecodeState, Flight, Rows
from engines.nano.graphs import DecodeGraphs, graph_sizes
from engines.nano.layers.sampler import COLDEST, SamplingBatch, keep_likely
from engines.nano.model_runner import ModelRunner
from engines.nano.sequence import Sequence
from kernels.decode_attention import workspace
from kernels.decode_attention_launch import SHORT_CONTEXT, has_short_launch


class FusedRunner(ModelRunner):
    """nano's, but that `launch` starts a decode step and leaves its tokens to be read later."""

    prompt_steps = (1, *(1 << n for n in range(5, 15)))  # each may have launches of its own, captured or not

    def __init__(self, config: EngineConfig, options: FusedOptions) -> None:
        self.options = options
        super().__init__(config, options, lambda _runner: self._fuse())

    def _fuse(self) -> None:
        """Put the fused layers in place of nano's, once the weights are there."""
        reasons = fallbacks(self.model_config, self.device, self.block_size)
        self.fallbacks = {feature: reasons[feature] for feature in self.options.features if feature in reasons}
        self.features = frozenset(self.options.features) - self.fallbacks.keys()
        layers, rows = self.model.layers, self.options.max_fused_prefill_rows
        self.model.model.layers = nn.ModuleList(
            FusedLayer(layer, self.features, rows, last=layer is layers[-1]) for layer in layers
        )
        for layer, following in pairwise(self.model.layers):
            layer.followed_by(following)
        self.model.model.norm = FinalNorm(self.model.model.norm)  # type: ignore[assignment]
        self.kernels = "triton" if kernels.runs_triton(self.model.lm_head.matrix) else "reference"

    def _make_buffers(self) -> DecodeState:
        c = self.model_config
        self.state = DecodeState(self.config.max_num_seqs, self.max_blocks, self.model.model.embed_tokens.weight)
        shared = workspace(self.config.max_num_seqs, c.num_heads, c.head_dim, self.device)
        for layer in self.model.layers:
            layer.workspace = shared
        self.step = DecodeStep(self.model, self.state, self.features, self.block_size)
        return self.state

    @property
    def sites(self) -> list[tuple[Site, nn.Module]]:
        return self.step.sites()

    @torch.inference_mode()
    def launch(self, sequences: list[Sequence], unread: Flight | None = None) -> Flight:
        """Draw the next token of each of `sequences`; those in `unread` go on from the token that is drawn there."""
        self.state.arrange(sequences, unread)
        logits = self._decode(len(sequences), max(len(s) for s in sequences) + 1)
        return self._take_off(sequences, logits, self.state)

    @torch.inference_mode()
    def run(self, sequences: list[Sequence], is_prefill: bool) -> list[int]:
        if not is_prefill:
            return self.launch(sequences).read()
        inputs = self._inputs(sequences)
        logits = self._prefill(inputs)
        self.state.forget()
        if isinstance(inputs, Padded):
            return self._take_off(sequences, logits, self.graphs.prefill.buffers.rows).read()
        return self._sample(sequences, logits)

    def _take_off(self, sequences: list[Sequence], logits: Tensor, rows: Rows) -> Flight:
        """End what was launched for the first `rows`, which have drawn from `logits`."""
        if any(cuts(s.sampling) for s in sequences):
            self._draw_again(sequences, logits, rows)
        flight = rows.flight(sequences)
        if self.keep_logits:
            self.kept_logits = logits.to("cpu", torch.float32, copy=True)  # the next step writes to the same memory
        return flight

    def _decode(self, rows: int, longest: int) -> Tensor:
        if self.graphs is not None and rows <= self.graphs.largest:
            return self.graphs.replay_step(rows, longest)
        if "dependent" in self.features:
            self.state.embed()  # the same once more, but launched in the ordinary way: it keeps two steps apart
        return self.step(rows, longest)

    def _inputs(self, sequences: list[Sequence]) -> Any:
        """`Padded` of a prefill step that has a graph, else `HostInputs`."""
        graphs = self.graphs.prefill if self.graphs is not None else None
        if graphs is not None and graphs.fits(sequences):
            return graphs.buffers.fill(sequences, self.block_size)
        return HostInputs.of(sequences, self.block_size, self.device)

    def _prefill(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Padded):
            return self.graphs.prefill.run(inputs)
        return self.model.lm_head(self.model(*inputs.upload(self.device)))

    def _draw_again(self, sequences: list[Sequence], logits: Tensor, rows: Rows) -> None:
        """Some rows want top_k or top_p, which the step knows nothing of: draw once more from what they leave."""
        count = len(sequences)
        # The step has moved the state on; this is the draw that it made.
        positions, steps = rows.positions[:count] - 1, rows.steps[:count] - 1
        self._choose(sequences, logits, positions, rows.tokens[:count], rows.ring, steps, rows.embedding(count))

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """Tokens after a prefill without a graph, drawn as in decode: a request's tokens depend on its seed alone."""
        positions = self._put([len(s) - 1 for s in sequences], torch.int32)
        tokens, steps = torch.empty_like(positions), torch.zeros_like(positions)
        self._choose(sequences, logits, positions, tokens, tokens.new_empty(1, len(sequences)), steps)
        return tokens

    def _choose(
        self, sequences: list[Sequence], logits: Tensor, positions: Tensor, tokens: Tensor, ring: Tensor, steps: Tensor,
        embedding: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        batch = SamplingBatch.of([(s.sampling, 0) for s in sequences], self.model_config.vocab_size, self.device)
        temperatures = batch.temperatures
        if temperatures is None:
            temperatures = torch.zeros(len(sequences), device=self.device)
        cut = [cuts(s.sampling) for s in sequences]
        if any(cut):
            divisors = temperatures.clamp_min(COLDEST).unsqueeze(1)
            likely = keep_likely(logits.float() / divisors, batch.top_k, batch.top_p)
            # Other rows stay as they are, or their draws would depend on who stands beside them.
            is_cut = self._put(cut, torch.bool)
            logits = torch.where(is_cut.unsqueeze(1), likely, logits)
            temperatures = torch.where(is_cut, 1.0, temperatures)  # the logits are divided already
        seeds = self._put([s.seed for s in sequences], torch.int64)
        sums = kernels.tile_stats(logits, temperatures)
        kernels.choose_token(logits, *sums, temperatures, seeds, positions, tokens, ring, steps, embedding)

    def _put(self, values: list[int] | list[bool], dtype: torch.dtype) -> Tensor:
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _compile_ahead(self) -> None:
        if self.kernels != "triton":
            return
        with self.stages("compile kernels"), self._two_layers(), kernels.compiled_ahead(self.stages.progress):
            self._warm_up()
            self._bind_cache(1)
            self._launch_captured()
            self._unbind_cache()
        self.state.stream.zero_()  # its kernels did not run, others' did: it may hold anything
        self.state.clear()

    @contextmanager
    def _two_layers(self) -> Iterator[None]:
        """The model cut down to its first and its last layer: the others launch the kernels of the first."""
        layers = self.model.model.layers
        self.model.model.layers = nn.ModuleList({id(layer): layer for layer in (layers[0], layers[-1])}.values())
        try:
            yield
        finally:
            self.model.model.layers = layers

    @torch.inference_mode()
    def _launch_captured(self) -> None:
        """Once all that `_capture` captures, as steps of no sequences; it is as much if nothing will be captured."""
        self.state.clear()
        sizes, short = self._decode_sizes()
        for rows in sizes:
            self.step(rows, self.max_model_len)
        for rows in short:
            self.step(rows, SHORT_CONTEXT)
        if (buffers := self._prefill_buffers()) is not None:
            stream = self.state.stream.new_zeros(buffers.max_sequences, self.model_config.hidden_size)
            for size in buffers.sizes:
                buffers.clear(size)
                run_layers(self.model, *buffers.inputs(size, stream))
            for rows in graph_sizes(buffers.max_sequences):
                self.step.draw(stream[:rows], buffers.rows)

    def _capture(self) -> Graphs:
        sizes, short = self._decode_sizes()
        graphs = Graphs(lambda rows: self.step(rows, self.max_model_len), self.state.clear, sizes)
        if short:
            graphs.short = DecodeGraphs(
                lambda rows: self.step(rows, SHORT_CONTEXT), self.state.clear, short, graphs.pool
            )
        if not self.watched and (buffers := self._prefill_buffers()) is not None:
            graphs.prefill = PrefillGraphs(self.model, self.step.draw, buffers, pool=graphs.pool)
        return graphs

    def _decode_sizes(self) -> tuple[list[int], list[int]]:
        """Numbers of rows whose decode steps are captured; and those that are once more, for short contexts."""
        sizes, c = graph_sizes(self.config.max_num_seqs), self.model_config
        if "attention" not in self.features or self.max_model_len <= SHORT_CONTEXT:
            return sizes, []
        heads = c.num_heads, c.num_kv_heads, c.head_dim, self.state.stream.element_size(), self.device
        return sizes, [rows for rows in sizes if has_short_launch(rows, *heads)]

    def _prefill_buffers(self) -> PrefillBuffers | None:
        """Those of captured prefills; None: there are none."""
        if "prefill_graphs" not in self.features:
            return None
        # A step of one token alone is no prefill to attention: it is padded.
        most = most_padded(sum(w.numel() for w in self.model.layers[0].plain.parameters() if w.dim() == 2))
        return PrefillBuffers(
            token_sizes(max(2, self.config.max_num_batched_tokens), most), min(MAX_SEQUENCES, self.config.max_num_seqs),
            self.max_blocks, self.device, "dependent" in self.features,
            FEW_TOKENS if "prefill_products" in self.features else 0, most,
        )  # fmt: skip

    def host_phases(self) -> HostPhases:
        return {
            "prepare": [(self.state, "arrange"), (self, "_inputs")],
            "launch": [(self, "_prefill"), (self, "_decode")],
            "sample": [(self, "_draw")],
        }

    def close(self) -> None:
        super().close()
        for name in ("step", "state"):
            if hasattr(self, name):
                delattr(self, name)


def cuts(sampling: SamplingParams) -> bool:
    """Whether top_k or top_p leaves out tokens that could be drawn: the greatest logit always stays."""
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1)
