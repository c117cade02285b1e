"""What must be true of every committed run, whatever was measured: the documents' tables are made from them."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from harness.compare.comparison import read
from harness.compare.contestants import folder_name
from harness.results import COMPARISON_FILE, Runs, load
from scripts.tables.sources import rows_of
from scripts.tables.traces import keys_of

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [path for path in sorted((ROOT / "results" / "reference").iterdir()) if path.is_dir()]
COMPARISONS = sorted(path.parent for folder in FOLDERS for path in folder.glob(f"*/{COMPARISON_FILE}"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|mnt|usr|opt|data)/")
SHAPE = ["phase", "batch_size", "new_tokens", "context_len"]


@cache
def loaded(folder: Path) -> Runs:
    return load(folder)


def dead(run: dict[str, Any]) -> bool:
    """Whether it is that of a contestant which its comparison says is gone."""
    record = Path(run["run_dir"]).parents[1] / COMPARISON_FILE
    reasons = json.loads(record.read_text())["reasons"] if record.is_file() else {}
    return Path(run["run_dir"]).name in map(folder_name, reasons)


def finished(folder: Path) -> list[dict[str, Any]]:
    return [run for run in loaded(folder).runs if not dead(run)]


def num_layers(run: dict[str, Any]) -> int:
    return yaml.safe_load((ROOT / "conf" / "model" / f"{run['model']}.yaml").read_text())["num_layers"]


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request) -> Path:
    return request.param


def test_every_run_finished_was_verified_and_says_where_it_ran(folder) -> None:
    runs = finished(folder)
    assert runs
    for run in runs:
        assert (run["status"], run["verification"]["status"]) == ("ok", "passed"), run["run_id"]
        assert run["slimmed"] and run["provenance"]["versions"]["torch"], run["run_id"]
        gpu = run["provenance"]["gpu"]["name"].lower().removeprefix("nvidia ").replace(" ", "-")
        assert folder.name == gpu or folder.name.startswith(f"{gpu}-"), run["run_id"]  # what follows names a change


def test_no_committed_file_tells_of_a_machines_folders(folder) -> None:
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".yaml")]
    assert texts
    assert [str(path) for path in texts if ABSOLUTE_PATH.search(path.read_text())] == []


def test_what_failed_says_why_and_run_json_says_it_too(folder) -> None:
    runs = loaded(folder)
    for run in finished(folder):
        for frame in (rows_of(runs.steps, run), rows_of(runs.rounds, run)):
            reasons = set(frame.loc[frame["status"] != "ok", "status"])
            told = " ".join([*run["failures"], *(str(r.get("status")) for r in run.get("rounds", []))])
            if COMPARISON_FILE in {path.name for path in Path(run["run_dir"]).parents[1].iterdir()}:
                continue  # a worker's blocks that failed are in its rounds alone
            assert all(reason.strip() and reason in told for reason in reasons), run["run_id"]


def test_the_kept_samples_agree_with_the_medians_shown(folder) -> None:
    runs = loaded(folder)
    timed = runs.steps[~runs.steps["instrumented"] & (runs.steps["status"] == "ok")]
    for run in finished(folder):
        rows = rows_of(timed, run).set_index(SHAPE).sort_index()
        shown = [shape for shape in run["shapes"] if shape.get("timed", {}).get("status") == "ok"]
        assert len(rows.index.unique()) == len(shown), run["run_id"]
        for shape in shown:
            spread = rows.loc[[keys_of(shape)], "wall_us"].quantile([0.05, 0.95])
            assert spread[0.05] <= shape["timed"]["wall_us"] <= spread[0.95], (run["run_id"], shape)


def test_traces_that_are_said_to_be_there_hold_every_layer(folder) -> None:
    runs = loaded(folder)
    seen = 0
    for run in finished(folder):
        layers = rows_of(runs.layers, run)
        whole = layers[layers["op"] == "layer"]
        for shape in run["shapes"]:
            for name, source in (("eager", "cuda_event"), ("graph", "cuda_event"), ("kernels", "cupti")):
                if "closure" not in shape.get(name, {}):
                    continue
                here = whole["source"] == source
                here &= (whole["mode"] == name) if source == "cuda_event" else True
                for key, value in zip(SHAPE, keys_of(shape), strict=True):
                    here &= whole[key] == value
                each = whole[here].groupby("iteration")["layer_index"].nunique()
                assert len(each) and (each == num_layers(run)).all(), (run["run_id"], shape, name)
                seen += 1
    assert seen


def test_a_closure_that_is_off_is_told_as_a_warning(folder) -> None:
    for run in finished(folder):
        for name in ("eager", "graph", "kernels"):
            shares = pd.Series([s[name]["closure"] for s in run["shapes"] if "closure" in s.get(name, {})], dtype=float)
            told = any(f"In the {name} trace" in warning for warning in run["warnings"])
            assert told == (not shares.between(0.98, 1.02).all()), (run["run_id"], name)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda path: path.name)
def test_every_contestant_was_measured_or_has_a_reason(comparison) -> None:
    record, rows = read(comparison)
    assert record["status"] == "ok" and rows
    for label in record["settings"]["engines"]:
        for row in rows:
            cell = row.cells[label]
            assert cell.spread is not None or cell.reason not in ("", "not measured"), (label, row.name)
