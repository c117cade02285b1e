"""Intervals against what they promise on data of known median, stopping, and the end of warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from harness.statistics import MedianInterval, StoppingRule, median_interval, warmup_count

REPEATS = 200
SAMPLES = 200


def _ar1(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """Stationary Gaussian AR(1) with mean and median 0."""
    noise = rng.standard_normal(n)
    values = np.empty(n)
    values[0] = noise[0] / math.sqrt(1 - correlation**2)
    for i in range(1, n):
        values[i] = correlation * values[i - 1] + noise[i]
    return values


@pytest.mark.parametrize(
    ("name", "draw", "median"),
    [
        ("normal", lambda rng: 100 + rng.standard_normal(SAMPLES), 100.0),
        ("exponential", lambda rng: rng.exponential(size=SAMPLES), math.log(2)),
        ("ar1", lambda rng: 5 + _ar1(rng, SAMPLES, 0.3), 5.0),
    ],
)
def test_interval_covers_the_true_median(
    name: str, draw: Callable[[np.random.Generator], np.ndarray], median: float
) -> None:
    """A 95 % interval holds the truth in at least 90 % of the repeats, and is not so wide as to always do so."""
    rng = np.random.default_rng(7)
    intervals = [median_interval(draw(rng), seed=i) for i in range(REPEATS)]
    covered = sum(i.low <= median <= i.high for i in intervals) / REPEATS
    assert 0.90 <= covered <= 0.995, f"{name}: {covered}"


def test_interval_width_matches_theory() -> None:
    """The median of n normal values has a standard error of sqrt(pi / 2 / n)."""
    rng = np.random.default_rng(1)
    widths = [(i := median_interval(rng.standard_normal(1000))).high - i.low for _ in range(40)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(math.pi / 2 / 1000), rel=0.1)


def test_correlated_samples_give_wider_intervals_than_shuffled_ones() -> None:
    rng = np.random.default_rng(2)
    values = _ar1(rng, 2000, 0.8)
    shuffled = rng.permutation(values)
    width, shuffled_width = ((i := median_interval(v)).high - i.low for v in (values, shuffled))
    assert width > 1.5 * shuffled_width


def test_interval_is_repeatable_and_ordered() -> None:
    values = np.random.default_rng(3).lognormal(size=101)
    first = median_interval(values, seed=5)
    assert first == median_interval(values, seed=5)
    assert first.low <= first.median <= first.high
    assert first.median == np.median(values)
    narrow = median_interval(values, confidence=0.5, seed=5)
    assert narrow.high - narrow.low < first.high - first.low


def test_large_samples_are_resampled_in_parts() -> None:
    interval = median_interval(np.random.default_rng(4).standard_normal(20_000))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(math.pi / 2 / 20_000), rel=0.15)


def test_degenerate_samples() -> None:
    one = median_interval([3.0])
    assert (one.median, one.low, one.high, one.relative_width) == (3.0, 3.0, 3.0, 0.0)
    assert median_interval([2.0] * 50).relative_width == 0.0
    assert MedianInterval(0.0, -1.0, 1.0, 9).relative_width == math.inf
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite"):
            median_interval(bad)
    with pytest.raises(ValueError, match="confidence"):
        median_interval([1.0], confidence=95)


def _feed(rule: StoppingRule, rng: np.random.Generator, noise: float) -> int:
    while rule.done is None:
        rule.add(100 * (1 + noise * rng.standard_normal()))
    return len(rule.samples)


def test_stops_at_the_asked_precision_and_not_before() -> None:
    """Noise s needs about (2 * 1.96 * s / precision)^2 * pi / 2 samples; checks may come a quarter late."""
    rule = StoppingRule(precision=0.01, min_iterations=10, max_iterations=100_000, max_seconds=1e9)
    n = _feed(rule, np.random.default_rng(5), noise=0.04)
    assert rule.done == "precision"
    assert 0.5 * 386 <= n <= 1.9 * 386
    assert median_interval(rule.samples).relative_width <= 0.01


def test_quiet_samples_stop_at_the_minimum() -> None:
    rule = StoppingRule(precision=0.01, min_iterations=12, max_iterations=100, max_seconds=1e9)
    assert rule.done is None
    assert _feed(rule, np.random.default_rng(6), noise=0.0) == 12
    assert rule.done == "precision"


def test_noisy_samples_stop_at_the_maximum() -> None:
    rule = StoppingRule(precision=0.001, min_iterations=10, max_iterations=64, max_seconds=1e9)
    assert _feed(rule, np.random.default_rng(7), noise=0.5) == 64
    assert rule.done == "max_iterations"


def test_time_limit_is_kept_but_one_sample_is_taken() -> None:
    now = [0.0]
    rule = StoppingRule(0.001, min_iterations=10, max_iterations=1000, max_seconds=2.0, clock=lambda: now[0])
    now[0] = 5.0
    assert rule.done is None
    rule.add(1.0)
    assert rule.done == "time"


def test_samples_cost_little_to_add() -> None:
    """Bootstraps are few: 1000 samples are looked at about log(1000 / 10) / log(1.25) times."""
    rule = StoppingRule(precision=0.0, min_iterations=10, max_iterations=10_000, max_seconds=1e9)
    looks, rng = set(), np.random.default_rng(8)
    for _ in range(1000):
        rule.add(rng.standard_normal() + 10)
        looks.add(rule._next_check)
    assert 15 <= len(looks) <= 25


def test_impossible_rules_are_refused() -> None:
    for low, high in ((0, 5), (6, 5)):
        with pytest.raises(ValueError, match="min_iterations"):
            StoppingRule(0.01, low, high, 1.0)


def test_warmup_is_found_and_steady_runs_have_none() -> None:
    rng = np.random.default_rng(9)
    steady = 100 + rng.standard_normal(200)
    warming = steady + 60 * np.exp(-np.arange(200) / 6)
    assert 10 <= warmup_count(warming) <= 60
    spiky = steady.copy()
    spiky[3] = 10_000.0
    assert warmup_count(spiky) <= 60
    assert warmup_count(spiky) == warmup_count(np.where(spiky > 200, steady.max(), spiky))
    assert warmup_count([5.0] * 40) == 0
    assert warmup_count([9.0, 1.0, 1.0]) == 0
    assert warmup_count(np.arange(100.0)) <= 50
