"""From logits to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engines.base import SamplingParams
from engines.nano.utils.compile import compiled

SORTED_ROWS = 32
"""Rows whose vocabularies are sorted at once. A sort takes some forty bytes per entry, and the cache is what is left
when a whole batch that asks for it has been provided for."""

COLDEST = 1e-30
"""Logits over a lower temperature may be infinite; colder is the same."""


@dataclass(slots=True)
class SamplingBatch:
    """The sampling settings of a step's rows. What no row asks for is None, and costs nothing.

    temperatures [rows] float32, 0 is greedy; None: all rows are greedy
    top_k [rows] int64 (vocab size where unlimited), top_p [rows] float32
    seeds: (row, seed, position) of the rows that asked for reproducible draws
    """

    temperatures: Tensor | None
    any_greedy: bool
    top_k: Tensor | None
    top_p: Tensor | None
    seeds: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, rows: list[tuple[SamplingParams, int]], vocab_size: int, device: torch.device) -> SamplingBatch:
        """From each row's settings and the position of the token to draw."""
        settings = [sampling for sampling, _ in rows]

        def upload(values: list, dtype: torch.dtype) -> Tensor:
            pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
            return pinned.to(device, non_blocking=True)

        hot = any(s.temperature > 0 for s in settings)
        limits_k = any(s.top_k > 0 for s in settings)
        limits_p = any(s.top_p < 1 for s in settings)
        return cls(
            upload([s.temperature for s in settings], torch.float32) if hot else None,
            any(s.temperature == 0 for s in settings),
            upload([s.top_k if s.top_k > 0 else vocab_size for s in settings], torch.int64) if limits_k else None,
            upload([s.top_p for s in settings], torch.float32) if limits_p else None,
            tuple((row, s.seed, position) for row, (s, position) in enumerate(rows) if s.seed is not None),
        )


class Sampler(nn.Module):
    """Draws one token per row of logits [rows, vocab]: greedy, or from softmax(logits / temperature), cut to the
    top_k most likely tokens and then to the smallest set that holds top_p of what is left."""

    def forward(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Token ids [rows] int64."""
        if batch.temperatures is None:
            return logits.argmax(-1)
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        for row, seed, position in batch.seeds:
            generator = torch.Generator(logits.device).manual_seed((int(seed) * 1_000_003 + position) % (1 << 63))
            noise[row].exponential_(generator=generator)
        if batch.top_k is not None or batch.top_p is not None:
            divisors = batch.temperatures.clamp_min(COLDEST).unsqueeze(1)
            logits = keep_likely(logits.float() / divisors, batch.top_k, batch.top_p)
            tokens = self.draw(logits, torch.ones_like(batch.temperatures), noise)
        else:
            tokens = self.draw(logits, batch.temperatures, noise)
        if batch.any_greedy:
            tokens = torch.where(batch.temperatures == 0, logits.argmax(-1), tokens)
        return tokens

    @compiled
    def draw(self, logits: Tensor, temperatures: Tensor, noise: Tensor) -> Tensor:
        """argmax p / e with e ~ Exp(1) is an exact draw from p (the exponential race)."""
        scaled = logits.float() / temperatures.clamp_min(COLDEST).unsqueeze(1)
        # In log space, where no probability underflows: log p - log e, and softmax's constant does not move the argmax.
        return (scaled - noise.clamp_min(1e-30).log()).argmax(-1)


def keep_likely(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """logits [rows, vocab] with what top_k [rows] and then top_p [rows] leave out set to -inf."""
    kept = torch.empty_like(logits)
    for first in range(0, len(logits), SORTED_ROWS):
        rows = slice(first, first + SORTED_ROWS)
        kept[rows] = _keep_likely(
            logits[rows], None if top_k is None else top_k[rows], None if top_p is None else top_p[rows]
        )
    return kept


def _keep_likely(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    ordered, order = logits.sort(-1, descending=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(1), -torch.inf)
    if top_p is not None:
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p.unsqueeze(1), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)
