"""An export of Nsight Systems as a run that the report, the trace and the roofline read.

    scripts/nsys_profile.sh engine=nano model=qwen3-0.6b        # makes FILE
    python -m harness.nsys FILE [-o FOLDER] [--run RUN]

FILE is SQLite or a folder of parquet files, from `nsys export --type sqlite` or `parquetdir`. FOLDER (default: FILE's
name without its ending) becomes a run whose `layers` and `steps` have the source nsys. RUN is the folder of the run
that was profiled: its record says which engine, model and machine it was; without it, the run's NVTX range does.

Exit codes: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.base import InputError
from harness.nsys.export import Export
from harness.nsys.ranges import Ranges
from harness.nsys.steps import SOURCE, Reading, read
from harness.results import RunWriter, load

OK, BAD_INPUT = 0, 2
LOWEST_ATTRIBUTED = 0.98
"""A smaller share of kernel time with an op is told as a doubt."""
_TOLD = ("engine", "contestant", "model", "workload", "device", "dtype", "arm", "config", "config_hash", "provenance",
         "weights", "verification", "ceilings")  # fmt: skip
"""What the profiled run's record says of this one too."""


def record_of(export: Export, run: str | None) -> dict[str, Any]:
    """Who ran, from the record of `run`, else from the NVTX range around it. InputError: neither says it."""
    if run:
        runs = load(run).runs
        if len(runs) != 1:
            raise InputError(f"{run} holds {len(runs)} runs; name the folder of the one that was profiled.")
        return {name: runs[0][name] for name in _TOLD if name in runs[0]}
    found = Ranges(export).run
    if found is None:
        raise InputError(f"{export.path} does not say which engine ran; name its run by --run.")
    return {**dict(zip(("engine", "model", "workload"), found, strict=True)), "device": "cuda", "arm": "unknown"}


def shapes_of(reading: Reading) -> list[dict[str, Any]]:
    """The shapes in the rows, as `run.json` has them; none was timed without a tool."""
    keys = [(r["phase"], r["batch_size"], r["new_tokens"], r["context_len"]) for r in reading.steps]
    return [
        {"phase": phase, "batch_size": batch, "tokens": new // batch if phase == "prefill" else context,
         "timed": {"status": "profiled by Nsight Systems, not timed"}}
        for phase, batch, new, context in dict.fromkeys(keys)
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m harness.nsys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER")
    parser.add_argument("--run", metavar="RUN", help="folder of the run that was profiled")
    asked = parser.parse_args(arguments)
    folder = asked.output or asked.file.with_name(f"{asked.file.stem}-{SOURCE}")
    try:
        export = Export.read(asked.file)
        record = record_of(export, asked.run)
        reading = read(export, record["engine"], record.get("arm", "unknown"))
        writer = RunWriter(folder, f"{SOURCE}-{record['engine']}-{folder.name}")
        writer.add_layers(reading.layers)
        writer.add_steps(reading.steps)
        writer.flush()
        doubts = []
        if reading.attributed < LOWEST_ATTRIBUTED:
            doubts.append(
                f"Only {reading.attributed:.1%} of kernel time has a place in the model: graphs that were captured "
                "before profiling began, or work outside of the model's ranges."
            )
        kept = {"status": "ok", "contestant": True, **record, "shapes": shapes_of(reading), "failures": []}
        writer.write_run({**kept, "nsys": {"attributed": reading.attributed}, "warnings": doubts})
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    for doubt in doubts:
        print(f"Note: {doubt}")
    counts = f"{len(reading.steps)} steps, {len(reading.layers)} rows of layers"
    print(f"{counts}, {reading.attributed:.1%} of kernel time in ops.\nResults: {folder}")
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
