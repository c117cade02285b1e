"""What an instrument is (`Instrument`), what it sees of one step (`StepTrace`), and several of them as one (`Tee`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engines.base import Probe, Site, StepKind


@dataclass(frozen=True, slots=True)
class Interval:
    """Time that one site took in one step. `start_us` counts from the moment when the step was started.

    `kernels` names the GPU kernels that ran, joined with "; ", where the instrument knows them.
    """

    layer_index: int
    block: str
    op: str
    start_us: float
    latency_us: float
    kernels: str = ""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What an instrument saw of one step.

    `gpu_us` is the time on the GPU from the first site's start to the last site's end, None where nothing measured it.
    `mode` says how the step's sites ran (a prefill is eager even while decode steps replay graphs), `source` what
    timed them: the columns of the same names in `layers.parquet`. `phases_us` is what each phase of the host took, for
    an instrument that times these.
    """

    intervals: list[Interval]
    gpu_us: float | None = None
    mode: str = "eager"
    source: str = "host"
    phases_us: dict[str, float] | None = None


@runtime_checkable
class Instrument(Probe, Protocol):
    """A probe that is told where steps start and end, and gives what it saw of each."""

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        """A step of `batch` sequences and `tokens` new tokens starts; what a broken step left behind is dropped."""
        ...

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        """The step is over. `rows_bucket` is the padded batch of the graph that was replayed, where known."""
        ...


class Tee:
    """Several instruments told of everything; the trace is that of the first one that saw intervals."""

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        self.instruments = tuple(instruments)
        self._wanted: dict[Site, tuple[Instrument, ...]] = {}

    def wants(self, site: Site) -> bool:
        """Whether any instrument wants `site`; each is then told only of the sites that it wanted."""
        self._wanted[site] = tuple(i for i in self.instruments if i.wants(site))
        return bool(self._wanted[site])

    def begin(self, site: Site, rows: int) -> None:
        for instrument in self._wanted[site]:
            instrument.begin(site, rows)

    def end(self, site: Site) -> None:
        for instrument in reversed(self._wanted[site]):
            instrument.end(site)

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        for instrument in self.instruments:
            instrument.start_step(label, kind, batch, tokens)

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        traces = [i.finish_step(rows_bucket) for i in reversed(self.instruments)][::-1]
        return next((t for t in traces if t.intervals), traces[0] if traces else StepTrace([]))
