"""Requests that arrive one after the other while an engine serves."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence

from engines.base import InputError, Request


class Arrivals:
    """Hands out requests when they are due, and keeps when each was.

    The clock starts when this is made. A request's arrival is the moment at which it was due, not that at which the
    engine came to look: an engine that is busy for long must not hide the time that requests spent before its door.
    `max_late_s` is the longest that one was handed out after it was due.
    """

    def __init__(self, requests: Sequence[Request], arrivals_s: Sequence[float] | None = None) -> None:
        offsets = [0.0] * len(requests) if arrivals_s is None else arrivals_s
        if len(offsets) != len(requests):
            raise InputError(f"There are {len(requests)} requests and {len(offsets)} arrival times.")
        if not all(0 <= offset < math.inf for offset in offsets):
            raise InputError("Arrival times must be seconds from 0 on.")
        start_s = time.perf_counter()
        due = [(start_s + offset, request) for offset, request in zip(offsets, requests, strict=True)]
        self._coming = deque(sorted(due, key=lambda pair: pair[0]))
        self._due_s = {request.request_id: due_s for due_s, request in due}
        self.max_late_s = 0.0

    def due_s(self, request_id: str) -> float:
        """When the request arrives, in `time.perf_counter()` seconds."""
        return self._due_s[request_id]

    @property
    def left_s(self) -> float | None:
        """Seconds until the next request is due, 0 if it already is; None if all were handed out."""
        return max(0.0, self._coming[0][0] - time.perf_counter()) if self._coming else None

    def take(self) -> Iterator[Request]:
        """The requests that are due, each once."""
        while self._coming and (late_s := time.perf_counter() - self._coming[0][0]) >= 0:
            self.max_late_s = max(self.max_late_s, late_s)
            yield self._coming.popleft()[1]

    def wait(self) -> bool:
        """Sleep until a request is due; False if none is left."""
        if (left_s := self.left_s) is None:
            return False
        time.sleep(left_s)
        return True
