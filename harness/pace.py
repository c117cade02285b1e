"""How fast this process's host is just now: shared machines slow it down, and steps that launch many kernels with it.

Two fixed pieces of work are timed, each a fraction of a millisecond: plain Python, and launches of a kernel that does
next to nothing. They say nothing of an engine; what counts is their change within a run and between runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

ADDITIONS = 2_000
LAUNCHES = 50
REPEATS = 7
"""Of each piece, for a median that one interruption does not move."""
SLOW = 1.5
"""A piece that takes so many times its least within a run makes what was timed there doubtful."""


def host_pace(device: str) -> dict[str, float]:
    """`python_us`: ADDITIONS additions in a loop; on a GPU `launch_us`: one launch, of LAUNCHES that nobody waits for.

    Medians of REPEATS, in µs. Waits for the GPU before and after; call it between steps.
    """
    pace = {"python_us": _median_us(_additions)}
    if device != "cpu":
        one = torch.zeros(1, device=device)
        torch.cuda.synchronize()

        def launches() -> None:
            for _ in range(LAUNCHES):
                one.add_(1.0)

        pace["launch_us"] = _median_us(launches, torch.cuda.synchronize) / LAUNCHES
    return pace


def slowdowns(paces: Mapping[Any, Mapping[str, float]]) -> dict[Any, float]:
    """Those of `paces` where a piece took SLOW times its least among them or more, with how many times."""
    least: dict[str, float] = {}
    for pace in paces.values():
        for piece, us in pace.items():
            least[piece] = min(us, least.get(piece, us))
    times = {key: max((us / least[piece] for piece, us in pace.items()), default=1.0) for key, pace in paces.items()}
    return {key: by for key, by in times.items() if by >= SLOW}


def _additions() -> None:
    total = 0
    for i in range(ADDITIONS):
        total += i


def _median_us(work: Callable[[], None], settle: Callable[[], None] = lambda: None) -> float:
    times_us = []
    for _ in range(REPEATS + 1):
        start_s = time.perf_counter()
        work()
        times_us.append((time.perf_counter() - start_s) * 1e6)
        settle()
    return statistics.median(times_us[1:])  # the first one may still load something
