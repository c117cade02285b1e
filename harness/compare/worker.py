"""A contestant's process: one engine, verified, that measures a block whenever it is asked to.

The parent sees only messages: the process that measures must not be disturbed by whoever compares.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from engines.base import InputError
from harness.config import Config

if TYPE_CHECKING:
    from harness.runner import Session

LOG_FILE = "worker.log"
START_TIMEOUT_S, BLOCK_TIMEOUT_S, CLOSE_TIMEOUT_S = 1800.0, 900.0, 120.0
_LOG_TAIL = 2000
"""Characters of a dead worker's log that its reason keeps."""


@dataclass(frozen=True)
class Order:
    """Measure item number `item`; a `warm_up` leaves no row. `started_s` counts from the comparison's start."""

    item: int
    launch: int
    round: int
    started_s: float
    warm_up: bool = False


@dataclass(frozen=True)
class Answer:
    """`ready`, `done`, `failed` (this block has a reason, the engine goes on) or `dead` (it does not)."""

    kind: str
    text: str = ""


def main(link: Connection, config: Config, run_dir: Path) -> None:
    """The process: start the engine, answer orders until None comes, write the run.

    It leads a process group of its own, in which everything that the engine starts can be ended with it.
    """
    os.setsid()
    run_dir.mkdir(parents=True, exist_ok=True)
    log = os.open(run_dir / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    try:
        from harness.runner import Session

        session = Session(config, run_dir)
        with session.started():
            _obey(session, Order(0, 0, 0, 0.0, warm_up=True))  # whatever else has to start, starts now
            link.send(Answer("ready"))
            while (order := link.recv()) is not None:
                link.send(_obey(session, order))
        link.send(Answer("done"))
    except BaseException as error:
        traceback.print_exc()
        link.send(Answer("dead", str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None


def _obey(session: Session, order: Order) -> Answer:
    from harness.rounds import BlockFailed, items

    item, measured, requests = items(session.work)[order.item], session.measured, session.work.requests
    if order.warm_up:
        try:
            measured.blocks(requests).warm_up(item)
        except BlockFailed as error:
            return Answer("failed", str(error))
        return Answer("done")
    row = measured.block(item, order.launch, order.round, order.started_s, requests)
    measured.writer.flush()  # a process may end any time, and nobody is timing now
    return Answer("done") if row["status"] == "ok" else Answer("failed", row["status"])


class Worker:
    """The parent's end of a contestant's process. `reason` says why it is gone, "" while it works."""

    def __init__(self, config: Config, run_dir: Path, label: str) -> None:
        self.label = label
        self.reason = ""
        self._ready = self._dismissed = False
        self._run_dir = run_dir
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, config, run_dir))
        self._process.start()
        theirs.close()

    def wait_ready(self) -> bool:
        """Whether the engine started and its output was verified."""
        if not (self.reason or self._ready):
            self._ready = self._receive(START_TIMEOUT_S).kind == "ready"
        return self._ready

    def measure(self, order: Order) -> Answer:
        """Have one block measured; `dead` at once from a worker that is gone."""
        if self.reason:
            return Answer("dead", self.reason)
        try:
            self._link.send(order)
        except OSError:  # it ended while others had their turn
            return self._lost(self._died())
        return self._receive(BLOCK_TIMEOUT_S)

    def dismiss(self) -> None:
        """Tell the worker to write its run and end, without waiting for it."""
        if not (self.reason or self._dismissed):
            self._dismissed = True
            with suppress(OSError):  # `close` will find out
                self._link.send(None)

    def close(self) -> None:
        """Let the worker write its run and end; safe to call twice."""
        self.dismiss()
        if not self.reason:
            try:
                self._receive(CLOSE_TIMEOUT_S)
            except OSError as error:
                self.reason = str(error)
        self._process.join(CLOSE_TIMEOUT_S)
        self.end()

    def end(self) -> None:
        """End whatever is left of the process and of those it started; vLLM's own may outlive it and keep the GPU."""
        pid = self._process.pid
        assert pid is not None  # it was started
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.kill()  # it may not lead its group yet
        self._process.join()

    def _receive(self, timeout_s: float) -> Answer:
        deadline = time.monotonic() + timeout_s
        sources: Sequence[object] = (self._link, self._process.sentinel)
        ready = wait(sources, timeout=max(0.0, deadline - time.monotonic()))  # type: ignore[arg-type]
        if self._link in ready:
            try:
                answer = self._link.recv()
            except (EOFError, OSError):
                answer = self._died()
        elif ready:
            answer = self._died()
        else:
            self.end()
            answer = Answer("dead", f"It gave no answer for {timeout_s:.0f} s and was ended.")
        return self._lost(answer) if answer.kind == "dead" else answer

    def _lost(self, answer: Answer) -> Answer:
        self.reason = answer.text
        return answer

    def _died(self) -> Answer:
        self._process.join(CLOSE_TIMEOUT_S)
        log = self._run_dir / LOG_FILE
        tail = log.read_text(errors="replace")[-_LOG_TAIL:].strip() if log.exists() else ""
        last = tail.splitlines()[-1] if tail else "it left no word"
        return Answer("dead", f"Its process ended with exit code {self._process.exitcode}: {last}")
