"""Energy per token, where a run has measured it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report import html
from harness.report.data import Data
from harness.report.html import Section

KEY, VALUE = "energy", "j_per_token"
"""Where a shape's record in `run.json` has it, and the key of the number."""
_CAPTION = (
    "The whole GPU's energy over a loop of steps, less what it takes idle. Of decode in brackets: the share of the "
    "loop's energy that its prompts and first steps took, which is subtracted; where it is large, the rest is known "
    "less well."
)


def section(data: Data) -> Section | None:
    """A table for each setting with such measurements; None without any."""
    parts = []
    for setting in data.settings:
        rows: list[list[html.Cell]] = []
        for shape in setting.shapes:
            found = [entry.pass_of(shape, KEY) for entry in setting.entries]
            if any(found):
                rows.append([f"{shape}, mJ per token", *map(_cell, found)])
        if rows:
            labels = [entry.label for entry in setting.entries]
            parts += [html.heading(str(setting)), html.table(["", *labels], rows)]
    return Section("Energy", [*parts, html.paragraph(_CAPTION)]) if parts else None


def _cell(record: Mapping[str, Any]) -> str:
    if VALUE not in record:
        return str(record.get("status", "–"))
    share = record.get("subtracted_share") or 0
    return html.number(1e3 * record[VALUE]) + (f" ({share:.0%})" if share else "")
