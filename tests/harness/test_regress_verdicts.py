"""Verdicts of harness.regress against scipy and closed forms, and the thresholds that they follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from engines.base import InputError
from harness.regress.__main__ import parser, thresholds
from harness.regress.sides import Cell, Key, Side
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Reason, Verdict, assumed_noise, change, judge, seen_noise
from harness.statistics import median_interval

DEFAULT = PRESETS["default"]
NO_FLOOR = Thresholds(launch_noise=0)


def _key(number: int = 0, metric: str = "step_ms") -> Key:
    return Key("GPU", "model", "bfloat16", "latency", "nano", "default", "steps", metric, "decode", number, 128, 0)


def _launches(*medians: float) -> Cell:
    """Launches of one sample each."""
    return Cell([np.array([median]) for median in medians])


def _judged(baseline: Cell, candidate: Cell, limits: Thresholds = DEFAULT, metric: str = "step_ms"):
    (row,) = judge(Side({_key(0, metric): baseline}, []), Side({_key(0, metric): candidate}, []), limits).rows
    return row


# --- statistics ---


def test_three_launches_are_judged_by_welchs_t_test() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = np.exp(rng.normal(0.05, 0.02, 5)), np.exp(rng.normal(0, 0.03, 4))
    expected = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False)
    interval = expected.confidence_interval(0.95)
    found = change(_launches(*theirs), _launches(*ours), NO_FLOOR)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_no_run_is_believed_more_than_launches_can_differ() -> None:
    steady = Cell([np.full(100, 2.0)] * 4), Cell([np.full(100, 2.06)] * 4)
    found = change(*steady, DEFAULT)
    # 3 + 3 degrees of freedom showed no noise at all; the guess counts for 4 of 10
    error = 0.01 * math.sqrt(4 / 10) * math.sqrt(1 / 4 + 1 / 4)
    assert found.effect == pytest.approx(math.log(1.03))
    assert found.high - found.effect == pytest.approx(1.959964 * error)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(math.log(1.03) / error))


def test_the_guess_at_launch_noise_gives_way_to_what_enough_launches_show() -> None:
    quiet = _launches(*np.exp([-0.004, 0.0, 0.004])), _launches(*np.exp([0.998, 1.0, 1.002]))
    seen = math.sqrt((2 * 0.004**2 + 2 * 0.002**2) / 4)  # squares about each side's mean, 2 + 2 degrees of freedom
    assert seen_noise(*quiet, DEFAULT) == pytest.approx(seen)
    assert assumed_noise(*quiet, DEFAULT) == pytest.approx(math.sqrt((4 * 0.01**2 + 4 * seen**2) / 8))
    assert assumed_noise(*quiet, Thresholds(guess_weight=0)) == pytest.approx(seen)
    assert assumed_noise(*quiet, Thresholds(launch_noise=0.001)) == 0.001  # never more: Welch's test sees to that
    few = _launches(1.0, 1.0)
    assert (seen_noise(few, quiet[0], DEFAULT), assumed_noise(few, quiet[0], DEFAULT)) == (None, 0.01)


def test_one_launch_has_the_error_of_its_steps_and_of_a_launch() -> None:
    rng = np.random.default_rng(2)
    a, b = (np.exp(rng.normal(0, 0.1, 50)) for _ in range(2))
    within = [(math.log(i.high / i.low) / (2 * 1.959964)) ** 2 for i in map(median_interval, (a, b))]
    found = change(Cell([a]), Cell([b]), DEFAULT)
    assert found.high - found.effect == pytest.approx(1.959964 * math.sqrt(2 * 0.01**2 + sum(within)), rel=1e-4)


def test_one_launch_is_taken_for_as_noisy_as_the_other_sides_launches() -> None:
    noisy = Cell([np.full(9, value) for value in (0.9, 1.0, 1.1, 1.0)])
    variance = np.log([0.9, 1.0, 1.1, 1.0]).var(ddof=1)
    found = change(Cell([np.full(9, 1.0)]), noisy, DEFAULT)
    # Both terms hang on the same three degrees of freedom; Welch's formula is a little kinder.
    error = math.sqrt(variance + variance / 4)
    df = (variance + variance / 4) ** 2 / (variance**2 / 3 + (variance / 4) ** 2 / 3)
    assert found.high - found.effect == pytest.approx(stats.t.ppf(0.975, df) * error)


def test_false_discoveries_are_controlled_as_by_benjamini_and_hochberg() -> None:
    """The step-up rule, written out: the k smallest p-values are rejected for the largest k with p(k) <= k q / m."""
    rng = np.random.default_rng(3)
    shifts = np.concatenate([rng.uniform(0.03, 0.06, 12), np.zeros(18)])
    base = {_key(i): _launches(*np.exp(rng.normal(0, 0.01, 4))) for i in range(30)}
    cand = {_key(i): _launches(*np.exp(rng.normal(shift, 0.01, 4))) for i, shift in enumerate(shifts)}
    limits = Thresholds(min_effect=1e-9, launch_noise=0, false_discovery=0.05)
    found = judge(Side(base, []), Side(cand, []), limits)
    p = {key: stats.ttest_ind(cand[key].log_medians, base[key].log_medians, equal_var=False).pvalue for key in base}
    ordered = sorted(p, key=p.__getitem__)
    count = max(k for k in range(31) if k == 0 or p[ordered[k - 1]] <= k * 0.05 / 30)
    rejected = {row.key for row in found.rows if row.verdict in (Verdict.SLOWER, Verdict.FASTER)}
    assert rejected == set(ordered[:count])
    assert 0 < count < sum(value <= 0.05 for value in p.values())  # without control there would be more
    expected = stats.false_discovery_control([p[row.key] for row in found.rows])
    assert [row.q_value for row in found.rows] == pytest.approx(list(expected))


# --- verdicts ---


def test_verdicts_and_reasons() -> None:
    base = _launches(1.0, 1.001, 0.999, 1.0, 1.0005)

    def said(*values: float, limits: Thresholds = DEFAULT, against: Cell = base) -> tuple[Verdict, Reason]:
        row = _judged(against, _launches(*values), limits)
        return row.verdict, row.reason

    assert said(1.05, 1.051, 1.049, 1.05, 1.05) == (Verdict.SLOWER, Reason.SIGNIFICANT)
    assert said(0.95, 0.951, 0.949, 0.95, 0.95) == (Verdict.FASTER, Reason.SIGNIFICANT)
    assert said(1.0, 1.001, 0.999, 1.0, 1.0) == (Verdict.SAME, Reason.NO_CHANGE)
    quiet = Thresholds(launch_noise=0.001)
    assert said(1.01, 1.011, 1.009, 1.01, 1.01, limits=quiet) == (Verdict.SAME, Reason.SMALL_CHANGE)
    assert said(0.9, 1.2, 1.0, 1.3, 0.95) == (Verdict.UNSURE, Reason.NOT_SIGNIFICANT)
    assert said(0.9, 1.1, 1.0, 1.05, 0.95) == (Verdict.UNSURE, Reason.TOO_NOISY)
    assert said(1.0, 1.0) == (Verdict.UNSURE, Reason.TOO_FEW_SAMPLES)
    one = Cell([np.linspace(0.9, 1.1, 20)])
    row = _judged(one, one)
    assert (row.verdict, row.reason) == (Verdict.UNSURE, Reason.TOO_FEW_LAUNCHES)


def test_same_is_said_only_of_a_small_change_that_is_known_well() -> None:
    def said(percent: float, **limits: float) -> tuple[Verdict, Reason]:
        base, cand = ([scale * (1 + off) for off in (-1e-4, 0, 1e-4)] for scale in (1.0, 1 + percent / 100))
        row = _judged(_launches(*base), _launches(*cand), Thresholds(guess_weight=1e9, **limits))
        return row.verdict, row.reason

    # 2.5 % lies within 3 % with its whole interval, and is too large to be called none, whatever is controlled
    known = {"launch_noise": 0.001, "false_discovery": 1e-300}
    assert said(2.5, **known) == (Verdict.UNSURE, Reason.NOT_SIGNIFICANT)
    assert said(-2.5, **known) == (Verdict.UNSURE, Reason.NOT_SIGNIFICANT)
    assert said(1.9, **known) == (Verdict.SAME, Reason.SMALL_CHANGE)
    # 1.9 % with an interval of 1.6 % (1.96 × 0.01 × √(2 / 3)) to either side reaches 3.5 %, on one side only
    assert said(1.9, launch_noise=0.01) == (Verdict.UNSURE, Reason.TOO_NOISY)
    assert said(-1.9, launch_noise=0.01) == (Verdict.UNSURE, Reason.TOO_NOISY)
    assert said(1.0, launch_noise=0.01) == (Verdict.SAME, Reason.NO_CHANGE)


def test_less_throughput_is_slower() -> None:
    base, less = _launches(100.0, 100.1, 99.9, 100.0), _launches(90.0, 90.1, 89.9, 90.0)
    row = _judged(base, less, metric="output_tok_s")
    assert row.verdict is Verdict.SLOWER
    assert row.change is not None
    assert row.change.effect == pytest.approx(math.log(100 / 90), abs=1e-4)
    assert row.change.low < row.change.effect < row.change.high
    assert _judged(less, base, metric="output_tok_s").verdict is Verdict.FASTER


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_what_they_say(preset) -> None:
    found = thresholds(parser().parse_args(["a", "b", "--preset", preset]))
    assert found == PRESETS[preset]
    changed = thresholds(
        parser().parse_args(["a", "b", "--preset", preset, "--min-effect", "0.07", "--min-launches", "4"])
    )
    assert (changed.min_effect, changed.min_launches, changed.launch_noise) == (0.07, 4, found.launch_noise)


@pytest.mark.parametrize(
    "wrong", [{"min_effect": 0}, {"min_effect": math.nan}, {"confidence": 1}, {"false_discovery": 0},
              {"launch_noise": -1}, {"max_unsure": 1.5}, {"min_launches": 1}, {"same_within": math.inf}],
)  # fmt: skip
def test_thresholds_that_cannot_be_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Thresholds(**wrong)
