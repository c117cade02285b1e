"""Kernels of an export in the steps, layers and ops that launched them, and rows of `layers` and `steps` from those.

A kernel belongs to the step in whose range its launch was called. Its layer and op are those of the ranges that were
open then; of a kernel in a CUDA graph, those that were open when its node was captured, since a replay runs none of the
model's Python. Graphs are instantiated from what was captured, so a node may have to be followed to its original
(`CUDA_GRAPH_NODE_EVENTS`); nodes that were captured before profiling began have no place.

Times are counted as those of CUPTI in `instruments.kernels` are: each instant belongs to the kernel that started first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from engines.base import NO_LAYER, WHOLE_LAYER, InputError, Site
from harness.nsys.export import COPIES, FILLS, GRAPH_NODES, KERNELS, RUNTIME, Export
from harness.nsys.ranges import Ranges, StepRange

SOURCE = "nsys"
_US_PER_NS = 1e-3
_PROCESS = 1 << 24
"""What is above it in a serialized thread or process id tells the process."""
_KINDS = {KERNELS: "kernel", COPIES: "memcpy", FILLS: "memset"}
_MAX_NAME = 100
"""Characters of a kernel's name in the tables."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, copy or fill: what ran, when, and where it belongs."""

    name: str
    start_ns: int
    end_ns: int
    site: Site | None
    in_graph: bool


@dataclass
class TracedStep:
    """A step and its work, in order of start."""

    step: StepRange
    wall_ns: int
    work: list[Work]

    @property
    def mode(self) -> str:
        return "graph" if any(w.in_graph for w in self.work) else "eager"


@dataclass(frozen=True)
class Reading:
    """What an export says: rows without `run_id`, and the share of the steps' busy time that has an op."""

    layers: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    attributed: float


def traced_steps(export: Export, ranges: Ranges) -> list[TracedStep]:
    """Steps that launched something. InputError: the export has no steps of ours."""
    found = {id(step): TracedStep(step, wall_ns, []) for step, wall_ns in ranges.steps}
    if not found:
        raise InputError(f"{export.path} has no steps among its NVTX ranges (no range like 'decode b=1 t=1 c=128').")
    calls = {(int(thread) // _PROCESS, int(number)): (int(thread), int(start))
             for thread, number, start in _columns(export[RUNTIME], "globalTid", "correlationId", "start")}  # fmt: skip
    captured = _captured(export[GRAPH_NODES])
    for table, kind in _KINDS.items():
        frame = export[table]
        names = export.texts(frame["demangledName"]).fillna(export.texts(frame["shortName"])).fillna(kind)
        keys = ("start", "end", "globalPid", "correlationId", "graphNodeId")
        for (start, end, process, number, node), name in zip(_columns(frame, *keys), names, strict=True):
            call = calls.get((int(process) // _PROCESS, int(number)))
            if call is None:
                continue
            step, site = ranges.at(*call)
            if step is None:
                continue
            if in_graph := not pd.isna(node):
                where = captured.get(int(node))
                site = ranges.at(*where)[1] if where else None
            found[id(step)].work.append(Work(_short(str(name)), int(start), int(end), site, in_graph))
    for traced in found.values():
        traced.work.sort(key=lambda w: (w.start_ns, w.end_ns))
    return [traced for traced in found.values() if traced.work]


def read(export: Export, engine: str, arm: str) -> Reading:
    """Rows of `layers` and `steps` with source `nsys`. InputError: nothing of ours is in the export."""
    steps = traced_steps(export, Ranges(export))
    if not steps:
        raise InputError(f"{export.path}: no kernel was launched in a step's range; profile the traced passes.")
    layers, rows, numbers = [], [], Counter[tuple]()
    placed_ns = busy_ns = 0
    for traced in steps:
        step = traced.step
        shape = {"phase": step.phase, "batch_size": step.batch_size, "new_tokens": step.new_tokens,
                 "context_len": step.context_len, "mode": traced.mode, "source": SOURCE}  # fmt: skip
        group = tuple(shape.values())
        key = {"engine": engine, "arm": arm, **shape, "iteration": numbers[group]}
        numbers[group] += 1
        shares = list(_shares(traced.work))
        busy_ns += sum(share.own_ns for share in shares)
        placed_ns += sum(share.own_ns for share in shares if share.work.site and share.work.site.op != WHOLE_LAYER)
        gpu_us = sum(share.idle_ns + share.own_ns for share in shares) * _US_PER_NS
        wall_us = traced.wall_ns * _US_PER_NS
        times = {"wall_us": wall_us, "gpu_us": gpu_us, "host_us": max(0.0, wall_us - gpu_us)}
        rows.append({**key, **times, "instrumented": True, "status": "ok"})
        layers += [{**key, **interval} for interval in _intervals(shares)]
    return Reading(layers, rows, placed_ns / busy_ns if busy_ns else 0.0)


@dataclass(frozen=True, slots=True)
class _Share:
    """`idle_ns` in which nothing ran, then `own_ns` in which `work` did and nothing that started before it."""

    work: Work
    idle_ns: int
    own_ns: int


def _shares(work: Sequence[Work]) -> Iterator[_Share]:
    reached_ns = work[0].start_ns
    for one in work:
        begin_ns = max(one.start_ns, reached_ns)
        yield _Share(one, begin_ns - reached_ns, max(0, one.end_ns - begin_ns))
        reached_ns = max(reached_ns, one.end_ns)


def _intervals(shares: Sequence[_Share]) -> Iterator[dict[str, Any]]:
    """A layer before its ops; neighbouring kernels of one op are one row, those without an op in their layer only."""
    origin_ns = shares[0].work.start_ns
    for layer, run in groupby(shares, key=lambda s: s.work.site.layer_index if s.work.site else NO_LAYER):
        inside = list(run)
        if layer != NO_LAYER:
            whole_ns = sum(s.own_ns + s.idle_ns for s in inside) - inside[0].idle_ns
            yield _row(Site(layer, WHOLE_LAYER, WHOLE_LAYER), inside, whole_ns, origin_ns, "")
        for site, same in groupby(inside, key=lambda s: s.work.site):
            if site is not None and site.op != WHOLE_LAYER:
                of_site = list(same)
                names = "; ".join(s.work.name for s in of_site)
                yield _row(site, of_site, sum(s.own_ns for s in of_site), origin_ns, names)


def _row(site: Site, shares: Sequence[_Share], latency_ns: int, origin_ns: int, kernels: str) -> dict[str, Any]:
    start_us, latency_us = (shares[0].work.start_ns - origin_ns) * _US_PER_NS, latency_ns * _US_PER_NS
    place = {"layer_index": site.layer_index, "block": site.block, "op": site.op, "kernels": kernels}
    return {**place, "start_us": start_us, "latency_us": latency_us}


def _captured(nodes: pd.DataFrame) -> dict[int, tuple[int, int]]:
    """Thread and time of the capture of each graph node, its original's if it was made from one."""
    made: dict[int, tuple[int, int]] = {}
    originals: dict[int, int] = {}
    for node, original, thread, start in _columns(nodes, "graphNodeId", "originalGraphNodeId", "globalTid", "start"):
        made.setdefault(int(node), (int(thread), int(start)))
        if not pd.isna(original):
            originals[int(node)] = int(original)
    found = {}
    for node in made:
        last, seen = node, {node}
        while (before := originals.get(last)) is not None and before not in seen:
            last = before
            seen.add(last)
        if last in made:
            found[node] = made[last]
    return found


def _columns(frame: pd.DataFrame, *names: str) -> Iterator[tuple]:
    return frame[list(names)].itertuples(index=False, name=None)


def _short(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
