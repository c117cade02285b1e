"""`python -m harness.compare engines=[vllm,nano,fused] workload=tpot`: engines side by side on one GPU.

An engine may have options and limits of its own, as in `vllm:serve_arm=inproc_async:limits.kv_cache_tokens=200000` or
`fused:features=[-head]`.
Engines with a given cache size start together; the others, which look at what is free, one by one. Beside what
`python -m harness` takes:

    engines=[A,B,...]   who takes part, in this order
    baseline=A          whom ratios refer to (default: the first)
    rounds=8            blocks of each engine and item in a launch (half as many of a whole served workload)
    launches=3          how often all engines are started anew; from 3 on, intervals hold what differs between starts
    into=FOLDER         where it goes (default: a folder of results/compare named after the settings); what is finished
                        there is not measured again

Exit codes: 0 done, 1 an engine failed (the others' rows are there), 2 what was asked for cannot be done, 130 and 143
stopped.
"""

from __future__ import annotations

import hashlib
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from engines.base import InputError
from harness.compare.comparison import Comparison
from harness.compare.contestants import contestants
from harness.compare.table import print_table

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_PLAIN_WIDTH = 200


@dataclass
class Settings:
    """What the command line says of the comparison itself."""

    engines: list[str] = field(default_factory=list)
    baseline: str = ""
    rounds: int = 8
    launches: int = 3
    into: str = ""


def parse(arguments: list[str]) -> tuple[Settings, list[str]]:
    """The comparison's own settings, and the overrides left for Hydra. InputError: a value that does not fit."""
    own = [a for a in arguments if a.partition("=")[0] in asdict(Settings())]
    engines = [a.partition("=")[2] for a in own if a.startswith("engines=[")]
    rest = [a for a in own if not a.startswith("engines=[")]
    named = {"engines": entries(engines[-1])} if engines else {}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(rest), named)
        settings: Settings = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(
            f"{error.full_key or 'the command line'}: {str(error.msg or error).splitlines()[0]}."
        ) from error
    if min(settings.rounds, settings.launches) < 1:
        raise InputError("rounds and launches must be at least 1.")
    return settings, [a for a in arguments if a not in own]


def entries(text: str) -> list[str]:
    """Those of a list like `[nano,fused:features=[head,residual]]`, quoted or not: YAML takes no list inside a word.

    InputError: its brackets do not match.
    """
    found, depth = [""], 0
    for letter in text.removeprefix("[").removesuffix("]"):
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    if depth or not text.endswith("]"):
        raise InputError(f"The brackets in engines={text} do not match.")
    return [entry.strip().strip("'\"") for entry in found if entry.strip()]


def run(arguments: list[str]) -> int:
    """Parse, compare, print; returns the exit code. InputError: it cannot be done."""
    settings, overrides = parse(arguments)
    taking_part = contestants(settings.engines, overrides)
    digest = hashlib.sha256(repr((settings.engines, settings.rounds, sorted(overrides))).encode()).hexdigest()[:8]
    workload = taking_part[0].config.workload.name
    folder = Path(settings.into or f"{taking_part[0].config.results}/compare/{workload}-{digest}")
    baseline = settings.baseline or settings.engines[0]
    comparison = Comparison(taking_part, baseline, settings.rounds, settings.launches, folder)
    found = comparison.run()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    print_table(found, comparison.labels, baseline, console)
    for label, reason in comparison.reasons.items():
        print(f"{label} failed: {reason}", file=sys.stderr)
    print(f"Results: {folder}")
    return FAILED if comparison.reasons else OK


def main() -> int:
    """The command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return OK if arguments else BAD_INPUT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that the engines' processes end, too
    try:
        return run(arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("Stopped. A second start with the same settings goes on with the launches that are not finished.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
