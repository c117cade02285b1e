"""Where the numbers come from: runs, versions, machine, verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report import html
from harness.report.data import PASSED, Data, driver_of, machine_of
from harness.report.html import Section

_COMMIT = 10
"""Characters of a commit's hash."""


def section(data: Data) -> Section:
    """A row per run, and all its versions and settings on a click."""
    header = ["", "run", "started", "status", "arm", "machine", "driver", "torch", "commit", "config", "verification"]
    rows = [[data.name_of(run), *_row(run)] for run in data.runs.runs]
    parts = [html.table(header, rows, numbers=len(header))]
    parts += [html.folded(f"All of {data.name_of(run)}", _details(run)) for run in data.runs.runs]
    return Section("Provenance", parts)


def _row(run: Mapping[str, Any]) -> list[html.Cell]:
    where = run.get("provenance") or {}
    commit = (where.get("git") or {}).get("commit") or "–"
    torch = (where.get("versions") or {}).get("torch", "–")
    named = (run["run_id"], run.get("started", "–"), run.get("status", "–"), run.get("arm", "–"), machine_of(run),
             driver_of(run) or "–", torch, commit[:_COMMIT], run.get("config_hash", "–"), checked(run))  # fmt: skip
    return [str(value) for value in named]


def checked(run: Mapping[str, Any]) -> str:
    """The outcome of the check with its numbers, in one line."""
    found = run.get("verification") or {}
    engine = found.get("engine")
    if found.get("status") != PASSED or engine is None:  # a study of ops compares each variant by itself
        return str(found.get("status", "missing"))
    return (
        f"passed over {found['positions']} tokens: KL {engine['kl']:.2e} (bound {found['bound_kl']:.2e}), "
        f"|ΔNLL| {engine['nll_delta']:.2e} (bound {found['bound_nll_delta']:.2e}), "
        f"greedy agreement {engine['greedy_agreement']:.1%}"
    )


def _details(run: Mapping[str, Any]) -> str:
    rows: list[list[html.Cell]] = []
    for key in (
        "provenance",
        "config",
        "limits",
        "capacity",
        "weights",
        "gpu_before",
        "gpu_after",
        "traces",
        "phases_s",
    ):
        rows += [[f"{key}.{name}", value] for name, value in _leaves(run.get(key) or {})]
    return html.table(["", ""], rows, numbers=2)


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return [(prefix.rstrip("."), f"{value:.4g}" if isinstance(value, float) else str(value))]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{prefix}{key}.")]
