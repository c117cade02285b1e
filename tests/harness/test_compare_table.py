"""Tables of comparisons: paired ratios against closed forms, which rounds are paired, and reasons as they are shown."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from harness.compare.contestants import folder_name
from harness.compare.ratios import paired_ratio
from harness.compare.table import Spread, print_table, rows
from harness.results import RunWriter, load

# --- paired ratios ---


def test_an_exact_ratio_has_a_point_for_an_interval() -> None:
    found = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.verdict(higher_is_better=False) == "slower"
    assert found.verdict(higher_is_better=True) == "faster"


def test_the_interval_is_that_of_the_paired_t_test_on_logarithms() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = np.exp(rng.normal(0.1, 0.05, 9)), np.exp(rng.normal(0, 0.05, 9))
    expected = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    found = paired_ratio(list(ours), list(theirs))
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((expected.low, expected.high))


def test_the_interval_covers_the_truth_as_often_as_it_says_although_both_engines_drift() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(2000):
        drift = np.linspace(1, 1.05, 8)
        ours, theirs = 1.02 * drift * np.exp(rng.normal(0, 0.01, 8)), drift * np.exp(rng.normal(0, 0.01, 8))
        found = paired_ratio(list(ours), list(theirs))
        covered += found.low <= 1.02 <= found.high
    # Binomial(2000, 0.95) leaves 0.935 to 0.965 in one of 500 tries.
    assert 0.935 <= covered / 2000 <= 0.965


@pytest.mark.parametrize(("launches", "covers"), [(1, False), (4, True)])
def test_what_differs_between_starts_is_seen_from_three_launches_on(launches: int, covers: bool) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        number = np.repeat(np.arange(launches), 8)
        of_start = rng.normal(0, 0.01, launches)[number]
        ratio = 1.02 * np.exp(of_start + rng.normal(0, 0.005, len(number)))
        found = paired_ratio(list(ratio), [1.0] * len(ratio), number.tolist())
        assert found.over_launches == covers
        covered += found.low <= 1.02 <= found.high
    # Binomial(1000, 0.95) leaves 0.93 to 0.97 in one of 300 tries.
    assert (0.93 <= covered / 1000 <= 0.97) == covers


def test_one_pair_proves_nothing() -> None:
    assert paired_ratio([2.0], [1.0]).verdict(higher_is_better=False) == "even"


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0])])
def test_what_is_no_pairs_is_refused(pair) -> None:
    with pytest.raises(ValueError, match="pair"):
        paired_ratio(*pair)


# --- rows ---


def _round(label: str, number: int, value: float | None, status: str = "ok") -> dict:
    return {
        "engine": label, "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 8, "tokens": 128,
        "output_len": 129, "launch": 0, "round": number, "started_s": float(number), "samples": 1, "value": value,
        "status": status,
    }  # fmt: skip


def test_a_label_with_brackets_is_shown_as_it_is(tmp_path) -> None:
    labels = ["fused:features=[head]", "fused:features=[-head]"]
    for label in labels:
        writer = RunWriter(tmp_path / folder_name(label), label)
        writer.add_rounds([_round(label, 0, 1.0)])
        writer.flush()
        writer.write_run({"engine": label})
    console = Console(width=200, record=True, file=io.StringIO())
    print_table(rows(load(tmp_path), labels, labels[1]), labels, labels[1], console)
    shown = console.export_text()
    assert all(shown.count(label) == 1 + (label == labels[1]) for label in labels)


def test_ratios_pair_rounds_of_the_same_number(tmp_path) -> None:
    for label, values in (("A", {0: 1.0, 1: 10.0, 2: 100.0}), ("B", {1: 20.0, 2: 200.0, 3: 7.0})):
        writer = RunWriter(tmp_path / label, label)
        writer.add_rounds(_round(label, number, value) for number, value in values.items())
        writer.flush()
        writer.write_run({"engine": label})
    (row,) = rows(load(tmp_path), ["A", "B"], "A")
    assert row.cells["A"].ratio is None
    assert row.cells["B"].ratio is not None
    assert (row.cells["B"].ratio.value, row.cells["B"].ratio.pairs) == (pytest.approx(2.0), 2)
    assert row.cells["B"].spread is not None
    assert row.cells["B"].spread.median == 20.0


def test_a_failed_block_leaves_its_reason(tmp_path) -> None:
    writer = RunWriter(tmp_path / "A", "A")
    writer.add_rounds([_round("A", 0, 1.0), {**_round("B", 0, None, "out of memory: 2 GiB"), "samples": 0}])
    writer.flush()
    writer.write_run({"engine": "A"})
    (row,) = rows(load(tmp_path), ["A", "B"], "A", {"B": "its process ended"})
    assert row.cells["B"].reason == "its process ended"  # the failed row is A's run
    writer = RunWriter(tmp_path / "B", "B")
    writer.add_rounds([{**_round("B", 0, None, "out of memory: 2 GiB"), "samples": 0}])
    writer.flush()
    writer.write_run({"engine": "B"})
    (row,) = rows(load(tmp_path), ["A", "B"], "A", {})
    assert row.cells["B"].reason == "out of memory: 2 GiB"


def test_a_block_that_failed_among_others_is_told(tmp_path) -> None:
    for label, failed in (("A", {}), ("B", {1: "129 tokens took no longer than one: ask for more output_tokens."})):
        writer = RunWriter(tmp_path / label, label)
        writer.add_rounds(_round(label, i, None if i in failed else 2.0, failed.get(i, "ok")) for i in range(3))
        writer.flush()
        writer.write_run({"engine": label})
    found = rows(load(tmp_path), ["A", "B"], "A")
    assert found[0].cells["A"].reason == ""
    assert found[0].cells["B"].spread == Spread(2.0, 2.0, 2.0, 2)
    out = io.StringIO()
    print_table(found, ["A", "B"], "A", Console(file=out, width=200))
    assert "2 rounds; of others: 129 tokens took no longer than one" in out.getvalue()


@pytest.mark.parametrize("rounds", [1, 2], ids=["all failed", "one of two"])
def test_reasons_are_shown_as_they_are_in_one_line(rounds, tmp_path) -> None:
    """Errors have brackets, which are no markup, and lines of which the first says most."""
    writer = RunWriter(tmp_path / "A", "A")
    failed = {**_round("A", 0, None, "RuntimeError: [/tmp/x] is gone\nat line 3"), "samples": 0}
    writer.add_rounds([failed, _round("A", 1, 2.0)][:rounds])
    writer.flush()
    writer.write_run({"engine": "A"})
    out = io.StringIO()
    print_table(rows(load(tmp_path), ["A"], "A"), ["A"], "A", Console(file=out, width=200))
    assert "RuntimeError: [/tmp/x] is gone" in out.getvalue() and "line 3" not in out.getvalue()
