"""harness.regress: verdicts against scipy and closed forms, what it refuses, exit codes, and hostile folders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from engines.base import InputError
from harness.regress.__main__ import main, parser, thresholds
from harness.regress.report import notes
from harness.regress.sides import Cell, Key, Side, read
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Reason, Verdict, assumed_noise, change, judge, seen_noise
from harness.results import RunWriter
from harness.schema import STEPS
from harness.statistics import median_interval
from tests.harness.regress_runs import DECODE, record, round_row, write

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


def _sides(tmp_path: Path, factor: float = 1.0, launches: int = 3) -> tuple[str, str]:
    """Folders of launches that hardly differ, the candidate's slower by `factor`."""
    for side, times in (("base", 1.0), ("cand", factor)):
        for launch in range(launches):
            steps = 1000 * times * (1 + 0.0005 * launch + 0.001 * np.sin(np.arange(30)))
            write(tmp_path / side / str(launch), {DECODE: steps})
    return str(tmp_path / "base"), str(tmp_path / "cand")


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


# --- the command line ---


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1.0, 0, "SAME"), (1.1, 1, "SLOWER"), (0.9, 0, "FASTER")])
def test_exit_codes_and_reports(tmp_path, capsys, factor, code, verdict) -> None:
    files = ["--json", str(tmp_path / "new" / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert main([*_sides(tmp_path, factor), *files]) == code
    said = json.loads((tmp_path / "new" / "r.json").read_text())
    (row,) = said["rows"]
    assert (said["exit_code"], said["counts"][verdict], row["verdict"]) == (code, 1, verdict)
    assert row["slower_by"] == pytest.approx(factor - 1, abs=1e-9)
    assert (row["baseline_launches"], row["candidate_samples"]) == (3, 90)
    assert row["candidate"] / row["baseline"] == pytest.approx(factor)
    text = (tmp_path / "r.md").read_text()
    assert f"| {verdict} |" in text
    assert text.startswith("### Something is slower" if code else "### Nothing is slower")
    assert verdict in capsys.readouterr().out


def test_too_much_unsure_is_an_outcome_of_its_own(tmp_path) -> None:
    sides = _sides(tmp_path, 1.01, launches=1)
    assert main([*sides]) == 3
    assert main([*sides, "--max-unsure", "1"]) == 0
    assert main([*sides, "--launch-noise", "0.002"]) == 0


def test_what_fails_only_now_lets_no_build_pass(tmp_path) -> None:
    base, cand = _sides(tmp_path)
    rounds = [round_row(0, 2.0), round_row(1, 2.0)]
    for launch in range(3):
        write(tmp_path / "base" / f"r{launch}", rounds=rounds)
        failed = [round_row(0, None, status="out of memory: 2 | [red]GiB", samples=0)]
        write(tmp_path / "cand" / f"r{launch}", rounds=failed)
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert main([base, cand, "--max-unsure", "1", *files]) == 3
    (row,) = [r for r in json.loads((tmp_path / "r.json").read_text())["rows"] if r["verdict"] == "UNSURE"]
    assert (row["reason"], row["detail"]) == ("candidate_failed", "out of memory: 2 | [red]GiB")
    assert "2 \\| [red]GiB" in (tmp_path / "r.md").read_text()


def test_rounds_and_served_runs_make_rows(tmp_path) -> None:
    for side, slower in (("base", 1.0), ("cand", 1.1)):
        for launch in range(4):
            values = [round_row(i, 2.0 * slower + 0.001 * i, launch=launch) for i in range(4)]
            rates = [round_row(i, 1000 / slower + i, "output_tok_s", phase="serve", launch=launch) for i in range(4)]
            served = {"arm": "default", "requests": 256, "output_tok_s": 900 / slower + launch}
            write(tmp_path / side / str(launch), rounds=values + rates, throughput=served)
    judgement = judge(*read(tmp_path / "base", tmp_path / "cand"), DEFAULT)
    found = {(row.key.table, row.key.metric): row for row in judgement.rows}
    assert set(found) == {("rounds", "tpot_ms"), ("rounds", "output_tok_s"), ("run.json", "output_tok_s")}
    for row in found.values():
        assert row.verdict is Verdict.SLOWER
        assert row.change is not None
        assert row.change.effect == pytest.approx(math.log(1.1), abs=0.002)


def _rate(rate: float | None, slower: float = 1.0, good: float = 3.0, **changed) -> dict:
    """A record of one rate, as `harness.serving.load_record` makes it."""
    latencies = {f"{name}_p{p}": 10.0 * p * slower for name in ("ttft_ms", "tpot_ms", "e2el_ms") for p in (50, 90, 99)}
    return {
        "arm": "default", "rate": rate, "requests": 256, "output_tok_s": 900 / slower, "goodput_rate": good / slower,
        "still_growing": False, **latencies, **changed,
    }  # fmt: skip


def _serve(folder: Path, launches: int, *rates: dict, **workload) -> Path:
    config = {"seed": 0, "engine": {"options": {}}, "workload": {"arrivals": "poisson", **workload}}
    for launch in range(launches):
        write(folder / str(launch), serving=list(rates), workload="serving", config=config)
    return folder


def test_served_rates_make_rows(tmp_path) -> None:
    base = _serve(tmp_path / "base", 4, _rate(4), _rate(8))
    cand = _serve(tmp_path / "cand", 4, _rate(4), _rate(8, slower=1.1, still_growing=True))
    sides = read(base, cand)
    judgement = judge(*sides, DEFAULT)
    found = {(row.key.rate, row.key.metric): row for row in judgement.rows}
    latencies = {f"{name}_p{p}" for name in ("ttft_ms", "tpot_ms", "e2el_ms") for p in (50, 99)}
    assert set(found) == {(r, m) for r in (4, 8) for m in (*latencies, "goodput_rate", "output_tok_s")}
    for (rate, _), row in found.items():
        assert row.verdict is (Verdict.SLOWER if rate == 8 else Verdict.SAME)
        assert row.change is not None
        assert row.change.effect == pytest.approx(math.log(1.1) if rate == 8 else 0)
    assert found[8, "ttft_ms_p99"].baseline == pytest.approx(990)
    assert found[8, "ttft_ms_p99"].key.name == "256 requests at 8/s, ttft ms p99"
    assert any("At 8 requests/s the queue of the candidate" in note for note in notes(judgement, *sides))


def test_served_rates_without_goodput_or_with_other_arrivals(tmp_path) -> None:
    base = _serve(tmp_path / "base", 3, _rate(4), _rate(None))
    none_good = _serve(tmp_path / "cand", 3, _rate(4, good=0.0), _rate(None))
    judgement = judge(*read(base, none_good), DEFAULT)
    assert judgement.too_unsure
    (failed,) = [row for row in judgement.rows if row.verdict is Verdict.UNSURE]
    assert (failed.key.metric, failed.key.rate, failed.reason) == ("goodput_rate", 4, Reason.CANDIDATE_FAILED)
    assert {row.key.name for row in judgement.rows if row.key.rate == 0} >= {"256 requests, goodput requests/s"}
    with pytest.raises(InputError, match="work is"):
        read(base, _serve(tmp_path / "burst", 3, _rate(4), arrivals="burst"))
    with pytest.raises(InputError, match="no number output_tok_s"):
        read(base, _serve(tmp_path / "odd", 1, _rate(4, output_tok_s=None)))


def _comparison(folder: Path, engines: dict[str, float], launches: int = 3, reasons: dict[str, str] | None = None):
    """A comparison whose `engines` have TPOTs; one of 0 died and left a run that did not finish."""
    for launch in range(launches):
        for label, tpot_ms in engines.items():
            rounds = [round_row(i, tpot_ms or 1.0, launch=launch, engine=label) for i in range(4)]
            died = {} if tpot_ms else {"status": "failed", "error": "RuntimeError: it fell\nover"}
            where = folder / f"launch-{folder.name}-{launch}" / label  # of which the run's id is made
            write(where, rounds=rounds, engine=label, **died)
    (folder / "comparison.json").write_text(json.dumps({"settings": {}, "reasons": reasons or {}}))
    return folder


@pytest.mark.parametrize("told", [True, False])
def test_a_dead_contestant_fails_its_rows_and_no_others(tmp_path, told) -> None:
    base = _comparison(tmp_path / "base", {"nano": 2.0, "fused": 1.0})
    cand = _comparison(
        tmp_path / "cand", {"nano": 2.0, "fused": 0.0}, reasons={"fused": "RuntimeError: it fell"} if told else {}
    )
    sides = read(base, cand)
    judgement = judge(*sides, DEFAULT)
    assert [(row.key.engine, row.verdict, row.reason) for row in judgement.rows] == [
        ("fused", Verdict.UNSURE, Reason.CANDIDATE_FAILED), ("nano", Verdict.SAME, Reason.NO_CHANGE)
    ]  # fmt: skip
    assert judgement.rows[0].detail == "fused died: RuntimeError: it fell"
    assert main([str(base), str(cand), "--max-unsure", "1"]) == 3
    assert any("fused took no part in the candidate" in note for note in notes(judgement, *sides))
    # the other way round there is nothing to lose
    back = judge(*read(cand, base), DEFAULT)
    assert [row.key.engine for row in back.rows] == ["nano"]
    assert {key.engine for key in back.only_candidate} == {"fused"}


def test_a_contestant_that_never_got_a_run_is_missed(tmp_path) -> None:
    base = _comparison(tmp_path / "base", {"nano": 2.0, "fused": 1.0})
    cand = _comparison(tmp_path / "cand", {"nano": 2.0}, reasons={"fused": "ModuleNotFoundError: no fuse"})
    judgement = judge(*read(base, cand), DEFAULT)
    assert {row.key.engine: row.reason for row in judgement.rows} == {
        "fused": Reason.CANDIDATE_FAILED, "nano": Reason.NO_CHANGE
    }  # fmt: skip


def test_outside_of_comparisons_a_run_that_failed_is_refused(tmp_path) -> None:
    base = write(tmp_path / "base" / "0", {DECODE: np.full(9, 1000.0)})
    write(tmp_path / "cand" / "0", {DECODE: np.full(9, 1000.0)})
    write(tmp_path / "cand" / "1", {DECODE: np.full(9, 1000.0)}, status="failed")
    with pytest.raises(InputError, match="did not finish"):
        read(base, tmp_path / "cand")


def test_instrumented_steps_are_no_times(tmp_path) -> None:
    base, cand = _sides(tmp_path)
    path = tmp_path / "cand" / "0" / "steps.parquet"
    table = pq.read_table(path)
    frame = table.to_pandas().assign(instrumented=True, wall_us=9e9)
    more = pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False)
    pq.write_table(pa.concat_tables([table, more]), path)
    assert main([base, cand]) == 0


def test_engines_with_other_options_are_told_apart_only_where_a_side_has_both(tmp_path) -> None:
    def options(**given):
        return {"config": {"engine": {"options": given}, "workload": {}}}

    steps = {DECODE: np.full(9, 1000.0)}
    write(tmp_path / "a" / "0", steps, **options())
    write(tmp_path / "b" / "0", steps, **options(new=True))
    assert {key.engine for side in read(tmp_path / "a", tmp_path / "b") for key in side.rows} == {"nano"}
    write(tmp_path / "b" / "1", steps, **options())
    base, cand = read(tmp_path / "a", tmp_path / "b")
    assert {key.engine for key in cand.rows} == {"nano", "nano:new=true"}
    assert {key.engine for key in base.rows} == {"nano"}


# --- what cannot be compared ---

OTHER = {
    "device": {"provenance": {"gpu": {"name": "NVIDIA H100"}}},
    "model": {"model": "qwen3-8b"},
    "dtype": {"dtype": "float16"},
    "workload": {"workload": "decode"},
    "engine": {"engine": "fused"},
    "was not verified": {"verification": {"status": "skipped"}},
    "did not finish": {"status": "interrupted"},
    "on which device": {"provenance": {}},
    "not say its model": {"model": None},
    "no number output_tok_s": {"throughput": {"requests": 3}},
}


@pytest.mark.parametrize("said", OTHER)
def test_what_cannot_be_compared_is_a_sentence(tmp_path, capsys, said) -> None:
    base = write(tmp_path / "base" / "0", {DECODE: np.full(9, 1000.0)})
    cand = write(tmp_path / "cand" / "0", {DECODE: np.full(9, 1000.0)}, **OTHER[said])
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert main([str(base), str(cand), *files]) == 2
    sentence = capsys.readouterr().err
    assert said in sentence
    assert json.loads((tmp_path / "r.json").read_text()) == {"exit_code": 2, "error": sentence.strip()}
    assert sentence.strip() in (tmp_path / "r.md").read_text()


def test_rows_of_other_shapes_are_none_in_common(tmp_path, capsys) -> None:
    base = write(tmp_path / "base" / "0", {("decode", 1, 128): np.full(9, 1000.0)})
    cand = write(tmp_path / "cand" / "0", {("decode", 2, 128): np.full(9, 1000.0)})
    assert main([str(base), str(cand)]) == 2
    assert "batch size is 1 in the baseline, 2 in the candidate" in capsys.readouterr().err


def test_a_run_against_itself_is_refused(tmp_path, capsys) -> None:
    base, _ = _sides(tmp_path)
    assert main([base, base]) == 2
    assert "against itself" in capsys.readouterr().err


# --- hostile folders ---


def _truncate(run: Path) -> None:
    path = run / "steps.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _other_version(run: Path) -> None:
    table = pq.read_table(run / "steps.parquet")
    pq.write_table(table.replace_schema_metadata({b"schema_version": b"99"}), run / "steps.parquet")


def _other_record_version(run: Path) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))


def _values(run: Path, **changed) -> None:
    table = pq.read_table(run / "steps.parquet")
    columns = table.to_pydict()
    for name, value in changed.items():
        columns[name][0] = value
    pq.write_table(pa.table(columns, schema=STEPS), run / "steps.parquet")


def _empty(run: Path) -> None:
    for path in run.glob("*.parquet"):
        path.unlink()


def _twice(run: Path) -> None:
    table = pq.read_table(run / "steps.parquet")
    pq.write_table(pa.concat_tables([table, table]), run / "steps.parquet")


HOSTILE = {
    "damaged": _truncate,
    "schema version 99": _other_version,
    "takes 1": _other_record_version,
    "NaN": lambda run: _values(run, wall_us=math.nan),
    "without a time above 0": lambda run: _values(run, wall_us=-1.0),
    "a time above 0": lambda run: _values(run, wall_us=None),
    "nothing timed": _empty,
    "two runs had written": _twice,
    "no run.json of it": lambda run: _values(run, run_id="another"),
    "cannot be read": lambda run: (run / "run.json").write_text("{"),
    "no run_id": lambda run: (run / "run.json").write_text("[]"),
    "no run.json": lambda run: (run / "run.json").unlink(),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_a_hostile_run_is_a_sentence(tmp_path, capsys, said) -> None:
    base = write(tmp_path / "base" / "0", {DECODE: np.full(9, 1000.0)})
    cand = write(tmp_path / "cand" / "0", {DECODE: np.full(9, 1000.0)})
    HOSTILE[said](cand)
    assert main([str(base), str(cand)]) == 2
    assert said in capsys.readouterr().err


def test_an_empty_run_beside_others_loses_nothing(tmp_path) -> None:
    base, cand = _sides(tmp_path)
    write(tmp_path / "cand" / "empty")
    assert main([base, cand]) == 0


def test_two_writers_to_one_folder_lose_nothing(tmp_path) -> None:
    base, cand = _sides(tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        RunWriter(tmp_path / "cand" / "0", "second").write_run(record())
    assert main([base, cand]) == 0


def test_a_thousand_runs_take_seconds(tmp_path) -> None:
    rng = np.random.default_rng(7)
    one = write(tmp_path / "one", {("decode", batch, 128): rng.normal(1000, 10, 10) for batch in range(1, 14)})
    text, table = (one / "run.json").read_text(), pq.read_table(one / "steps.parquet")
    run_id, place = json.loads(text)["run_id"], table.schema.get_field_index("run_id")
    for number in range(1000):
        folder = tmp_path / ("base" if number % 2 else "cand") / str(number)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(text.replace(run_id, str(number)))
        ids = pa.array([str(number)] * len(table))
        pq.write_table(table.set_column(place, STEPS.field(place), ids), folder / "steps.parquet")
    began = time.process_time()
    judgement = judge(*read(tmp_path / "base", tmp_path / "cand"), DEFAULT)
    assert time.process_time() - began < 60  # a few on a free core
    assert {row.launches for row in judgement.rows} == {(500, 500)}
    assert {row.verdict for row in judgement.rows} == {Verdict.SAME}


def test_the_module_runs_as_a_command(tmp_path) -> None:
    base, cand = _sides(tmp_path, 1.1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.regress", base, cand], capture_output=True, text=True, timeout=120,
        env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, "1 rows: 1 SLOWER" in done.stdout) == (1, True), done.stderr
