"""The two sides of a check: their runs, read and made rows, launch by launch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engines.base import InputError
from harness.compare.contestants import folder_name
from harness.results import COMPARISON_FILE, Runs, load
from harness.schema import TABLES
from harness.serving import PERCENTILES

STEPS, ROUNDS, SERVED = "steps", "rounds", "run.json"
_STEP = ["run_id", "engine", "arm", "phase", "batch_size", "new_tokens", "context_len"]
_ROUND = ["run_id", "engine", "arm", "metric", "phase", "batch_size", "tokens", "output_len"]
_SERVED_WORK = ("num_requests", "prompt_len", "output_len", "temperature")
"""What makes two served workloads of one name the same work, beside the seed."""
_ARRIVING_WORK = (*_SERVED_WORK, "arrivals", "burst_size", "lengths", "trace", "slo")
"""The same of a workload whose requests arrive over time."""
_LATENCIES = tuple(f"{name}_p{p}" for name in ("ttft_ms", "tpot_ms", "e2el_ms") for p in PERCENTILES if p in (50, 99))
_GOODPUT = "goodput_rate"
_US_PER_MS = 1e3


@dataclass(frozen=True, slots=True)
class Key:
    """What must be equal for two rows to be compared. `table` says what took the numbers: blocks of steps in turns with
    other engines are not steps of an engine alone. `work` tells served workloads of one name apart."""

    device: str
    model: str
    dtype: str
    workload: str
    engine: str
    arm: str
    table: str
    metric: str
    phase: str
    batch_size: int
    tokens: int
    output_len: int
    work: str = ""
    rate: float = 0.0
    """Requests per second that arrive; 0: all at once, or none."""

    @property
    def higher_is_better(self) -> bool:
        return self.metric.endswith("tok_s") or self.metric == _GOODPUT

    @property
    def name(self) -> str:
        """For people, without what is usually the same in all rows, like "decode, batch 8, 128 tokens, step ms"."""
        what = self.metric.removesuffix("_ms") + " ms" if self.metric.endswith("_ms") else self.metric
        if self.phase == "serve":
            arriving = f" at {self.rate:g}/s" * bool(self.rate)
            what = what.replace("output_tok_s", "output tok/s").replace("_ms_", " ms ").replace("_rate", " requests/s")
            return f"{self.batch_size} requests{arriving}, {what}"
        return f"{self.phase}, batch {self.batch_size}, {self.tokens} tokens, {what}"


@dataclass
class Cell:
    """One row of one side: samples in the order in which they were taken, an array for each launch that has some."""

    launches: list[NDArray[np.float64]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def log_medians(self) -> NDArray[np.float64]:
        """[launches]"""
        return np.log([np.median(samples) for samples in self.launches])

    @property
    def value(self) -> float | None:
        """Geometric mean of the launches' medians, in the metric's unit."""
        return float(np.exp(self.log_medians.mean())) if self.launches else None


@dataclass(frozen=True)
class Side:
    """One side's rows, what `run.json` says of its runs, and why contestants of its comparisons are gone."""

    rows: dict[Key, Cell]
    runs: list[dict[str, Any]]
    dead: dict[str, str] = field(default_factory=dict)


def read(baseline: Path | str, candidate: Path | str, verified: bool = True) -> tuple[Side, Side]:
    """Both sides, each a folder with any number of runs or comparisons below it.

    A contestant that died in a comparison does not take the others with it: its runs are left out, and the rows that
    the baseline has of it are failures of the candidate. `verified` False: the caller knows otherwise that the engines'
    output is right.
    InputError: a side cannot be read, has a run that did not finish or was not verified, or has nothing timed; both
    have a run in common; no row of one has its like in the other.
    """
    folders = (Path(baseline), Path(candidate))
    both, dead = [], []
    for folder in folders:
        runs, gone = _living(load(folder))
        for run in runs.runs:
            _check(run, verified)
        both.append(runs)
        dead.append(gone)
    again = {run["run_id"] for run in both[0].runs} & {run["run_id"] for run in both[1].runs}
    if again:
        raise InputError(f"Both sides hold run {min(again)}; nothing can be learnt from a run against itself.")
    labels = _engine_labels(*both)
    sides = [Side(_rows(runs, labels), runs.runs, gone) for runs, gone in zip(both, dead, strict=True)]
    for side, folder in zip(sides, folders, strict=True):
        if not side.rows:
            raise InputError(f"{folder} has runs but nothing timed in them.")
    for label, reason in dead[1].items():
        lost = [run for run in both[0].runs if _contestant(run) == folder_name(label)]
        for key in _rows(_only(both[0], lost), labels):
            sides[1].rows.setdefault(key, Cell()).failures.append(f"{label} died: {reason}")
    if not sides[0].rows.keys() & sides[1].rows.keys():
        raise InputError(_why_apart(*sides))
    return sides[0], sides[1]


def _comparison(run: Mapping[str, Any]) -> Path | None:
    """The record of the comparison that a run took part in, as <comparison>/launch-N/<contestant>."""
    path = Path(run["run_dir"]).parents[1] / COMPARISON_FILE
    return path if path.is_file() else None


def _contestant(run: Mapping[str, Any]) -> str:
    """The folder that says which contestant of a comparison it was; "" outside of comparisons."""
    return Path(run["run_dir"]).name if _comparison(run) else ""


def _only(runs: Runs, kept: list[dict[str, Any]]) -> Runs:
    """`runs` without the rows and records of all runs but `kept`."""
    ids = {run["run_id"] for run in kept}
    frames = {name: (frame := getattr(runs, name))[frame["run_id"].isin(ids)] for name in TABLES}
    return replace(runs, runs=kept, **frames)


def _living(runs: Runs) -> tuple[Runs, dict[str, str]]:
    """`runs` without those that died in a comparison, and of each contestant that did, its label and why."""
    dead: dict[str, str] = {}
    for path in {path for run in runs.runs if (path := _comparison(run))}:
        try:
            reasons = json.loads(path.read_text()).get("reasons", {})
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from None
        dead |= {label: reason.splitlines()[0] for label, reason in reasons.items()}
    gone = [run for run in runs.runs if run.get("status") != "ok" and _comparison(run)]
    known = set(map(folder_name, dead))
    for run in gone:
        if _contestant(run) not in known:
            dead[_contestant(run)] = str(run.get("error", f"status: {run.get('status')}")).splitlines()[0]
    ids = {run["run_id"] for run in gone}
    return (_only(runs, [run for run in runs.runs if run["run_id"] not in ids]) if ids else runs), dead


def _check(run: Mapping[str, Any], verified: bool) -> None:
    where = run["run_dir"]
    if run.get("status") != "ok":
        raise InputError(f"The run in {where} did not finish (status: {run.get('status')}).")
    verification = run.get("verification")
    if verified and (not isinstance(verification, dict) or verification.get("status") != "passed"):
        raise InputError(f"The run in {where} was not verified, so its times prove nothing.")
    for name in ("engine", "model", "workload", "dtype"):
        if not isinstance(run.get(name), str):
            raise InputError(f"run.json in {where} does not say its {name}.")
    _device(run)


def _device(run: Mapping[str, Any]) -> str:
    """The GPU's name, or the processor's of a run without one."""
    try:
        provenance = run["provenance"]
        name = provenance["cpu"]["model"] if run["device"] == "cpu" else provenance["gpu"]["name"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise InputError(f"run.json in {run['run_dir']} does not say on which device it ran.")
    return name


def _engine_labels(*sides: Runs) -> dict[str, str]:
    """`run_id` to the engine's name, with its options where a side has several sets of them for one workload.

    Only then: the options of one engine alone are part of what a candidate may change.
    """
    several = set()
    for runs in sides:
        seen = defaultdict(set)
        for run in runs.runs:
            seen[run["engine"], run["workload"]].add(options_of(run))
        several |= {place for place, sets in seen.items() if len(sets) > 1}
    return {
        run["run_id"]: run["engine"] + (options_of(run) if (run["engine"], run["workload"]) in several else "")
        for runs in sides
        for run in runs.runs
    }


def options_of(run: Mapping[str, Any]) -> str:
    """The engine's own options of a run, like ":enforce_eager=true"."""
    config = run.get("config")
    engine = config.get("engine") if isinstance(config, dict) else None
    options = engine.get("options") if isinstance(engine, dict) else None
    return "".join(f":{k}={json.dumps(v, sort_keys=True)}" for k, v in sorted((options or {}).items()))


def _rows(runs: Runs, labels: Mapping[str, str]) -> dict[Key, Cell]:
    records = {run["run_id"]: run for run in runs.runs}
    found: dict[Key, Cell] = defaultdict(Cell)

    def key(run_id: str, **rest: Any) -> Key:
        run = records[run_id]
        who = {name: run[name] for name in ("model", "dtype", "workload")}
        work = _served_work(run, _ARRIVING_WORK if "rate" in rest else _SERVED_WORK) if rest["phase"] == "serve" else ""
        return Key(device=_device(run), **who, engine=labels[run_id], work=work, **rest)

    timed = runs.steps[~runs.steps["instrumented"]]
    for place, samples, failures in _groups(timed, _STEP, ["iteration"], "wall_us", records):
        run_id, _, arm, phase, batch_size, new_tokens, context_len = place
        tokens = context_len if phase == "decode" else new_tokens // max(1, batch_size)
        shape = {"phase": phase, "batch_size": batch_size, "tokens": tokens, "output_len": 0}
        cell = found[key(run_id, arm=arm, table=STEPS, metric="step_ms", **shape)]
        _add(cell, records[run_id], samples / _US_PER_MS, failures)
    for place, samples, failures in _groups(runs.rounds, _ROUND, ["launch", "round"], "value", records):
        run_id, _, *rest = place
        cell = found[key(run_id, table=ROUNDS, **dict(zip(_ROUND[2:], rest, strict=True)))]
        _add(cell, records[run_id], samples, failures)
    for run_id, run in records.items():
        if served := run.get("throughput"):
            shape = {"phase": "serve", "batch_size": _number(run, served, "requests"), "tokens": 0, "output_len": 0}
            arm = str(served.get("arm", run.get("arm", "")))
            cell = found[key(run_id, arm=arm, table=SERVED, metric="output_tok_s", **shape)]
            _add(cell, run, np.array([_number(run, served, "output_tok_s")], dtype=np.float64), [])
        for served in run.get("serving") or ():
            _add_rate(found, key, run, served)
    return dict(found)


def _add_rate(found: dict[Key, Cell], key: Callable[..., Key], run: Mapping[str, Any], served: Any) -> None:
    """The rows of one rate of a `serving` workload, one number per launch each, and its metrics as `load_record` names
    them. A latency that no request has (TPOT of single tokens) has no row; a goodput of 0 has no logarithm: it failed.
    """
    shape = {"phase": "serve", "batch_size": _number(run, served, "requests"), "tokens": 0, "output_len": 0}
    rate = 0.0 if served.get("rate") is None else float(_number(run, served, "rate"))
    arm = str(served.get("arm", run.get("arm", "")))
    for metric in (*_LATENCIES, _GOODPUT, "output_tok_s"):
        if metric in _LATENCIES and metric not in served:
            continue
        value = _number(run, served, metric)
        none_good = metric == _GOODPUT and value == 0
        samples = np.array([] if none_good else [value], dtype=np.float64)
        cell = found[key(run["run_id"], arm=arm, table=SERVED, metric=metric, rate=rate, **shape)]
        _add(cell, run, samples, ["no request kept the bounds of goodput"] if none_good else [])


def _groups(
    frame: pd.DataFrame, key: list[str], order: list[str], value: str, records: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], NDArray[np.float64], list[str]]]:
    """Groups of `frame` by `key`, which starts with `run_id`: what was measured, in its order, and reasons of failures.

    InputError: rows of a run that has no record, or a sample that is there twice, as if two runs had written here.
    """
    strangers = set(frame["run_id"]) - records.keys()
    if strangers:
        raise InputError(f"There are rows of run {min(strangers)} but no run.json of it.")
    again = frame[frame.duplicated([*key, *order])]
    if len(again):
        run = records[again["run_id"].iloc[0]]
        raise InputError(f"{run['run_dir']} has the same sample twice, as if two runs had written there.")
    frame = frame.sort_values(order, kind="stable")
    values, status = frame[value].to_numpy(dtype=np.float64), frame["status"].to_numpy(dtype=object)
    ok = status == "ok"
    # Positions instead of frames: a thousand runs have ten thousand groups.
    for place, at in frame.groupby(key, sort=False).indices.items():
        yield place, values[at[ok[at]]], list(status[at[~ok[at]]])


def _add(cell: Cell, run: Mapping[str, Any], samples: NDArray[np.float64], failures: list[str]) -> None:
    if not (np.isfinite(samples) & (samples > 0)).all():
        raise InputError(f"{run['run_dir']} has samples without a time above 0.")
    if len(samples):
        cell.launches.append(samples)
    cell.failures += failures


def _number(run: Mapping[str, Any], record: Any, name: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, int | float):
        raise InputError(f"run.json in {run['run_dir']} has no number {name} in what it says of its served requests.")
    return value


def _served_work(run: Mapping[str, Any], names: Sequence[str]) -> str:
    config = run.get("config")
    workload = config.get("workload") if isinstance(config, dict) else None
    if not isinstance(workload, dict):
        return ""
    return json.dumps([*(workload.get(name) for name in names), config.get("seed")])  # type: ignore[union-attr]


def _why_apart(baseline: Side, candidate: Side) -> str:
    """One sentence that names the first thing in which all rows differ."""
    for name in (f.name for f in fields(Key)):
        ours, theirs = ({str(asdict(key)[name]) for key in side.rows} for side in (baseline, candidate))
        if not ours & theirs:
            return (
                f"The two cannot be compared: {name.replace('_', ' ')} is {', '.join(sorted(ours))} in the baseline, "
                f"{', '.join(sorted(theirs))} in the candidate."
            )
    return "The two cannot be compared: they have no row in common."
