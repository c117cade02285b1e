"""What a report is about: runs grouped so that what stands side by side can be compared, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from engines.base import InputError
from harness.compare.comparison import read as read_comparison
from harness.compare.contestants import short_names
from harness.compare.table import Row
from harness.report.labels import labels
from harness.results import COMPARISON_FILE, Runs, load

_SHAPED = ("layers", "steps", "host")
PHASES = ("prefill", "decode", "mixed")
PASSED = "passed"
UNKNOWN = "unknown"
KEYS = ["phase", "batch_size", "new_tokens", "context_len"]
"""Columns of `layers`, `steps` and `host` that tell shapes apart."""


class Shape(NamedTuple):
    """A shape of `run.json`: `tokens` are a prompt's in prefill, those in the cache in decode."""

    phase: str
    batch_size: int
    tokens: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Shape:
        return cls(record["phase"], record["batch_size"], record["tokens"])

    @property
    def order(self) -> tuple[int, int, int]:
        return PHASES.index(self.phase), self.tokens if self.phase == "decode" else 0, self.work

    @property
    def work(self) -> int:
        """Tokens computed in the step."""
        return self.batch_size * (self.tokens if self.phase == "prefill" else 1)

    @property
    def key(self) -> tuple[str, int, int, int]:
        """Its values in the columns KEYS."""
        return self.phase, self.batch_size, self.work, 0 if self.phase == "prefill" else self.tokens

    def __str__(self) -> str:
        if self.phase == "decode":
            return f"decode, batch {self.batch_size}, context {self.tokens}"
        return f"{self.phase}, {self.batch_size} × {self.tokens} tokens"

    @property
    def slug(self) -> str:
        return f"{self.phase}-{self.batch_size}x{self.tokens}"


@dataclass(frozen=True)
class Entry:
    """A run as it appears on the page. `variant` numbers the runs of one engine in one setting, from 0."""

    run: Mapping[str, Any]
    label: str
    variant: int

    @property
    def engine(self) -> str:
        return str(self.run.get("engine", UNKNOWN))

    @property
    def verified(self) -> bool:
        return (self.run.get("verification") or {}).get("status") == PASSED

    @property
    def contestant(self) -> bool:
        return bool(self.run.get("contestant", True))

    def pass_of(self, shape: Shape, name: str) -> Mapping[str, Any]:
        """What `run.json` says of a pass (timed, host, kernels, eager, graph) over a shape; empty if nothing."""
        for record in self.run.get("shapes") or ():
            if Shape.of(record) == shape:
                return record.get(name) or {}
        return {}


@dataclass(frozen=True)
class Setting:
    """Runs that did the same work: one model in one dtype under one workload."""

    model: str
    dtype: str
    workload: str
    entries: list[Entry]

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, {self.workload}"

    @property
    def slug(self) -> str:
        return f"{self.model}-{self.dtype}-{self.workload}"

    @property
    def shapes(self) -> list[Shape]:
        """Those of any run, prefill first, then decode by context and batch."""
        found = {Shape.of(record) for entry in self.entries for record in entry.run.get("shapes") or ()}
        return sorted(found, key=lambda shape: shape.order)

    @property
    def telling(self) -> list[Shape]:
        """At most four shapes that span the others: the smallest and the largest prefill and decode.

        Of a workload of requests, whose shapes are only examples of its steps, the largest decode.
        """
        if any(entry.run.get("throughput") for entry in self.entries):
            return self.shapes[-1:]
        found: list[Shape] = []
        for phase in PHASES:
            of_phase = sorted((s for s in self.shapes if s.phase == phase), key=lambda s: (s.work, s.tokens))
            found += dict.fromkeys(of_phase[:1] + of_phase[-1:])
        return found


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder: its record, and its rows made anew from the blocks of its runs."""

    folder: Path
    record: Mapping[str, Any]
    rows: list[Row]

    @property
    def engines(self) -> list[str]:
        """Labels of all contestants, the dead ones included."""
        return list(self.record["settings"]["engines"])

    @property
    def names(self) -> dict[str, str]:
        """What to show for each label."""
        return short_names(self.engines)

    @property
    def baseline(self) -> str:
        return str(self.record["settings"]["baseline"])

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why contestants are gone, by label."""
        return self.record.get("reasons") or {}

    @property
    def launches(self) -> int:
        return sum((path / COMPARISON_FILE).is_file() for path in self.folder.glob("launch-*"))

    @property
    def day(self) -> str:
        """When it ended."""
        return str(self.record.get("finished", UNKNOWN))[:10]

    @property
    def model(self) -> str:
        return str(self.record["settings"].get("model", {}).get("name", UNKNOWN))

    def __str__(self) -> str:
        workload = self.record["settings"].get("workload", {}).get("name", UNKNOWN)
        return f"{self.model}, {workload}: {', '.join(self.names.values())} taking turns"

    @property
    def slug(self) -> str:
        return self.folder.name

    @property
    def is_ablation(self) -> bool:
        """Whether one engine's sets of features took turns, which have a section of their own."""
        return len({engine for engine, _ in self.variants().values()}) == 1 and any(
            "features=" in label for label in self.engines
        )

    def variants(self) -> dict[str, tuple[str, int]]:
        """Label to engine and number among that engine's contestants."""
        seen: dict[str, int] = {}
        found = {}
        for label in self.engines:
            engine = label.partition(":")[0]
            found[label] = engine, seen.get(engine, 0)
            seen[engine] = seen.get(engine, 0) + 1
        return found


@dataclass(frozen=True)
class Data:
    """All runs below some folders. `settings` hold those that ran alone; the others belong to `comparisons`."""

    runs: Runs
    settings: list[Setting]
    comparisons: list[Comparison]

    @classmethod
    def read(cls, *folders: Path | str) -> Data:
        """InputError: a folder without runs, or a damaged file; the message names it."""
        runs = load(*folders)
        comparisons = [found for folder in dict.fromkeys(_comparison_folders(folders)) if (found := _read(folder))]
        inside = {run["run_id"] for run in runs.runs for c in comparisons if _is_below(run, c.folder)}
        return cls(runs, _settings([run for run in runs.runs if run["run_id"] not in inside]), comparisons)

    def rows(self, table: str, entry: Entry, shape: Shape) -> pd.DataFrame:
        """A run's rows of one shape in `layers`, `steps` or `host`."""
        found = self._by_shape[table].get((entry.run["run_id"], *shape.key))
        return getattr(self.runs, table).iloc[:0] if found is None else found

    @cached_property
    def _by_shape(self) -> dict[str, dict[tuple, pd.DataFrame]]:
        return {name: dict(iter(getattr(self.runs, name).groupby(["run_id", *KEYS]))) for name in _SHAPED}

    @property
    def entries(self) -> Iterator[Entry]:
        for setting in self.settings:
            yield from setting.entries

    def comparison_of(self, run: Mapping[str, Any]) -> Comparison | None:
        """The comparison that a run took part in, if any."""
        return next((c for c in self.comparisons if _is_below(run, c.folder)), None)

    def name_of(self, run: Mapping[str, Any]) -> str:
        """How the page calls a run."""
        if comparison := self.comparison_of(run):
            where = Path(run["run_dir"]).relative_to(comparison.folder)
            return f"{comparison.folder.name}/{where}"
        label = next((entry.label for entry in self.entries if entry.run is run), str(run.get("engine", UNKNOWN)))
        return f"{label}, {run.get('model', UNKNOWN)}, {run.get('workload', UNKNOWN)}"


def machine_of(run: Mapping[str, Any]) -> str:
    """The GPU's name, or the processor's where the run had none."""
    where = run.get("provenance") or {}
    if run.get("device") != "cpu" and where.get("gpu"):
        return str(where["gpu"].get("name", UNKNOWN))
    cpu = where.get("cpu") or {}
    return f"{cpu['model']}, {cpu.get('usable_cores', '?')} cores" if cpu.get("model") else UNKNOWN


def driver_of(run: Mapping[str, Any]) -> str:
    """The GPU's driver; "" without a GPU."""
    gpu = (run.get("provenance") or {}).get("gpu") or {}
    return "" if run.get("device") == "cpu" else str(gpu.get("driver") or "")


def comparable(one: Entry, other: Entry) -> bool:
    """Whether a ratio of two runs of one setting says something of their engines: same machine, same driver."""
    return (machine_of(one.run), driver_of(one.run)) == (machine_of(other.run), driver_of(other.run))


def _settings(runs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        key = tuple(str(run.get(name, UNKNOWN)) for name in ("model", "dtype", "workload"))
        groups.setdefault(key, []).append(run)  # type: ignore[arg-type]
    found = []
    for (model, dtype, workload), group in groups.items():
        seen: dict[str, int] = {}
        entries = []
        for run, label in zip(group, labels(group, machine_of), strict=True):
            engine = str(run.get("engine", UNKNOWN))
            entries.append(Entry(run, label, seen.get(engine, 0)))
            seen[engine] = seen.get(engine, 0) + 1
        found.append(Setting(model, dtype, workload, entries))
    return found


def _comparison_folders(folders: Sequence[Path | str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path.parent.resolve() for path in Path(folder).rglob(COMPARISON_FILE))


def _read(folder: Path) -> Comparison | None:
    """None for the record of a single launch, and for a comparison none of whose runs was written."""
    try:
        record, rows = read_comparison(folder)
    except (KeyError, ValueError, InputError):
        return None
    return Comparison(folder, record, rows)


def _is_below(run: Mapping[str, Any], folder: Path) -> bool:
    return Path(run["run_dir"]).is_relative_to(folder)
