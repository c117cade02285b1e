"""A report, section by section: what the notebook calls, one cell each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from harness.report import (
    ablation,
    ceilings,
    doubts,
    energy,
    headline,
    latency,
    layers,
    ops,
    provenance,
    ratios,
    serving,
    steps,
    style,
)
from harness.report.data import UNKNOWN, Data, machine_of
from harness.report.html import Section
from harness.report.plots import Plots
from harness.roofline.ceilings import given


class Title:
    """The page's first lines."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def _repr_html_(self) -> str:
        runs = self._data.runs.runs
        names = [str(s) for s in self._data.settings] + [str(c) for c in self._data.comparisons]
        machines = ", ".join(sorted({machine_of(run) for run in runs} - {UNKNOWN})) or "an unknown machine"
        dates = sorted(str(run["started"])[:10] for run in runs if run.get("started"))
        when = f", {dates[0]}" + f" to {dates[-1]}" * (dates[0] != dates[-1]) if dates else ""
        count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
        items = "".join(f"<li>{escape(name)}</li>" for name in names)
        return f"<h1>Where inference time goes</h1><p>{escape(f'{count} on {machines}{when}.')}</p><ul>{items}</ul>"


class Report:
    """Runs and where their plots go. A section is None where there is nothing to show, and Jupyter shows nothing.

    `read_tb_s` and `matrix_tflop_s`, together, are ceilings for the roofline of runs that do not tell their own.
    InputError: a folder without runs, or a damaged file.
    """

    def __init__(
        self, folders: Sequence[str | Path], plots: str | Path, read_tb_s: float | None = None,
        matrix_tflop_s: float | None = None,
    ) -> None:  # fmt: skip
        style.use()
        self.data = Data.read(*folders)
        self.plots = Plots(Path(plots))
        self._ceilings = given(read_tb_s * 1e12, matrix_tflop_s * 1e12) if read_tb_s and matrix_tflop_s else None

    def title(self) -> Title:
        """What this is about."""
        return Title(self.data)

    def warnings(self) -> Section:
        """Everything that makes the numbers less believable."""
        return doubts.section(self.data)

    def headline(self) -> Section | None:
        """Medians, intervals, ratios."""
        return headline.section(self.data)

    def latency(self) -> Section | None:
        """Time per token over batch."""
        return latency.section(self.data, self.plots)

    def comparison(self) -> Section | None:
        """Ratios of engines that took turns."""
        return ratios.section(self.data, self.plots)

    def layers(self) -> Section | None:
        """Blocks of every layer, engines side by side."""
        return layers.section(self.data, self.plots)

    def heat(self) -> Section | None:
        """Layer by op."""
        return layers.heat_section(self.data, self.plots)

    def steps(self) -> Section | None:
        """Where the step goes."""
        return steps.section(self.data, self.plots)

    def roofline(self) -> Section | None:
        """Ops beside what the hardware allows."""
        return ceilings.section(self.data, self.plots, self._ceilings)

    def throughput(self) -> Section | None:
        """Requests that arrive all at once."""
        return serving.throughput_section(self.data, self.plots)

    def serving(self) -> Section | None:
        """Requests that arrive over time."""
        return serving.section(self.data, self.plots)

    def ops(self) -> Section | None:
        """Single ops over rows."""
        return ops.section(self.data, self.plots)

    def ablation(self) -> Section | None:
        """What each feature is worth."""
        return ablation.section(self.data, self.plots)

    def energy(self) -> Section | None:
        """Energy per token."""
        return energy.section(self.data)

    def provenance(self) -> Section:
        """Where the numbers come from."""
        return provenance.section(self.data)
