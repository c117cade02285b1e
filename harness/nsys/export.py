"""Tables of an Nsight Systems export: SQLite or a folder of parquet files (`nsys export --type sqlite|parquetdir`).

Tables are made only where there is something in them, and columns differ between versions: what is missing reads as
empty. Times are ns on one clock for host and GPU.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from engines.base import InputError

STRINGS, NVTX, RUNTIME, GRAPH_NODES = (
    "StringIds",
    "NVTX_EVENTS",
    "CUPTI_ACTIVITY_KIND_RUNTIME",
    "CUDA_GRAPH_NODE_EVENTS",
)
KERNELS, COPIES, FILLS = (f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET"))
_KERNEL_COLUMNS = ("start", "end", "correlationId", "globalPid", "shortName", "demangledName", "graphNodeId")
_COLUMNS = {
    STRINGS: ("id", "value"),
    NVTX: ("start", "end", "eventType", "text", "textId", "globalTid", "domainId"),
    RUNTIME: ("start", "end", "globalTid", "correlationId"),
    GRAPH_NODES: ("start", "globalTid", "graphNodeId", "originalGraphNodeId"),
    KERNELS: _KERNEL_COLUMNS,
    COPIES: _KERNEL_COLUMNS,
    FILLS: _KERNEL_COLUMNS,
}


@dataclass(frozen=True)
class Export:
    """What is needed of an export, a frame for each table; integers that may be missing are `Int64`."""

    path: Path
    tables: dict[str, pd.DataFrame]

    @classmethod
    def read(cls, path: Path | str) -> Export:
        """InputError: there is no such file, it is no export, or nothing of CUDA or NVTX is in it."""
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path} does not exist.")
        if path.suffix == ".nsys-rep":
            raise InputError(f"{path} must be exported first: nsys export --type sqlite {path}")
        try:
            tables = {name: _read(path, name, columns) for name, columns in _COLUMNS.items()}
        except (sqlite3.Error, pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is no export of Nsight Systems that can be read: {error}.") from None
        for name, what in ((KERNELS, "kernels"), (NVTX, "NVTX ranges"), (RUNTIME, "CUDA calls")):
            if tables[name].empty:
                raise InputError(f"{path} has no {what} (no rows in {name}): profile with -t cuda,nvtx.")
        return cls(path, tables)

    def __getitem__(self, table: str) -> pd.DataFrame:
        return self.tables[table]

    def texts(self, ids: pd.Series) -> pd.Series:
        """The strings of `ids`; missing where an id is."""
        return ids.map(self[STRINGS].set_index("id")["value"]).astype(object)


def _read(path: Path, table: str, columns: Sequence[str]) -> pd.DataFrame:
    frame = _from_folder(path / f"{table}.parquet") if path.is_dir() else _from_sqlite(path, table)
    found = frame.reindex(columns=list(columns))
    # As objects, a column of integers with missing ones would become floats, and ids of 64 bits lose digits.
    words = {name for name in ("text", "value") if name in columns}
    return found.astype({name: "Int64" for name in columns if name not in words})


def _from_folder(file: Path) -> pd.DataFrame:
    return pq.read_table(file).to_pandas(integer_object_nulls=True) if file.is_file() else pd.DataFrame()


def _from_sqlite(path: Path, table: str) -> pd.DataFrame:
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        there = database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
        if not there:
            return pd.DataFrame()
        cursor = database.execute(f"SELECT * FROM {table}")
        return pd.DataFrame(cursor.fetchall(), columns=[c[0] for c in cursor.description], dtype=object)
    finally:
        database.close()
