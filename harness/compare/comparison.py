"""The turns: launches of all contestants, ABBA rounds item by item, and the folder that holds the outcome."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from engines.base import InputError
from harness import machine, rounds
from harness.compare.contestants import Contestant
from harness.compare.table import Row, rows
from harness.compare.worker import Order, Worker
from harness.limits import Work, device_of
from harness.progress import Reporter
from harness.results import COMPARISON_FILE, load, write_json

T = TypeVar("T")
CONDITIONS = ("model", "workload", "weights", "dtype", "device", "seed", "verify")
"""Parts of the config that the contestants share."""


@dataclass
class Comparison:
    """A comparison in `folder`, of `launches` times `num_rounds` rounds, half as many of a served workload.

    Finished launches in the folder are not run again.
    """

    contestants: list[Contestant]
    baseline: str
    num_rounds: int
    launches: int
    folder: Path
    reporter: Reporter = field(default_factory=Reporter)

    def __post_init__(self) -> None:
        if self.baseline not in self.labels:
            raise InputError(f"baseline {self.baseline} is none of the engines: {', '.join(self.labels)}.")
        config = self.contestants[0].config
        self.items = rounds.items(Work.of(config, device_of(config.device)))
        self.reasons: dict[str, str] = {}
        self._started_s = time.perf_counter()

    @property
    def labels(self) -> list[str]:
        return [contestant.label for contestant in self.contestants]

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two comparisons the same one: what is asked for, the code that runs, and where it runs."""
        config = asdict(self.contestants[0].config)
        shared = {name: config[name] for name in CONDITIONS}
        options = {c.label: [asdict(c.config.engine), asdict(c.config.limits)] for c in self.contestants}
        where = machine.provenance()
        measured = {name: where[name] for name in ("versions", "git", "gpu")}
        return {
            "engines": self.labels, "baseline": self.baseline, "rounds": self.num_rounds, **shared,
            "contestants": options, "provenance": measured,
        }  # fmt: skip

    def run(self) -> list[Row]:
        """All launches that are not finished yet, then the rows of all of them. InputError: another one's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        for launch in range(self.launches):
            folder = self.folder / f"launch-{launch}"
            if (folder / COMPARISON_FILE).is_file():
                self.reporter.say(f"Launch {launch} is there already.")
                self.reasons |= json.loads((folder / COMPARISON_FILE).read_text())["reasons"]
                continue
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted start left
            self._launch(launch, folder)
        return self._finish()

    def _launch(self, launch: int, folder: Path) -> None:
        workers: list[Worker] = []
        try:
            for contestant in self.contestants:
                if contestant.waits:  # nobody else may start meanwhile
                    for earlier in workers:
                        earlier.wait_ready()
                self.reporter.say(f"Launch {launch}: starting {contestant.label}")
                worker = Worker(contestant.config, folder / contestant.folder, contestant.label)
                workers.append(worker)
                if contestant.waits:
                    worker.wait_ready()
            for worker in workers:
                if not worker.wait_ready():
                    self.reporter.say(f"{worker.label} is out: {worker.reason}")
            if all(worker.reason for worker in workers):
                raise InputError(f"No engine could be started; the first reason: {workers[0].reason}")
            with self.reporter.bar(f"launch {launch}", len(self.items)) as done:
                for index, item in enumerate(self.items):
                    self._turns(workers, launch, index)
                    done(str(item))
        except BaseException:
            for worker in workers:
                worker.end()
            raise
        for worker in workers:  # they write and free their memory at once
            worker.dismiss()
        for worker in workers:
            worker.close()
        self.reasons |= {worker.label: worker.reason for worker in workers if worker.reason}
        write_json(folder / COMPARISON_FILE, {"launch": launch, "reasons": self.reasons})

    def _turns(self, workers: Sequence[Worker], launch: int, index: int) -> None:
        """A warm-up each, then rounds in changing order."""
        fit = [w for w in workers if w.measure(self._order(index, launch, 0, warm_up=True)).kind == "done"]
        # A served workload takes seconds, and hundreds of requests in one block.
        for number in range(self.num_rounds if self.items[index].work else -(-self.num_rounds // 2)):
            for worker in turns(fit, number):
                worker.measure(self._order(index, launch, number))
        for worker in workers:
            if worker not in fit:  # once more, for a row that tells the reason
                worker.measure(self._order(index, launch, 0))

    def _order(self, index: int, launch: int, number: int, warm_up: bool = False) -> Order:
        return Order(index, launch, number, time.perf_counter() - self._started_s, warm_up)

    def _claim(self) -> None:
        """Make the folder this comparison's, or see that it is."""
        path = self.folder / COMPARISON_FILE
        settings = self.settings  # asks the machine, so once
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if path.is_file():
            if json.loads(path.read_text()).get("settings_hash") != digest:
                raise InputError(f"{self.folder} holds a comparison with other settings; choose another folder.")
            return
        write_json(path, {"settings_hash": digest, "settings": settings, "status": "running"})

    def _finish(self) -> list[Row]:
        path = self.folder / COMPARISON_FILE
        found = rows(load(self.folder), self.labels, self.baseline, self.reasons)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        record = json.loads(path.read_text()) | {"status": "ok", "finished": finished, "launches": self.launches}
        write_json(path, {**record, "reasons": self.reasons, "rows": [row.record() for row in found]})
        return found


def turns(workers: Sequence[T], number: int) -> list[T]:
    """The order of round `number`: A B C, C B A, B C A, A C B, C A B, B A C, ...

    Back and forth, a steady drift weighs on all alike; begun with another engine each time, each is first, last and
    between the others equally often.
    """
    start = number // 2 % len(workers) if workers else 0
    rotated = [*workers[start:], *workers[:start]]
    return rotated if number % 2 == 0 else rotated[::-1]


def read(folder: Path | str) -> tuple[dict[str, Any], list[Row]]:
    """A comparison's record and its rows, made anew from its runs. InputError: there is none."""
    path = Path(folder) / COMPARISON_FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no comparison (no {COMPARISON_FILE}).")
    record = json.loads(path.read_text())
    settings = record["settings"]
    return record, rows(load(folder), settings["engines"], settings["baseline"], record.get("reasons", {}))
