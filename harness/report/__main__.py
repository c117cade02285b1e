"""Runs as one HTML page.

    python -m harness.report RUN_OR_FOLDER... -o report.html

Each path is a run, a comparison, or a folder with some of them below it. Beside the page, its plots come as SVG and PNG
into a folder named after it (report_plots). The page needs no other file, and follows the reader's light or dark mode.

Exit codes: 0 done, 1 the report failed, 2 what was asked for cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.base import InputError
from harness.report.page import ReportFailed, write
from harness.results import load

OK, FAILED, BAD_INPUT = 0, 1, 2


def plots_folder(target: Path) -> Path:
    """Where the plots of the page `target` go."""
    return target.with_name(f"{target.stem}_plots")


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m harness.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--read", type=float, metavar="TB/S", help="for the roofline: bytes that the device reads")
    parser.add_argument("--matrix", type=float, metavar="TFLOP/S", help="for the roofline: its matrix products")
    asked = parser.parse_args(arguments)
    if (asked.read is None) != (asked.matrix is None):
        parser.error("--read and --matrix belong together")
    target = asked.output.resolve()
    try:
        load(*asked.runs)  # what cannot be read is told at once
        folders = [str(Path(run).resolve()) for run in asked.runs]
        parameters = {"folders": folders, "plots": str(plots_folder(target)), "read_tb_s": asked.read,
                      "matrix_tflop_s": asked.matrix}  # fmt: skip
        write(parameters, target)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except ReportFailed as error:
        print(f"The report failed: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{target} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return BAD_INPUT
    print(f"Report: {asked.output}\nPlots: {plots_folder(asked.output)}")
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
