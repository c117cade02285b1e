"""Draws against exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from engines.base import InputError, SamplingParams
from engines.nano.layers import sampler
from engines.nano.layers.sampler import Sampler, SamplingBatch

LOGITS = torch.tensor([1.5, -0.3, 0.7, 2.0, -1.0, 0.0])
DRAWS = 20_000


def draw(sampling: SamplingParams, rows: int = DRAWS) -> torch.Tensor:
    settings = [(sampling, position) for position in range(rows)]
    batch = SamplingBatch.of(settings, len(LOGITS), torch.device("cpu"))
    return Sampler()(LOGITS.repeat(rows, 1), batch)


def exact(temperature: float, allowed: list[int]) -> torch.Tensor:
    weights = torch.zeros(len(LOGITS), dtype=torch.float64)
    weights[allowed] = (LOGITS.double()[allowed] / temperature).exp()
    return weights / weights.sum()


# In order of likelihood the tokens are 3, 0, 2, 5, 1, 4; at temperature 1 the first three hold 0.47, 0.28, 0.13.
@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (SamplingParams(temperature=1.0), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=0.6), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=0.6, top_k=-1), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1.3, top_k=2), [3, 0]),
        (SamplingParams(temperature=1.0, top_p=0.7), [3, 0]),
        (SamplingParams(temperature=1.0, top_p=0.8), [3, 0, 2]),
        (SamplingParams(temperature=2.0, top_k=4, top_p=0.6), [3, 0]),
        (SamplingParams(temperature=1e30), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1e30, top_k=3), [3, 0, 2]),
    ],
)
def test_distribution(sampling, allowed):
    torch.manual_seed(1)
    want = exact(sampling.temperature, allowed)
    counts = torch.bincount(draw(sampling), minlength=len(LOGITS)).double()
    assert counts[want == 0].sum() == 0
    assert chisquare(counts[want > 0], (want * DRAWS)[want > 0]).pvalue > 1e-3


def test_greedy_and_hot_rows_in_one_batch():
    rows = [(SamplingParams(temperature=t), 0) for t in (0.0, 5.0) * 500]
    tokens = Sampler()(LOGITS.repeat(1000, 1), SamplingBatch.of(rows, len(LOGITS), torch.device("cpu")))
    assert set(tokens[::2].tolist()) == {3}
    assert len(set(tokens[1::2].tolist())) == len(LOGITS)


@pytest.mark.parametrize("seed", [10**14, 2**63, 2**80, -1, np.int64(5)])
def test_any_whole_number_is_a_seed(seed):
    """One that the generator cannot take would fail its step for ever, and with it all requests beside it."""
    seeded = SamplingParams(temperature=1.0, seed=seed)
    assert torch.equal(draw(seeded, rows=20), draw(seeded, rows=20))


def test_seeded_draw_depends_on_seed_and_position_alone():
    seeded = SamplingParams(temperature=1.0, seed=7)
    alone = draw(seeded, rows=50)
    torch.manual_seed(99)
    mixed = [(seeded, p) if p % 2 else (SamplingParams(), p) for p in range(50)]
    tokens = Sampler()(LOGITS.repeat(50, 1), SamplingBatch.of(mixed, len(LOGITS), torch.device("cpu")))
    assert torch.equal(tokens[1::2], alone[1::2])
    assert not torch.equal(draw(SamplingParams(temperature=1.0, seed=8), rows=50), alone)


@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 1e-50])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_cold_draws_are_the_greatest_logit(temperature, cut):
    """So cold that the logits over the temperature are infinite, or that it is 0 in float32."""
    batch = SamplingBatch.of([(SamplingParams(temperature, **cut), 0)] * 50, len(LOGITS), torch.device("cpu"))
    assert set(Sampler()(4 * LOGITS.repeat(50, 1), batch).tolist()) == {3}


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": value} for value in (-1, 1e31, float("inf"), float("nan"))),
        {"max_tokens": 0}, {"top_p": 0}, {"top_k": -2},
    ],
)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(InputError):
        SamplingParams(**bad)


def test_rows_are_cut_alike_however_many_are_sorted_at_once(monkeypatch):
    """Against a plain loop over the sorted tokens of each row."""
    monkeypatch.setattr(sampler, "SORTED_ROWS", 2)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)) * 3
    top_k, top_p = torch.tensor([40, 3, 7, 1, 25]), torch.tensor([0.5, 1.0, 0.8, 1.0, 0.9])
    kept = sampler.keep_likely(logits, top_k, top_p)
    for row in range(5):
        order = sorted(range(40), key=lambda token: -logits[row, token].item())[: top_k[row]]
        weights = [logits[row, token].double().exp().item() for token in order]
        expected, mass = [], 0.0
        for token, weight in zip(order, weights, strict=True):
            if mass / sum(weights) >= top_p[row].item():
                break
            expected.append(token)
            mass += weight
        assert sorted(expected) == (kept[row] > -torch.inf).nonzero().flatten().tolist()
        assert torch.equal(kept[row, expected], logits[row, expected])
