"""A run made small enough to commit: fewer iterations, the same columns, and a note that says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engines.base import InputError
from harness.results import COMPARISON_FILE, RUN_FILE, load
from harness.schema import TABLES

_DECIMALS = 3
"""Floats keep this many decimals of their unit (1 ns of a us, 1 us of a ms): far below noise, and it compresses."""
_ZSTD_LEVEL = 19
_CONFIG_FILES = ("config.yaml", "overrides.yaml")
"""What is kept of `.hydra/`; its hydra.yaml tells only where the run stood on its machine."""
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.@+-]+/)*([\w.@+-]+)")
_WHOLE = ("requests", "rounds")
"""Tables that are small as they are."""
_SHAPE = ["engine", "arm", "phase", "batch_size", "new_tokens", "context_len", "mode", "source"]
_KEYS = {"steps": [*_SHAPE, "instrumented"], "ops": ["op", "variant", "shape", "dtype"]}
"""Columns that tell one sequence of iterations from another, where `_SHAPE` does not."""


def slim(run_dir: Path | str, target: Path | str, max_iterations: int) -> None:
    """Copy the run in `run_dir` to the folder `target` with at most `max_iterations` iterations of each shape.

    Iterations are taken evenly from first to last, so that drift stays visible, and a kept iteration keeps all its
    layers and ops. Requests and rounds all stay. `run.json` gets `slimmed` with what was done, and loses the folders of
    absolute paths. A run that stood in `target` is replaced. InputError: `run_dir` is no readable run, or `target` is
    not free.
    """
    source, target = Path(run_dir), Path(target)
    runs = load(source)
    if len(runs.runs) != 1 or not (source / RUN_FILE).is_file():
        raise InputError(f"{source} is not the folder of one run.")
    if target.exists() and not (target / RUN_FILE).is_file():
        raise InputError(f"{target} exists and is not a run; nothing was replaced.")
    if target.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} and {source} lie in each other.")
    temp = target.with_name(f".{target.name}.slim")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    rows = {}
    for name, schema in TABLES.items():
        whole = getattr(runs, name)
        frame = whole if name in _WHOLE else _thinned(whole, _KEYS.get(name, _SHAPE), max_iterations)
        rows[name] = [len(whole), len(frame)]
        table = _rounded(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
        table = table.replace_schema_metadata(schema.metadata)
        pq.write_table(table, temp / f"{name}.parquet", compression="zstd", compression_level=_ZSTD_LEVEL)
    record = {key: value for key, value in runs.runs[0].items() if key != "run_dir"}
    record["slimmed"] = {"max_iterations": max_iterations, "decimals": _DECIMALS, "rows_before_after": rows}
    (temp / RUN_FILE).write_text(json.dumps(_without_folders(record), indent=2) + "\n")
    for file in _CONFIG_FILES:
        if (source / ".hydra" / file).is_file():
            (temp / ".hydra").mkdir(exist_ok=True)
            text = (source / ".hydra" / file).read_text()
            (temp / ".hydra" / file).write_text(_without_folders(text))
    _put(temp, target)


def slim_comparison(folder: Path | str, target: Path | str, max_iterations: int) -> None:
    """Copy the comparison in `folder` to `target`: its record, and every run of its launches made small by `slim`.

    Contestants that never got a run keep their reason in the record. A comparison that stood in `target` is replaced
    once the new one is whole. InputError: there is no comparison, or `target` is not free.
    """
    source, target = Path(folder), Path(target)
    if not (source / COMPARISON_FILE).is_file():
        raise InputError(f"{source} holds no comparison (no {COMPARISON_FILE}).")
    if target.exists() and not (target / COMPARISON_FILE).is_file():
        raise InputError(f"{target} exists and is not a comparison; nothing was replaced.")
    if target.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} and {source} lie in each other.")
    temp = target.with_name(f".{target.name}.slim")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        for path in sorted(source.rglob(COMPARISON_FILE)):
            copy = temp / path.relative_to(source)
            copy.parent.mkdir(parents=True)
            copy.write_text(json.dumps(_without_folders(json.loads(path.read_text())), indent=2) + "\n")
        for path in sorted(source.rglob(RUN_FILE)):
            slim(path.parent, temp / path.parent.relative_to(source), max_iterations)
        _put(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def slim_json(file: Path | str, target: Path | str) -> None:
    """Copy the record in `file` to `target` without folders of this machine. InputError: it is no JSON object."""
    try:
        record = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {file}: {error}.") from error
    if not isinstance(record, dict):
        raise InputError(f"Cannot read {file}: it does not hold an object.")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(json.dumps(_without_folders(record), indent=2) + "\n")


def _put(whole: Path, target: Path) -> None:
    """Move the folder `whole` to `target`, in place of what stood there, which is gone only afterwards."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        whole.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _thinned(frame: pd.DataFrame, keys: list[str], max_iterations: int) -> pd.DataFrame:
    """Rows of `frame` whose iteration is among the `max_iterations` evenly spaced ones of its group."""
    if frame.empty:
        return frame
    rank = frame.groupby(keys, sort=False)["iteration"].rank(method="dense").to_numpy().astype(np.int64) - 1
    count = pd.Series(rank, index=frame.index).groupby([frame[k] for k in keys], sort=False).transform("max") + 1
    n = np.minimum(count.to_numpy(), max_iterations)
    # Of ranks 0..count-1 keep floor(j * count / n) for j = 0..n-1: a rank is kept if some such j lands on it.
    j = -(-rank * n // count.to_numpy())
    kept = (j < n) & (j * count.to_numpy() // n == rank)
    return frame[kept]


def _rounded(table: pa.Table) -> pa.Table:
    for index, column in enumerate(table.schema):
        values = table.column(index).combine_chunks()
        if pa.types.is_floating(column.type):
            values = pc.round(values, _DECIMALS)
        elif pa.types.is_list(column.type):
            values = pa.ListArray.from_arrays(values.offsets, pc.round(values.values, _DECIMALS)).cast(column.type)
        table = table.set_column(index, column, values)
    return table


def _without_folders(value: Any) -> Any:
    """`value` with every absolute path cut down to its last part, in sentences too, and without the GPU's serial id."""
    if isinstance(value, dict):
        return {key: _without_folders(v) for key, v in value.items() if key != "uuid"}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    return _ABSOLUTE_PATH.sub(r"\1", value) if isinstance(value, str) else value
