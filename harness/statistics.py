"""Medians with honest intervals, when to stop sampling, and where warm-up ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

StopReason = Literal["precision", "max_iterations", "time"]

_RESAMPLES = 1000
"""Enough for two steady digits of a 95 % interval's ends; more does not help a decision at 1 %."""
_CHUNK = 1 << 22
"""Most resampled values held at once (32 MiB)."""
_CHECK_GROWTH = 1.25
"""The interval is looked at again after a quarter more samples: O(log n) bootstraps, at most a quarter too many."""
_WARMUP_BATCH = 5
"""MSER-5: samples per batch."""


@dataclass(frozen=True, slots=True)
class MedianInterval:
    """A median and its confidence interval, in the samples' unit."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def relative_width(self) -> float:
        """(high - low) / median; infinite where the median is 0 and the interval is not a point."""
        width = self.high - self.low
        return width / abs(self.median) if self.median else math.inf if width else 0.0


def median_interval(samples: ArrayLike, confidence: float = 0.95, seed: int = 0) -> MedianInterval:
    """Median of `samples` [n] with a percentile interval from a circular block bootstrap.

    Blocks of n^(1/3) neighbours are drawn together, since neighbouring steps share clocks and temperature; drawn one by
    one they would look more independent than they are (Künsch 1989; length: Hall, Horowitz and Jing 1995). Few blocks
    make percentiles too narrow, so these are widened as Student's t is (Hesterberg 2015, "expanded percentile").
    ValueError: no samples, or not finite.
    """
    values = np.asarray(samples, dtype=np.float64).ravel()
    n = len(values)
    if n == 0 or not np.isfinite(values).all():
        raise ValueError("a median needs at least one sample, all finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), not {confidence}")
    medians = _bootstrap_medians(values, np.random.default_rng(seed))
    tail = _expanded_tail(confidence, math.ceil(n / _block_length(n)))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return MedianInterval(float(np.median(values)), float(low), float(high), n)


def _block_length(samples: int) -> int:
    return math.ceil(samples ** (1 / 3))


def _expanded_tail(confidence: float, blocks: int) -> float:
    """Probability to cut from each side of a bootstrap of `blocks` independent pieces.

    The normal quantile z becomes sqrt(b / (b - 1)) t(b - 1), with t from its expansion in 1 / (b - 1).
    """
    z, freedom = NormalDist().inv_cdf((1 + confidence) / 2), max(1, blocks - 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-t * math.sqrt((freedom + 1) / freedom))


def _bootstrap_medians(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians of `_RESAMPLES` resamples of `values` [n], each n long and made of whole blocks (the last one cut)."""
    n, block = len(values), _block_length(len(values))
    blocks = math.ceil(n / block)
    per_chunk = max(1, _CHUNK // (blocks * block))
    medians = []
    for first in range(0, _RESAMPLES, per_chunk):
        starts = rng.integers(n, size=(min(per_chunk, _RESAMPLES - first), blocks, 1))
        index = (starts + np.arange(block)) % n
        medians.append(np.median(values[index.reshape(len(starts), -1)[:, :n]], axis=1))
    return np.concatenate(medians)


class StoppingRule:
    """Says when a shape has been sampled enough: add each sample, stop once `done` gives a reason.

    Reasons, in this order: `precision` (at least `min_iterations` samples, and the 95 % interval of the median is
    narrower than `precision` times the median), `max_iterations`, `time` (`max_seconds` since the rule was made).
    """

    def __init__(
        self,
        precision: float,
        min_iterations: int,
        max_iterations: int,
        max_seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if min_iterations < 1 or max_iterations < min_iterations:
            raise ValueError(f"need 1 <= min_iterations <= max_iterations, not {min_iterations} and {max_iterations}")
        self.samples: list[float] = []
        self._precision = precision
        self._max_iterations = max_iterations
        self._deadline_s = clock() + max_seconds
        self._clock = clock
        self._next_check = min_iterations
        self._precise = False

    def add(self, sample: float) -> None:
        """Add one sample; looks at the interval now and then, so that most calls cost nothing."""
        self.samples.append(sample)
        if not self._precise and len(self.samples) >= self._next_check:
            self._precise = median_interval(self.samples).relative_width <= self._precision
            self._next_check = math.ceil(len(self.samples) * _CHECK_GROWTH)

    @property
    def done(self) -> StopReason | None:
        """Why to stop now, None to go on. Never before there is a sample."""
        if not self.samples:
            return None
        if self._precise:
            return "precision"
        if len(self.samples) >= self._max_iterations:
            return "max_iterations"
        return "time" if self._clock() >= self._deadline_s else None


def warmup_count(samples: Sequence[float] | NDArray[np.float64]) -> int:
    """How many first samples to leave out as warm-up, by MSER-5 (White 1997) on medians of batches of five.

    It takes the cut d of the k batches that makes the rest's variance / (k - d) least, at most half of them; medians
    instead of means keep one slow sample from looking like a warm-up. 0 where there are too few samples to tell.
    """
    values = np.asarray(samples, dtype=np.float64)
    batches = len(values) // _WARMUP_BATCH
    if batches < 2:
        return 0
    medians = np.median(values[: batches * _WARMUP_BATCH].reshape(batches, _WARMUP_BATCH), axis=1)
    errors = [medians[cut:].var() / (batches - cut) for cut in range(batches // 2 + 1)]
    return int(np.argmin(errors)) * _WARMUP_BATCH
