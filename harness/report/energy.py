"""Energy per token, where a run has measured it."""

from __future__ import annotations

from harness.report import html
from harness.report.data import Data
from harness.report.html import Section

KEY, VALUE = "energy", "j_per_token"
"""Where a shape's record in `run.json` has it, and the key of the number."""


def section(data: Data) -> Section | None:
    """A table for each setting with such measurements; None without any."""
    parts = []
    for setting in data.settings:
        rows: list[list[html.Cell]] = []
        for shape in setting.shapes:
            found = [entry.pass_of(shape, KEY).get(VALUE) for entry in setting.entries]
            if any(value is not None for value in found):
                rows.append([str(shape), *("–" if value is None else html.number(value) for value in found)])
        if rows:
            labels = [entry.label for entry in setting.entries]
            parts += [html.heading(f"{setting}: J per token"), html.table(["", *labels], rows)]
    return Section("Energy", parts) if parts else None
