"""`python -m harness.ops op=rms_norm_linear model=qwen3-0.6b`: one op by itself, every variant, over numbers of rows.

    op=NAME              a file of conf/op
    model=NAME           whose shapes: a name of conf/model, several with commas between, or all
    rows=[1,16,...]      numbers of rows (default: the op's)
    variants=[A,B,...]   which ones (default: the op's; what is not installed is left out)
    dtype=auto device=auto seed=0 results=results
    precision=0.01 min_iterations=20 max_iterations=200 max_seconds_per_shape=2.0   when a shape is known well enough
    into=FOLDER          where it goes (default: a folder of results)

Each variant's output is compared with float32 first; one that is wrong has a reason instead of a time. Samples go to
ops.parquet, the rest to run.json.

Exit codes: 0 done, 1 a variant failed somewhere (the others' rows are there), 2 what was asked for cannot be done,
130 stopped, with what was measured kept.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

from engines.base import InputError
from harness.ops.settings import op_conf, parse
from harness.ops.study import Study
from harness.summary import print_summary

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run(arguments: list[str]) -> int:
    """Parse, measure, print; returns the exit code. InputError: it cannot be done."""
    settings = parse(arguments)
    name = f"{datetime.now():%Y-%m-%d/%H-%M-%S}-ops-{settings.op}-{settings.model}"
    folder = Path(settings.into or f"{settings.results}/{name}")
    record = Study(settings, op_conf(settings), folder).run()
    print_summary(folder)
    print(f"Results: {folder}")
    return FAILED if record["failures"] else OK


def main() -> int:
    """The command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return OK if arguments else BAD_INPUT
    try:
        return run(arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
