"""Where the numbers come from: runs, versions, machine, verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report import html
from harness.report.data import PASSED, Data, driver_of, machine_of
from harness.report.html import Section

_COMMIT = 10
"""Characters of a commit's hash."""
_CHECK = ("verification", "KL (bound)", "|ΔNLL| (bound)", "same greedy token")
_CHECKED = "Verification: the engine's log-probabilities beside those of transformers, before anything is timed."


def section(data: Data) -> Section:
    """A row per run, and all its versions and settings on a click."""
    header = ["", "started", "status", *_CHECK, "arm", "machine", "driver", "torch", "commit"]
    rows = [[data.name_of(run), *_row(run)] for run in data.runs.runs]
    parts = [html.table(header, rows, "provenance", numbers=len(header)), html.paragraph(_CHECKED)]
    parts += [html.folded(f"All of {data.name_of(run)}", _details(run)) for run in data.runs.runs]
    return Section("Provenance", parts)


def _row(run: Mapping[str, Any]) -> list[html.Cell]:
    where = run.get("provenance") or {}
    commit = (where.get("git") or {}).get("commit") or "–"
    torch = (where.get("versions") or {}).get("torch", "–")
    started = str(run.get("started", "–")).partition("+")[0].replace("T", " ")
    named = (run.get("arm", "–"), machine_of(run), driver_of(run) or "–", torch, commit[:_COMMIT])
    return [started, str(run.get("status", "–")), *checked(run), *map(str, named)]


def checked(run: Mapping[str, Any]) -> list[html.Cell]:
    """The outcome of the check and its numbers, in the columns _CHECK."""
    found = run.get("verification") or {}
    engine = found.get("engine")
    if found.get("status") != PASSED or engine is None:  # a study of ops compares each variant by itself
        return [str(found.get("status", "missing")), *["–"] * (len(_CHECK) - 1)]
    return [
        f"passed over {found['positions']} tokens",
        f"{engine['kl']:.2e} ({found['bound_kl']:.2e})",
        f"{engine['nll_delta']:.2e} ({found['bound_nll_delta']:.2e})",
        f"{engine['greedy_agreement']:.1%}",
    ]


def _details(run: Mapping[str, Any]) -> str:
    rows: list[list[html.Cell]] = [[key, str(run.get(key, "–"))] for key in ("run_id", "started", "config_hash")]
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
