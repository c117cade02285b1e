"""What became of the runs of one command, also where they ran in other processes or on other machines.

Each run of a sweep leaves its outcome as a file in the sweep's folder; the process that started the sweep collects them
at the end. So an outcome is known however a launcher runs its jobs, and a run whose process died has none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
FOLDER = ".outcomes"
"""In a sweep's folder, while the sweep runs."""
LOST = "no word from it: it did not start, was cancelled, or still runs"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended: an exit code, and for one that failed the reason. `number` is its place in the sweep."""

    number: int
    name: str
    code: int
    reason: str = ""

    def leave(self, sweep_dir: Path) -> None:
        """Write it for the process that started the sweep."""
        folder = sweep_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        temp = folder / f".{self.number}"
        temp.write_text(json.dumps(asdict(self)))
        os.replace(temp, folder / f"{self.number}.json")


def collect(sweep_dir: Path, names: Sequence[str]) -> list[Outcome]:
    """The outcomes of a sweep of runs called `names`, whose files go away.

    A run without one counts as failed, unless the sweep was interrupted: then it did not start.
    """
    folder = sweep_dir / FOLDER
    told = [Outcome(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    shutil.rmtree(folder, ignore_errors=True)
    if all(outcome.code != INTERRUPTED for outcome in told):
        silent = set(range(len(names))) - {outcome.number for outcome in told}
        told += [Outcome(number, names[number], FAILED, LOST) for number in silent]
    return sorted(told, key=lambda outcome: outcome.number)


@dataclass
class Session:
    """The outcomes of one command as far as this process knows them, and its exit code."""

    outcomes: list[Outcome] = field(default_factory=list)
    sweep_dir: Path | None = None
    results: Path = Path("results")

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.code in (FAILED, BAD_INPUT)]

    @property
    def exit_code(self) -> int:
        """The code of all runs together."""
        codes = [outcome.code for outcome in self.outcomes]
        if INTERRUPTED in codes:
            return INTERRUPTED
        bad = [code for code in codes if code != OK]
        if len(bad) == len(codes) and set(bad) == {BAD_INPUT}:
            return BAD_INPUT
        return FAILED if bad else OK
