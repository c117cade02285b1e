"""What a run shows while it works: a bar on a terminal, plain lines elsewhere. All of it goes to stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINES_PER_BAR = 10
"""Without a terminal, a bar of many items prints this many lines."""


class Reporter:
    """Tells what is going on; `console` is replaced in tests."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def relaying(self, name: str) -> Iterator[None]:
        """Messages of level INFO to the logger `name` and those below it, a line each, which nobody else gets; warnings
        and errors go where they always go."""
        logger, relay = logging.getLogger(name), _Relay(self)
        before = logger.level, logger.propagate
        logger.addHandler(relay)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(relay)
            logger.setLevel(before[0])
            logger.propagate = before[1]

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        """Gives a function to be called with the name of each item, when the item is done."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda item: progress.update(task, advance=1, description=f"{title}: {item}")
            return
        every = max(1, total // _LINES_PER_BAR)
        done = 0

        def count(item: str) -> None:
            nonlocal done
            done += 1
            if done % every == 0 or done == total:
                self.say(f"{title} {done}/{total}: {item}")

        yield count


class _Relay(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.INFO:
            logging.getLogger().handle(record)
            return
        try:
            self._reporter.say(f"  {record.getMessage()}")
        except Exception:  # arguments that do not fit are no reason for a start to fail
            self.handleError(record)
