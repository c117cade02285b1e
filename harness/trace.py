"""Traced steps as a file that ui.perfetto.dev and chrome://tracing open.

    python -m harness.trace RUN_OR_FOLDER... [-o trace.json]

Each run and shape is a process with one representative step: the traced one whose time is nearest to the median. Its
first track holds the decoder layers with their ops inside, and what lies outside of the layers; what is empty is a gap,
but an op of several kernels is one slice, with the gaps between them behind it.
Where the host's phases were timed, a second track holds them, end to end in the order in which they come, since they
are times without starts from a pass of their own.

Slices last as long as the tables say. Where kernels overlap, a slice begins where the one before it ends, which is how
its time was counted; `args.start_us` has its kernels' own start.

Exit codes: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from engines.base import HOST_PHASES, NO_LAYER, WHOLE_LAYER, InputError
from harness.report.data import Data, Entry, Setting, Shape
from harness.report.traces import Trace, best_trace

OK, BAD_INPUT = 0, 2
GPU_TRACK, HOST_TRACK = 1, 2
_HOST_ORDER = (*HOST_PHASES, "rest")


def events(data: Data) -> list[dict[str, Any]]:
    """Chrome trace events (`ts` and `dur` in us) of all runs. Where the best trace has no ops, the best that has them
    follows as a process of its own."""
    found: list[dict[str, Any]] = []
    process = 0
    for setting in data.settings:
        for entry in setting.entries:
            for shape in setting.shapes:
                best, split = (best_trace(data, entry, shape, with_ops) for with_ops in (False, True))
                for trace in dict.fromkeys(map(_Same, filter(None, (best, split)))):
                    process += 1
                    found += _process(data, setting, entry, shape, trace.of, process)
    return found


class _Same:
    """A trace that equals another of the same source and mode."""

    def __init__(self, of: Trace) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and str(self.of) == str(other.of)

    def __hash__(self) -> int:
        return hash(str(self.of))


def representative(trace: Trace) -> int:
    """The iteration whose time on the GPU, or wall time without one, is nearest to the median; the first of several."""
    steps = trace.steps.set_index("iteration")
    times = steps["wall_us"] if steps["gpu_us"].isna().all() else steps["gpu_us"]
    return int((times - times.median()).abs().idxmin())


def _process(
    data: Data, setting: Setting, entry: Entry, shape: Shape, trace: Trace, process: int
) -> Iterator[dict[str, Any]]:
    yield from _named(process, f"{entry.label}: {shape}, {setting.model} ({trace})")
    iteration = representative(trace)
    rows = trace.layers[trace.layers["iteration"] == iteration]
    yield _metadata("thread_name", process, GPU_TRACK, name="host" if trace.source == "host" else "GPU")
    yield from _slices(rows, process)
    host = data.rows("host", entry, shape)
    if len(host):
        yield _metadata("thread_name", process, HOST_TRACK, name="host phases (order as in a step, starts not known)")
        yield from _phases(host, process)


def _slices(rows: pd.DataFrame, process: int) -> Iterator[dict[str, Any]]:
    """A layer, then its ops inside it; each begins no earlier than what stands before it on its level ends."""
    ordered = rows.assign(outer=rows["op"] != WHOLE_LAYER).sort_values(["start_us", "outer"], kind="stable")
    outside_us, inside_us, ends = 0.0, 0.0, float("inf")
    layers = {row.layer_index: row for row in ordered.itertuples() if row.op == WHOLE_LAYER}
    done: set[int] = set()
    for row in ordered.itertuples():
        layer = row.layer_index
        if layer == NO_LAYER:
            begin = max(row.start_us, outside_us)
            outside_us = begin + row.latency_us
            yield _slice(row, row.op, begin, row.latency_us, process)
            continue
        if layer not in done and layer in layers:
            done.add(layer)
            whole = layers[layer]
            begin = max(whole.start_us, outside_us)
            outside_us = ends = begin + whole.latency_us
            inside_us = begin
            yield _slice(whole, f"layer {layer}", begin, whole.latency_us, process)
        if row.op != WHOLE_LAYER:
            begin = max(row.start_us, inside_us)
            inside_us = min(begin + row.latency_us, ends)  # rounding may add some ns
            yield _slice(row, row.op, begin, inside_us - begin, process)


def _slice(row: Any, name: str, begin_us: float, duration_us: float, process: int) -> dict[str, Any]:
    told = {"layer": row.layer_index, "block": row.block, "start_us": row.start_us, "latency_us": row.latency_us}
    kernels = {"kernels": row.kernels} if row.kernels else {}
    place = {"pid": process, "tid": GPU_TRACK, "ts": begin_us, "dur": duration_us}
    return {"ph": "X", "name": name, "cat": row.block, **place, "args": {**told, **kernels}}


def _phases(host: pd.DataFrame, process: int) -> Iterator[dict[str, Any]]:
    """The phases of the step whose host time is nearest to the median. Viewers nest a phase without time."""
    wide = host.pivot_table(index="iteration", columns="host_phase", values="latency_us", aggfunc="sum")
    sums = wide.sum(axis=1)
    step = wide.loc[(sums - sums.median()).abs().idxmin()]
    begin_us = 0.0
    for phase in [name for name in _HOST_ORDER if step.get(name, 0.0) > 0]:
        place = {"pid": process, "tid": HOST_TRACK, "ts": begin_us, "dur": float(step[phase])}
        yield {"ph": "X", "name": phase, "cat": "host", **place, "args": {}}
        begin_us += float(step[phase])


def _named(process: int, name: str) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", process, 0, name=name)
    yield _metadata("process_sort_index", process, 0, sort_index=process)


def _metadata(kind: str, process: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "ts": 0, "args": args}


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m harness.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"), help="default: %(default)s")
    asked = parser.parse_args(arguments)
    try:
        data = Data.read(*asked.runs)
        found = events(data)
        if not found:
            raise InputError(f"{', '.join(asked.runs)}: no step was traced.")
        names = ("engine", "arm", "model", "workload", "dtype", "started")
        runs = {run["run_id"]: {name: run.get(name) for name in names} for run in data.runs.runs}
        asked.output.write_text(
            json.dumps({"displayTimeUnit": "ns", "otherData": {"runs": runs}, "traceEvents": found})
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"{asked.output} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return BAD_INPUT
    print(f"{asked.output}: open it at https://ui.perfetto.dev")
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
