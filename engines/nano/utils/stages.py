"""What an engine does while it starts: told as it goes on, and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
EVERY_S = 5.0


class Stages:
    """`seconds` of each stage that has ended, in order. What is told is logged at level INFO."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._told = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One stage, told when it begins; once for each name."""
        logger.info(name)
        self._told = start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def progress(self, done: int, total: int) -> None:
        """Of the stage that goes on. To be called often: it is told at most every EVERY_S."""
        now = time.perf_counter()
        if now - self._told >= EVERY_S:
            logger.info("%d of %d", done, total)
            self._told = now
