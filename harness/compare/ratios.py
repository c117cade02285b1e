"""Ratios from pairs: two engines' blocks of the same round ran next to each other, so drift cancels in their ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MIN_LAUNCHES = 3
"""Fewest launches whose differences say something of the next one's."""

Verdict = Literal["faster", "slower", "even"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A geometric mean of paired ratios with its confidence interval; `pairs` went in.

    `over_launches`: the interval also holds what differs from one start of the engines to the next. With fewer than
    three launches that cannot be seen, and the interval is one for these processes only.
    """

    value: float
    low: float
    high: float
    pairs: int
    over_launches: bool = False

    def verdict(self, higher_is_better: bool) -> Verdict:
        """`even` unless the whole interval lies on one side of 1."""
        if self.low <= 1 <= self.high:
            return "even"
        return "faster" if (self.value > 1) == higher_is_better else "slower"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], launches: Sequence[int] | None = None) -> Ratio:
    """`ours` / `theirs`, pair by pair [n], by Student's t on the logarithms. One pair has an interval without ends.

    `launches` [n] says which launch a pair is from. Rounds of one launch share its processes and are not independent
    of each other, so from three launches on the launches' means are what the interval is made from.
    ValueError: no pairs, different numbers, or values that are not above 0.
    """
    if len(ours) != len(theirs) or not ours or min(*ours, *theirs) <= 0:
        raise ValueError("paired ratios need as many values above 0 on both sides, at least one")
    logs = np.log(np.asarray(ours, dtype=np.float64) / np.asarray(theirs, dtype=np.float64))
    pairs, number = len(logs), np.asarray(launches if launches is not None else [0] * len(logs))
    over_launches = len(set(number)) >= MIN_LAUNCHES
    if over_launches:
        logs = np.array([logs[number == launch].mean() for launch in np.unique(number)])
    n, mean = len(logs), float(logs.mean())
    if n == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, pairs)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * logs.std(ddof=1) / math.sqrt(n))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), pairs, over_launches)
