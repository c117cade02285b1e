"""GPU kernels of steps that run exactly as they are timed, by CUPTI through `torch.profiler`, each laid to its site.

Nothing is attached to the engine, and no event is added to its graphs: what is seen is a graph's kernels themselves,
which all carry the number of the call that launched the graph. Which layer and op a kernel belongs to is told by its
place (`harness.attribution`). What it costs is time on the host: launching a graph takes longer while it is watched.

Kernels may overlap: with dependent launches one starts while the one before it runs, and waits. Each instant belongs to
the kernel that started first, so a kernel's time is what it adds to the step: from its start, or from where all before
it have ended, to its end. Waiting is no work; times of ops add up to the time in which the GPU was busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from engines.base import NO_LAYER, WHOLE_LAYER, Site, StepKind, TraceUnsupported
from harness.attribution import NotDivisible, attribute, first_difference, is_copy
from harness.instruments.probe import Interval, StepTrace

_SOURCE = "cupti"
_MARK = "cudaDeviceSynchronize"
"""Twice in a row marks where a step starts or ends: no engine waits for the device twice."""
_MAX_NAME = 100
"""Characters of a kernel's name in the tables; the arguments of a C++ template may take thousands."""
_US_PER_NS = 1e-3


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, copy or fill that ran on the GPU. `launch` numbers the host's call that started it."""

    name: str
    start_ns: int
    duration_ns: int
    launch: int

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns


@dataclass(frozen=True, slots=True)
class KernelSample:
    """What the kernels of one sample say.

    Of `trace`, `start_us` is the real start, counted from the first kernel's. An op's `latency_us` is what its kernels
    add to the step; a whole layer lasts from where the kernels before it ended, or from its first kernel's start if
    that is later, to its last one's end; `gpu_us` from first to last of all. `attributed` is the share of busy time
    that has a site; `gaps` that of `gpu_us` in which no kernel ran; `overlap` that of the kernels' durations which lies
    beside kernels that started before; `closure` what layers, ops and gaps outside them add up to, over `gpu_us`.
    """

    trace: StepTrace
    sequence: tuple[str, ...]  # names of the model's and the sampler's kernels: they must be the same in each sample
    attributed: float
    gaps: float
    overlap: float
    closure: float
    kernels: int
    launches: int


class _Share(NamedTuple):
    """A kernel's part of the step: `idle_ns` in which nothing ran, then `own_ns` in which no kernel before it did."""

    kernel: Kernel
    site: Site | None
    idle_ns: int
    own_ns: int


def read(steps: Sequence[Sequence[Kernel]], num_layers: int, qk_norm: bool, mode: str) -> KernelSample:
    """A sample from the kernels of its engine steps (more than one if a prefill was cut), each in order of start.

    TraceUnsupported: a step's kernels do not fall into `num_layers` layers.
    """
    kernels, sites = [k for step in steps for k in step], []
    if not kernels:
        raise TraceUnsupported("CUPTI saw no kernel in this step; an engine in a process of its own cannot be watched.")
    for step in steps:
        try:
            sites += attribute([k.name for k in step], num_layers, qk_norm)
        except NotDivisible as reason:
            raise TraceUnsupported(f"The kernels cannot be laid to layers: {reason}") from None
    shares = list(_shares(kernels, sites))
    busy_ns, idle_ns = sum(s.own_ns for s in shares), sum(s.idle_ns for s in shares)
    span_ns = busy_ns + idle_ns
    intervals: list[Interval] = []
    gaps_ns = 0
    for layer, run in groupby(shares, key=lambda share: NO_LAYER if share.site is None else share.site.layer_index):
        inside = list(run)
        intervals += _intervals(layer, inside, kernels[0].start_ns)
        gaps_ns += sum(s.idle_ns for s in (inside if layer == NO_LAYER else inside[:1]))
    parts_us = sum(i.latency_us for i in intervals if i.op == WHOLE_LAYER or i.layer_index == NO_LAYER)
    return KernelSample(
        trace=StepTrace(intervals, gpu_us=span_ns * _US_PER_NS, mode=mode, source=_SOURCE),
        sequence=tuple(
            s.kernel.name for s in shares if not is_copy(s.kernel.name) and (s.site is None or s.site.block != "step")
        ),
        attributed=sum(s.own_ns for s in shares if s.site is not None) / busy_ns,
        gaps=idle_ns / span_ns,
        overlap=1 - busy_ns / sum(k.duration_ns for k in kernels),
        closure=(parts_us + gaps_ns * _US_PER_NS) / (span_ns * _US_PER_NS),
        kernels=sum(not is_copy(k.name) for k in kernels),
        launches=len({k.launch for k in kernels}),
    )


def _shares(kernels: Sequence[Kernel], sites: Sequence[Site | None]) -> Iterator[_Share]:
    reached_ns = kernels[0].start_ns
    for kernel, site in zip(kernels, sites, strict=True):
        begin_ns = max(kernel.start_ns, reached_ns)
        yield _Share(kernel, site, begin_ns - reached_ns, max(0, kernel.end_ns - begin_ns))
        reached_ns = max(reached_ns, kernel.end_ns)


def _intervals(layer: int, shares: Sequence[_Share], origin_ns: int) -> Iterator[Interval]:
    """Ops in order, a layer before its ops; neighbouring kernels of one op are one interval."""
    if layer != NO_LAYER:
        whole_ns = sum(s.own_ns + s.idle_ns for s in shares) - shares[0].idle_ns
        yield _interval(Site(layer, WHOLE_LAYER, WHOLE_LAYER), [s.kernel for s in shares], whole_ns, origin_ns)
    for site, run in groupby(shares, key=lambda share: share.site):
        if site is not None:
            of_site = list(run)
            yield _interval(site, [s.kernel for s in of_site], sum(s.own_ns for s in of_site), origin_ns)


def _interval(site: Site, kernels: Sequence[Kernel], latency_ns: int, origin_ns: int) -> Interval:
    names = "" if site.op == WHOLE_LAYER else "; ".join(_short(k.name) for k in kernels)
    start_us = (kernels[0].start_ns - origin_ns) * _US_PER_NS
    return Interval(site.layer_index, site.block, site.op, start_us, latency_ns * _US_PER_NS, names)


def _short(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def disagreeing(sequences: Sequence[Sequence[str]]) -> dict[int, str]:
    """Which samples ran other kernels than most did, each with the sentence that says where."""
    if not sequences:
        return {}
    (usual, _), *_ = Counter(map(tuple, sequences)).most_common(1)
    found = {}
    for i, sequence in enumerate(sequences):
        if tuple(sequence) != usual:
            at, one, other = first_difference(sequence, usual)
            found[i] = f"Kernel {at} of sample {i} is {_short(one)}, in most samples {_short(other)}."
    return found


def steps_of(kernels: Iterable[Kernel], calls: Iterable[tuple[int, str]]) -> list[list[Kernel]]:
    """The kernels of each marked step, in order of start, from all (number, name) of the host's calls."""
    marks, in_a_row = [], 0
    for number, name in sorted(calls):
        in_a_row = in_a_row + 1 if name == _MARK else 0
        if in_a_row and in_a_row % 2 == 0:
            marks.append(number)
    ordered = sorted(kernels, key=lambda k: (k.start_ns, k.end_ns))
    bounds = zip(marks[::2], marks[1::2], strict=False)
    return [[k for k in ordered if start < k.launch < end] for start, end in bounds]


def _profiler() -> AbstractContextManager[Any]:
    return profile(activities=[ProfilerActivity.CUDA], acc_events=True)


class KernelProbe:
    """Marks the steps of `ShapeSteps` and, after a `window`, gives their kernels. TraceUnsupported: no CUPTI here."""

    def __init__(
        self,
        *,
        profiler: Callable[[], AbstractContextManager[Any]] = _profiler,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
        activities: Callable[[], Iterable[ProfilerActivity]] = supported_activities,
    ) -> None:
        if ProfilerActivity.CUDA not in activities():
            raise TraceUnsupported("Kernels are seen on a GPU only, by a torch with CUPTI.")
        self._profiler = profiler
        self._synchronize = synchronize
        self.marked = 0
        """Steps since the window was opened."""
        self.steps: list[list[Kernel]] = []
        """Kernels of each step of the last window."""

    @contextmanager
    def window(self) -> Iterator[None]:
        """Kernels of steps inside are recorded. TraceUnsupported: CUPTI did not show every step."""
        self.marked, self.steps = 0, []
        with self._profiler() as recorded:
            yield
            self._synchronize()
        kernels, calls = [], []
        for event in recorded.events():
            if event.is_user_annotation:  # a range on the GPU's time line
                continue
            if event.device_type == DeviceType.CUDA:
                start_ns, end_ns = (round(us * 1e3) for us in (event.time_range.start, event.time_range.end))
                kernels.append(Kernel(event.name, start_ns, end_ns - start_ns, event.id))
            else:
                calls.append((event.id, event.name))
        self.steps = steps_of(kernels, calls)[: self.marked]
        if len(self.steps) < self.marked or not any(self.steps):
            seen = sum(map(bool, self.steps))
            raise TraceUnsupported(
                f"CUPTI showed kernels in {seen} of {self.marked} steps; another profiler, or an engine in a process "
                "of its own, keeps them from it."
            )

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        self._mark()

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        """Kernels are known when the window is closed, so the trace is empty."""
        self._mark()
        self.marked += 1
        return StepTrace([])

    def wants(self, site: Site) -> bool:
        return False

    def begin(self, site: Site, rows: int) -> None:
        """Never called: no site is wanted."""

    def end(self, site: Site) -> None:
        """Never called: no site is wanted."""

    def _mark(self) -> None:
        self._synchronize()
        self._synchronize()
