"""`python -m harness.regress BASELINE CANDIDATE`: whether a candidate is slower than a baseline.

Each is a folder with runs of `python -m harness` or comparisons of `python -m harness.compare`; several runs of the
same work are several launches, and three or more on each side are what makes small changes visible. "Slower" is in
time per unit of work, so a throughput that falls is slower too.

Exit codes: 0 nothing is SLOWER, 1 something is, 2 the two cannot be compared (another device, model, dtype or schema, a
run that failed or was not verified, no row in common), 3 too much is UNSURE, or a row failed in the candidate only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from engines.base import InputError
from harness.regress import report
from harness.regress.sides import read
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Judgement, Verdict, judge
from harness.results import write_json

OK, SLOWER, NOT_COMPARABLE, TOO_UNSURE = 0, 1, 2, 3
_PLAIN_WIDTH = 200


def parser() -> argparse.ArgumentParser:
    """The command line; each threshold has an option of its name."""
    made = argparse.ArgumentParser(
        prog="python -m harness.regress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("baseline", type=Path)
    made.add_argument("candidate", type=Path)
    made.add_argument("--preset", choices=PRESETS, default="default")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--markdown", type=Path, metavar="FILE")
    for threshold in fields(Thresholds):
        values = ", ".join(f"{name} {getattr(preset, threshold.name):g}" for name, preset in PRESETS.items())
        kind = int if threshold.name.startswith("min_") and threshold.name != "min_effect" else float
        made.add_argument(_option(threshold.name), type=kind, metavar="N", help=values)
    return made


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def thresholds(arguments: argparse.Namespace) -> Thresholds:
    """The preset with what the command line changes. InputError: a value that no threshold can have."""
    given = {f.name: value for f in fields(Thresholds) if (value := getattr(arguments, f.name)) is not None}
    return replace(PRESETS[arguments.preset], **given)


def exit_code(judgement: Judgement) -> int:
    """What is SLOWER weighs more than what is UNSURE."""
    if judgement.counts[Verdict.SLOWER]:
        return SLOWER
    return TOO_UNSURE if judgement.too_unsure else OK


def run(arguments: argparse.Namespace) -> int:
    """Read, judge, print and write. InputError: the two cannot be compared."""
    baseline, candidate = read(arguments.baseline, arguments.candidate)
    judgement = judge(baseline, candidate, thresholds(arguments))
    said, code = report.notes(judgement, baseline, candidate), exit_code(judgement)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    report.print_judgement(judgement, said, console)
    _write(arguments, report.record(judgement, said, code), report.markdown(judgement, said, code))
    return code


def _write(arguments: argparse.Namespace, record: dict[str, object], text: str) -> None:
    path = None
    try:
        if path := arguments.json:
            write_json(path, record)
        if path := arguments.markdown:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parsed = parser().parse_args(arguments)
    try:
        return run(parsed)
    except InputError as error:
        print(error, file=sys.stderr)
        try:
            refused: dict[str, object] = {"exit_code": NOT_COMPARABLE, "error": str(error)}
            _write(parsed, refused, report.refusal(str(error)))
        except InputError as unwritten:
            print(unwritten, file=sys.stderr)
        return NOT_COMPARABLE


if __name__ == "__main__":
    sys.exit(main())
