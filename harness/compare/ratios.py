"""Ratios from pairs: two engines' blocks of the same round ran next to each other, so drift cancels in their ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Verdict = Literal["faster", "slower", "even"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean of paired ratios with its confidence interval; `pairs` went in."""

    value: float
    low: float
    high: float
    pairs: int

    def verdict(self, higher_is_better: bool) -> Verdict:
        """`even` unless the whole interval lies on one side of 1."""
        if self.low <= 1 <= self.high:
            return "even"
        return "faster" if (self.value > 1) == higher_is_better else "slower"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """`ours` / `theirs`, pair by pair [n], by Student's t on the logarithms. One pair has an interval without ends.

    ValueError: no pairs, different numbers, or values that are not above 0.
    """
    if len(ours) != len(theirs) or not ours or min(*ours, *theirs) <= 0:
        raise ValueError("paired ratios need as many values above 0 on both sides, at least one")
    logs = np.log(np.asarray(ours, dtype=np.float64) / np.asarray(theirs, dtype=np.float64))
    n, mean = len(logs), float(logs.mean())
    if n == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * logs.std(ddof=1) / math.sqrt(n))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)
