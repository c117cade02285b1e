"""What harness.regress reads of two folders of runs: which rows they have, which failed, and which are told apart."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.base import InputError
from harness.regress.__main__ import main
from harness.regress.report import notes
from harness.regress.sides import read
from harness.regress.thresholds import PRESETS
from harness.regress.verdicts import Reason, Verdict, judge
from harness.schema import STEPS
from tests.harness.regress_runs import DECODE, round_row, two_sides, write

DEFAULT = PRESETS["default"]


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
    base, cand = two_sides(tmp_path)
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
