"""A run's folder: written so that it is valid at every moment, read with every doubt spelled out.

A run is `run.json` plus the tables of `harness.schema`. Files are written under a temporary name in the same folder and
renamed, so that whoever stops the process keeps what the last `flush` wrote.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engines.base import InputError, RequestResult
from harness.schema import SCHEMA_VERSION, TABLES, version_of

RUN_FILE, COMPARISON_FILE = "run.json", "comparison.json"


@dataclass(frozen=True)
class Runs:
    """Rows of one or many runs, with stable column types even where empty, and the runs' `run.json` contents.

    Each dict of `runs` also gets `run_dir`, the folder that it was read from.
    """

    layers: pd.DataFrame
    steps: pd.DataFrame
    requests: pd.DataFrame
    host: pd.DataFrame
    rounds: pd.DataFrame
    ops: pd.DataFrame
    runs: list[dict[str, Any]] = field(default_factory=list)


def request_row(
    engine: str, arm: str, result: RequestResult, start_s: float, rate: float | None = None
) -> dict[str, Any]:
    """A finished request as a row of `requests`; `start_s` is the workload's start on the clock of `result`."""
    times_s = np.asarray(result.token_times_s, dtype=np.float64)
    n = len(times_s)
    return {
        "engine": engine,
        "arm": arm,
        "request_id": result.request_id,
        "prompt_tokens": result.prompt_tokens,
        "output_tokens": n,
        "arrival_s": result.arrival_s - start_s,
        "ttft_ms": float(times_s[0] - result.arrival_s) * 1e3 if n else None,
        "tpot_ms": float(times_s[-1] - times_s[0]) / (n - 1) * 1e3 if n > 1 else None,
        "itl_ms": (np.diff(times_s) * 1e3).tolist(),
        "e2el_ms": float(times_s[-1] - result.arrival_s) * 1e3 if n else None,
        "finish_reason": result.finish_reason,
        "rate": rate,
    }


class RunWriter:
    """Collects one run's rows and writes them to `run_dir`, which it makes and claims.

    InputError: the folder cannot be written, or already holds a run.
    """

    def __init__(self, run_dir: Path | str, run_id: str) -> None:
        self.run_dir = Path(run_dir)
        self.run_id = run_id
        self._tables = {name: schema.empty_table() for name, schema in TABLES.items()}
        self._unwritten = set(TABLES)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.flush()
        except FileExistsError:
            taken = "already holds a run" if self.run_dir.is_dir() else "is not a folder"
            raise InputError(f"{self.run_dir} {taken}; choose another results folder.") from None
        except OSError as error:
            raise InputError(f"Results cannot be written to {self.run_dir}: {error.strerror or error}.") from None

    def add_layers(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `layers`; `run_id` is filled in. ValueError: a column that does not exist, is missing or NaN."""
        self._add("layers", rows)

    def add_steps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `steps`; as `add_layers`, and nullable columns may be left out."""
        self._add("steps", rows)

    def add_requests(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `requests` (see `request_row`); as `add_steps`."""
        self._add("requests", rows)

    def add_host(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `host`; as `add_steps`."""
        self._add("host", rows)

    def add_rounds(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `rounds`; as `add_steps`."""
        self._add("rounds", rows)

    def add_ops(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of `ops`; as `add_steps`."""
        self._add("ops", rows)

    def flush(self) -> None:
        """Write all rows so far. Costs time: call it between shapes, never inside a timed loop."""
        for name in sorted(self._unwritten):
            table = self._tables[name] = self._tables[name].combine_chunks()
            _replace(self.run_dir / f"{name}.parquet", partial(pq.write_table, table, compression="zstd"))
            self._unwritten.remove(name)

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write `run.json`: `run` with run_id and schema_version. ValueError where it holds NaN or infinity."""
        write_json(self.run_dir / RUN_FILE, self._stamped(run))

    def _add(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        checked = [_checked({"run_id": self.run_id, **row}, TABLES[table]) for row in rows]
        self._tables[table] = pa.concat_tables([self._tables[table], _to_table(checked, TABLES[table])])
        self._unwritten.add(table)

    def _stamped(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return {"run_id": self.run_id, "schema_version": SCHEMA_VERSION, **run}

    def _claim(self) -> None:
        """Make `run.json`, FileExistsError if there is one, so that two runs never share a folder."""
        with (self.run_dir / RUN_FILE).open("x") as file:
            json.dump(self._stamped({"status": "running"}), file)


def _checked(row: Mapping[str, Any], schema: pa.Schema) -> Mapping[str, Any]:
    unknown = row.keys() - set(schema.names)
    if unknown:
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
    for column in schema:
        value = row.get(column.name)
        if value is None and not column.nullable:
            raise ValueError(f"column {column.name} needs a value")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"column {column.name} is {value}")
    return row


def _to_table(rows: list[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    try:
        columns = [pa.array([row.get(c.name) for row in rows], type=c.type) for c in schema]
    except pa.ArrowException as error:
        raise ValueError(f"a value has the wrong type: {error}") from None
    return pa.Table.from_arrays(columns, schema=schema)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in `path`'s place in one move."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temp)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` in one move, and make its folder. ValueError where it holds NaN or infinity."""
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda temp: temp.write_text(text))


def load(*paths: Path | str) -> Runs:
    """Read runs: each path is a run's folder or a folder with runs anywhere below it.

    InputError: a path without runs, a file that is damaged, of another schema version, or with values that no
    measurement can have; it names the file.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path))))
    runs, seen = [], dict[str, Path]()
    for folder in folders:
        run = _read_json(folder / RUN_FILE)
        other = seen.setdefault(run["run_id"], folder)
        if other != folder:
            raise InputError(f"{folder} and {other} hold the same run, {run['run_id']}; load only one of them.")
        runs.append({**run, "run_dir": str(folder)})
    frames = {name: _frame([_read_table(f / f"{name}.parquet", schema) for f in folders], schema)
              for name, schema in TABLES.items()}  # fmt: skip
    return Runs(**frames, runs=runs)


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder with runs.")
    tables = [f"{name}.parquet" for name in TABLES]
    found = sorted({p.parent.resolve() for p in path.rglob("*") if p.name == RUN_FILE or p.name in tables})
    for folder in found:
        if not (folder / RUN_FILE).is_file():
            raise InputError(f"{folder} has result tables but no {RUN_FILE}.")
    if not found:
        raise InputError(f"{path} holds no run (no {RUN_FILE} in it or below it).")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None
    if not isinstance(run, dict) or not isinstance(run.get("run_id"), str):
        raise InputError(f"{path} is not a run's record: it has no run_id.")
    if run.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {run.get('schema_version')}; this reader takes {SCHEMA_VERSION}.")
    return run


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """One file as a table with exactly the columns of `schema`; a file that does not exist is an empty table."""
    if not path.exists():
        return schema.empty_table()
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    version = version_of(table.schema)
    if version != str(SCHEMA_VERSION):
        raise InputError(f"{path} has schema version {version or 'none'}; this reader takes {SCHEMA_VERSION}.")
    for column in schema:
        index = table.schema.get_field_index(column.name)
        if index < 0 and column.nullable:  # written before the table had it
            table = table.append_column(column, pa.nulls(len(table), column.type))
            continue
        if index < 0 or table.schema.field(index).type != column.type:
            raise InputError(f"{path} has no column {column.name} of type {column.type}.")
        values = table.column(index)
        if not column.nullable and values.null_count:
            raise InputError(f"{path} has empty values in column {column.name}.")
        if pa.types.is_floating(column.type) and pc.all(pc.is_finite(values)).as_py() not in (True, None):
            raise InputError(f"{path} has NaN or infinite values in column {column.name}.")
    return table.select(schema.names)


def _frame(tables: list[pa.Table], schema: pa.Schema) -> pd.DataFrame:
    plain = [t.replace_schema_metadata(None).cast(pa.schema([f.remove_metadata() for f in schema])) for t in tables]
    return pa.concat_tables(plain).to_pandas() if plain else schema.empty_table().to_pandas()
