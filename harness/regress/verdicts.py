"""From two sides to verdicts.

The unit of independence is the launch, one start of an engine's process: two launches of the same code differ by more
than the steps of one launch do, since memory layout, clocks, temperature and autotuning are drawn once for each. A
thousand steps of one launch say nothing of that. So with at least three launches a side is its launches' medians, and
their own spread is its error (Welch's t-test on logarithms). With fewer, its error is made of what can be seen, the
spread within a launch by block bootstrap, and of what cannot: a launch is assumed to be off by `launch_noise`, or by
what the other side's launches show, if that is more.

In either case a second test must agree, whose error is `launch_noise` and nothing else, so three launches that happen
to lie close together prove no more than three launches can. `launch_noise` is a guess; where both sides have enough
launches to show less, it gives way by as much as they weigh against it (`assumed_noise`). The first test alone keeps
false alarms as rare as promised, whatever the noise. The interval shown holds both tests' intervals.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from scipy import stats

from harness.regress.sides import Cell, Key, Side
from harness.regress.thresholds import Thresholds
from harness.statistics import median_interval


class Verdict(StrEnum):
    """UNSURE until something else is earned."""

    SLOWER = "SLOWER"
    UNSURE = "UNSURE"
    FASTER = "FASTER"
    SAME = "SAME"


class Reason(StrEnum):
    """Why a row has its verdict."""

    SIGNIFICANT = "significant"
    """SLOWER, FASTER: the change is large enough and survives the control of false discoveries."""
    NO_CHANGE = "no_change"
    """SAME: the interval holds 0 and lies within `same_within`."""
    SMALL_CHANGE = "small_change"
    """SAME: there is a change, below `min_effect`."""
    BASELINE_FAILED = "baseline_failed"
    CANDIDATE_FAILED = "candidate_failed"
    """UNSURE, and no build passes with it: what ran before does not run any more."""
    TOO_FEW_SAMPLES = "too_few_samples"
    """UNSURE: fewer than `min_launches` launches, and one of them has fewer than `min_samples` samples."""
    TOO_FEW_LAUNCHES = "too_few_launches"
    """UNSURE: a side has fewer than `min_launches` launches; more may settle it."""
    NOT_SIGNIFICANT = "not_significant"
    """UNSURE: large enough if it were true."""
    TOO_NOISY = "too_noisy"
    """UNSURE: small, but the interval is wider than `same_within`."""


@dataclass(frozen=True, slots=True)
class Change:
    """How much slower the candidate is, as a natural logarithm (0.02 is about 2 % slower, below 0 is faster), its
    interval, and the probability of seeing as much where nothing changed."""

    effect: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Row:
    """A row's verdict. `q_value` is the p-value after Benjamini and Hochberg; values are in the metric's unit.

    `noise_seen`: standard deviation of the logarithm from launch to launch, where both sides have enough of them.
    """

    key: Key
    baseline: float | None
    candidate: float | None
    launches: tuple[int, int]
    samples: tuple[int, int]
    change: Change | None = None
    noise_seen: float | None = None
    q_value: float | None = None
    verdict: Verdict = Verdict.UNSURE
    reason: Reason = Reason.TOO_FEW_SAMPLES
    detail: str = ""


@dataclass(frozen=True)
class Judgement:
    """All rows that both sides have, SLOWER first, and the keys that only one of them has."""

    rows: list[Row]
    only_baseline: list[Key]
    only_candidate: list[Key]
    thresholds: Thresholds

    @property
    def counts(self) -> dict[Verdict, int]:
        counted = Counter(row.verdict for row in self.rows)
        return {verdict: counted[verdict] for verdict in Verdict}

    @property
    def too_unsure(self) -> bool:
        """Whether there is too much that nobody knows."""
        share = self.counts[Verdict.UNSURE] / len(self.rows)
        return share > self.thresholds.max_unsure or any(r.reason is Reason.CANDIDATE_FAILED for r in self.rows)


def judge(baseline: Side, candidate: Side, thresholds: Thresholds) -> Judgement:
    """Verdicts on all rows in common, at least one."""
    common = [key for key in baseline.rows if key in candidate.rows]
    tested = [_tested(key, baseline.rows[key], candidate.rows[key], thresholds) for key in common]
    p_values = [row.change.p_value for row in tested if row.change is not None]
    q_values = iter(stats.false_discovery_control(p_values, method="bh") if p_values else ())
    rows = [_decided(row, float(next(q_values)), thresholds) if row.change is not None else row for row in tested]
    order = list(Verdict)
    rows.sort(key=lambda row: order.index(row.verdict))
    only_baseline = [key for key in baseline.rows if key not in candidate.rows]
    only_candidate = [key for key in candidate.rows if key not in baseline.rows]
    return Judgement(rows, only_baseline, only_candidate, thresholds)


def _tested(key: Key, baseline: Cell, candidate: Cell, thresholds: Thresholds) -> Row:
    """The row with its change but without a verdict, or UNSURE with the reason why it has none."""
    cells = (baseline, candidate)
    launches = (len(baseline.launches), len(candidate.launches))
    samples = (sum(map(len, baseline.launches)), sum(map(len, candidate.launches)))
    row = Row(key, baseline.value, candidate.value, launches, samples)
    for cell, reason in zip(cells, (Reason.BASELINE_FAILED, Reason.CANDIDATE_FAILED), strict=True):
        if cell.failures:
            return replace(row, reason=reason, detail=cell.failures[0])
    for cell in cells:
        few = len(cell.launches) < thresholds.min_launches
        if few and min(map(len, cell.launches)) < thresholds.min_samples:
            return row
    found = change(baseline, candidate, thresholds)
    if key.higher_is_better:
        found = Change(-found.effect, -found.high, -found.low, found.p_value)
    return replace(row, change=found, noise_seen=seen_noise(baseline, candidate, thresholds))


def change(baseline: Cell, candidate: Cell, thresholds: Thresholds) -> Change:
    """The change of the logarithm from `baseline` to `candidate`, each with at least one launch."""
    effect = float(candidate.log_medians.mean() - baseline.log_medians.mean())
    (first, first_df), (second, second_df) = (
        _error(baseline, candidate, thresholds), _error(candidate, baseline, thresholds)
    )  # fmt: skip
    error = math.sqrt(first + second)
    # Welch and Satterthwaite; a side that brings no error brings no doubt about it.
    doubt = sum(v**2 / df for v, df in ((first, first_df), (second, second_df)) if v)
    student = stats.t((first + second) ** 2 / doubt if doubt else math.inf)
    noise = assumed_noise(baseline, candidate, thresholds)
    floor = noise * math.sqrt(1 / len(baseline.launches) + 1 / len(candidate.launches))
    tail = (1 + thresholds.confidence) / 2
    half = max(error * student.ppf(tail), floor * stats.norm.ppf(tail))
    p_values = [2 * law.sf(abs(effect) / e) if e else float(effect == 0) for law, e in
                ((student, error), (stats.norm, floor))]  # fmt: skip
    return Change(effect, effect - half, effect + half, float(max(p_values)))


def seen_noise(baseline: Cell, candidate: Cell, thresholds: Thresholds) -> float | None:
    """Standard deviation of `log_medians` about each side's mean; None with too few launches on a side."""
    if min(len(baseline.launches), len(candidate.launches)) < thresholds.min_launches:
        return None
    squares = sum(float(cell.log_medians.var()) * len(cell.launches) for cell in (baseline, candidate))
    return math.sqrt(squares / (len(baseline.launches) + len(candidate.launches) - 2))


def assumed_noise(baseline: Cell, candidate: Cell, thresholds: Thresholds) -> float:
    """`launch_noise`, or less where both sides' launches show less: variances weighted by degrees of freedom."""
    guess, seen = thresholds.launch_noise, seen_noise(baseline, candidate, thresholds)
    if seen is None or seen >= guess:
        return guess
    freedom = len(baseline.launches) + len(candidate.launches) - 2
    weight = thresholds.guess_weight
    return math.sqrt((weight * guess**2 + freedom * seen**2) / (weight + freedom))


def _error(cell: Cell, other: Cell, thresholds: Thresholds) -> tuple[float, float]:
    """Variance of the mean of a side's `log_medians`, and its degrees of freedom (infinite: taken as known)."""
    n = len(cell.launches)
    if n >= thresholds.min_launches:
        return float(cell.log_medians.var(ddof=1)) / n, n - 1
    launch, freedom = thresholds.launch_noise**2, math.inf
    if len(other.launches) >= thresholds.min_launches:
        seen = float(other.log_medians.var(ddof=1))
        if seen > launch:
            launch, freedom = seen, len(other.launches) - 1
    return (launch + float(np.mean([_variance_within(s) for s in cell.launches]))) / n, freedom


def _variance_within(samples: np.ndarray) -> float:
    """Variance of the logarithm of the median of one launch's `samples`, from its 95 % interval."""
    found = median_interval(samples)
    return (math.log(found.high / found.low) / (2 * float(stats.norm.ppf(0.975)))) ** 2


def _decided(row: Row, q_value: float, thresholds: Thresholds) -> Row:
    """The row with its verdict."""
    assert row.change is not None
    found = row.change
    large = abs(found.effect) >= math.log1p(thresholds.min_effect)
    margin = math.log1p(thresholds.same_within)
    verdict, reason = Verdict.UNSURE, Reason.TOO_NOISY
    if large and q_value <= thresholds.false_discovery:
        verdict, reason = (Verdict.SLOWER if found.effect > 0 else Verdict.FASTER), Reason.SIGNIFICANT
    elif not large and -margin <= found.low and found.high <= margin:
        verdict = Verdict.SAME
        reason = Reason.NO_CHANGE if found.low <= 0 <= found.high else Reason.SMALL_CHANGE
    elif min(row.launches) < thresholds.min_launches:
        reason = Reason.TOO_FEW_LAUNCHES
    elif large:
        reason = Reason.NOT_SIGNIFICANT
    return replace(row, q_value=q_value, verdict=verdict, reason=reason)
