"""What the hardware allows, and how much of it runs achieve.

    python -m harness.roofline                      # measure this machine's ceilings, or print those kept
    python -m harness.roofline RUN_FOLDER...        # each op's bytes, operations, floor and achieved fraction

Ceilings are measured once per device, driver and version of torch, and kept in the user's cache folder. A run is held
against those in its run.json, else those kept of its device, else those given by --read and --matrix.

Exit codes: 0 done, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from engines.base import InputError
from harness.results import load
from harness.roofline.ceilings import Ceilings, Key, cached, ceilings, from_record, given
from harness.roofline.table import lines, table

OK, BAD_INPUT = 0, 2
ABOVE = 1.1
ABOVE_CEILING = (
    "Some of it is faster than the ceiling: a cache held what it reads, or the ceiling was measured while the machine "
    "was busy; `python -m harness.roofline --again` measures it anew."
)
_PLAIN_WIDTH = 160


def ceilings_of(run: Mapping[str, Any]) -> Ceilings:
    """Those that a run was measured under. InputError: none are known."""
    if record := run.get("ceilings"):
        try:
            return from_record(record)
        except ValueError as error:
            raise InputError(f"{run['run_dir']}: its ceilings cannot be read: {error}.") from None
    key = Key.of(run["provenance"], run["device"])
    if (found := cached(key)) is None:
        raise InputError(
            f"No ceilings are kept of {key.device} (driver {key.driver or 'none'}, torch {key.torch}): run "
            f"`python -m harness.roofline --device {run['device']}` there, or give them by --read and --matrix."
        )
    return found


def print_runs(folders: Sequence[str], known: Ceilings | None, console: Console) -> None:
    """Print every shape of every run. InputError: one cannot be read, or nothing in it can be compared."""
    runs = load(*folders)
    for run in runs.runs:
        limit = known or ceilings_of(run)
        found = lines(runs, run, limit)
        console.print(f"{run['run_dir']}\n{limit}", markup=False, soft_wrap=True)
        if not found:
            console.print("This run has no steps of one shape.")
        for shape in found:
            console.print(table(shape, f"{run['engine']}, {run['model']}, {run['dtype']}"))
        if any(line.fraction > ABOVE for shape in found for line in shape.lines):
            console.print(ABOVE_CEILING, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m harness.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_FOLDER")
    parser.add_argument("--again", action="store_true", help="measure anew what is kept")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="whose ceilings to measure")
    parser.add_argument("--read", type=float, metavar="TB/S", help="bytes that the runs' device reads")
    parser.add_argument("--matrix", type=float, metavar="TFLOP/S", help="operations that it does in matrix products")
    asked = parser.parse_args(arguments)
    if (asked.read is None) != (asked.matrix is None):
        parser.error("--read and --matrix belong together")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    try:
        if asked.runs:
            known = None if asked.read is None else given(asked.read * 1e12, asked.matrix * 1e12)
            print_runs(asked.runs, known, console)
        else:
            found = ceilings(asked.device, asked.again)
            console.print(f"{found}\nmeasured {found.measured} by {found.ways}", markup=False, soft_wrap=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
