"""harness.regress as a command: exit codes and reports, what it refuses, and hostile folders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.base import InputError
from harness.regress.__main__ import main
from harness.results import RunWriter
from harness.schema import STEPS
from tests.harness.regress_runs import DECODE, record, round_row, two_sides, write

# --- the command line ---


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1.0, 0, "SAME"), (1.1, 1, "SLOWER"), (0.9, 0, "FASTER")])
def test_exit_codes_and_reports(tmp_path, capsys, factor, code, verdict) -> None:
    files = ["--json", str(tmp_path / "new" / "r.json"), "--markdown", str(tmp_path / "r.md")]
    assert main([*two_sides(tmp_path, factor), *files]) == code
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
    sides = two_sides(tmp_path, 1.01, launches=1)
    assert main([*sides]) == 3
    assert main([*sides, "--max-unsure", "1"]) == 0
    assert main([*sides, "--launch-noise", "0.002"]) == 0


def test_what_fails_only_now_lets_no_build_pass(tmp_path) -> None:
    base, cand = two_sides(tmp_path)
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


def test_the_module_runs_as_a_command(tmp_path) -> None:
    base, cand = two_sides(tmp_path, 1.1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "harness.regress", base, cand], capture_output=True, text=True, timeout=120,
        env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, "1 rows: 1 SLOWER" in done.stdout) == (1, True), done.stderr


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
    base, _ = two_sides(tmp_path)
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
    base, cand = two_sides(tmp_path)
    write(tmp_path / "cand" / "empty")
    assert main([base, cand]) == 0


def test_two_writers_to_one_folder_lose_nothing(tmp_path) -> None:
    base, cand = two_sides(tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        RunWriter(tmp_path / "cand" / "0", "second").write_run(record())
    assert main([base, cand]) == 0
