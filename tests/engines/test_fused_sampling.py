"""Top-k and top-p before the kernels that draw: the exact distribution of what is left."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

import kernels
from engines.base import HOTTEST
from engines.nano.layers.sampler import keep_likely

VOCAB = 300
DRAWS = 10_000


def logits_of(dtype: torch.dtype) -> torch.Tensor:
    """Eight tokens matter, over all three tiles of 128; two of them are equal."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) - 4
    logits[[3, 127, 128, 200, 255, 256, 270, 299]] = torch.tensor([2.0, 1.5, 1.25, 1.0, 0.5, 0.5, 0.0, -0.5])
    return logits.to(dtype)


def allowed_by_hand(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> list[int]:
    """The top_k most likely, of which the fewest that hold top_p of what the top_k hold; equals in order of index."""
    weights = {
        token: torch.tensor(z / temperature, dtype=torch.float64).exp() for token, z in enumerate(logits.tolist())
    }
    likely = sorted(weights, key=lambda token: (-logits[token], token))[:top_k]
    whole = sum(weights[token] for token in likely)
    allowed, held = [], 0.0
    for token in likely:
        if held >= top_p * whole:
            break
        allowed.append(token)
        held += weights[token]
    return allowed


def draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, draws: int, seed: int) -> torch.Tensor:
    """Tokens of `draws` positions: logits / T are cut as nano cuts them, and the kernels draw at temperature 1."""
    cut = keep_likely(logits.float().unsqueeze(0) / temperature, torch.tensor([top_k]), torch.tensor([top_p]))
    rows = cut.repeat(draws, 1)
    one = torch.ones(draws)
    tokens = torch.empty(draws, dtype=torch.int32)
    positions = torch.arange(draws, dtype=torch.int32)
    kernels.choose_token(
        rows, *kernels.tile_stats(rows, one), one, torch.full((draws,), seed), positions, tokens,
        torch.zeros(2, draws, dtype=torch.int32), torch.zeros(draws, dtype=torch.int64),
    )  # fmt: skip
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "left"),
    [
        (1.0, 6, 1.0, 6),
        (0.6, 4, 1.0, 4),
        (1.0, VOCAB, 0.8, 26),
        (0.6, VOCAB, 0.8, 4),
        (1.5, 6, 0.7, 4),
        (1.0, 1, 1.0, 1),
        (1e30, 6, 1.0, 6),
    ],
)
def test_draws_from_the_cut_distribution(temperature, top_k, top_p, left, dtype):
    logits = logits_of(dtype)
    allowed = allowed_by_hand(logits, temperature, top_k, top_p)
    assert len(allowed) == left
    weights = (logits[allowed].double() / temperature).exp()
    tokens = draw(logits, temperature, top_k, top_p, DRAWS, seed=17)
    counts = torch.tensor([(tokens == token).sum() for token in allowed]).double()
    assert counts.sum() == DRAWS, "a token that was cut off was drawn"
    if left > 1:
        assert chisquare(counts, weights / weights.sum() * DRAWS).pvalue > 1e-4


@pytest.mark.parametrize(
    "path",
    [
        "reference",
        pytest.param("triton", marks=pytest.mark.skipif(not kernels.INTERPRETED, reason="needs Triton's interpreter")),
    ],
)
def test_the_highest_temperature_draws_evenly(path):
    """Beyond the vocabulary's end logits of -inf are read, and one is in it."""
    draws = 6000 if path == "reference" else 60
    logits = logits_of(torch.float32)[:150]
    logits[149] = -torch.inf
    rows, hot = logits.repeat(draws, 1), torch.full((draws,), HOTTEST)
    tokens = torch.empty(draws, dtype=torch.int32)
    with kernels.use(path):
        kernels.choose_token(
            rows, *kernels.tile_stats(rows, hot), hot, torch.full((draws,), 5), torch.arange(draws, dtype=torch.int32),
            tokens, torch.zeros(2, draws, dtype=torch.int32), torch.zeros(draws, dtype=torch.int64),
        )  # fmt: skip
    counts = torch.bincount(tokens, minlength=150)
    assert counts[149] == 0
    assert chisquare(counts[:149]).pvalue > 1e-4


@pytest.mark.skipif(not kernels.INTERPRETED, reason="on a GPU tests/kernels compares kernel and reference")
def test_kernels_draw_the_same_from_cut_logits():
    """Whole tiles of -inf and all: the interpreted kernels choose what their references choose."""
    arguments = (logits_of(torch.float32), 0.9, 6, 0.9, 12, 23)
    expected = draw(*arguments)
    with kernels.use("triton"):
        tokens = draw(*arguments)
    assert torch.equal(tokens, expected)
    assert len(set(tokens.tolist())) > 2
