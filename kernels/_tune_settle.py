"""Chooses the launches with which a whole step takes least time, for `python -m kernels.tune`.

By coordinate descent from each op's best alone: one after the other, the norm between two products in halves or not,
and each op's launch. A kernel's neighbours share the multiprocessors with it, so what is best alone need not be best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kernels import choices
from kernels._tune_attention import GAIN
from kernels._tune_chain import PAIRS, Launches
from kernels._tune_products import Found, is_tiled
from kernels.decode_head import Launch as HeadLaunch
from kernels.prefill_linear import Launch as PrefillLaunch

ROUNDS = 2
FAR = 1.3
"""A kind of kernel that alone takes more than so many times the best is not tried."""
BESIDE = 2
"""With a norm in halves and not, so many other launches of each of its two products are tried."""


def best_pairs(found: dict[str, Found]) -> Launches:
    """The fastest launches by their own times, both tiled or each as it is alone; None for cuBLAS."""
    launches: Launches = {name: result.alone()[0][1] for name, result in found.items()}
    for first, second in PAIRS:
        if first in found and second in found and found[first].tiled() and found[second].tiled():
            (first_us, first_launch), (second_us, second_launch) = found[first].tiled()[0], found[second].tiled()[0]
            if first_us + second_us < found[first].alone()[0][0] + found[second].alone()[0][0]:
                launches |= {first: first_launch, second: second_launch}
    return launches


def ways(result: Found, tries: int) -> list[Any]:
    """Launches worth a try in the chain: the fastest, and of each other kind its fastest if that is not far behind.

    None is cuBLAS.
    """
    found = [launch for _, launch in result.timed[:tries]]
    alone = result.alone()
    for us, launch in alone:
        if us <= FAR * alone[0][0] and _kind(launch) not in map(_kind, found):
            found.append(launch)
    return found


def _kind(launch: Any) -> str:
    if launch is None:
        return "cublas"
    if isinstance(launch, HeadLaunch):
        return "tiles" if launch.tiles else "product" if launch.product else "one kernel"
    return "prefill" if isinstance(launch, PrefillLaunch) else launch.kernel


def settle(
    time_us: Callable[[Launches], float],
    tried: Mapping[str, Sequence[Any]],
    launches: Launches,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> tuple[Launches, float]:
    """The fastest launches found from `launches` on, and their time in the chain, which `time_us` measures.

    tried: by op, launches worth a try; `launches` may name other ops, which stay as they are
    seconds: after so long no other turn begins
    say: is told of each gain
    """
    end = time.perf_counter() + seconds
    best = time_us(launches)
    for _ in range(ROUNDS):
        before = launches
        for changes in _turns(tried):
            if time.perf_counter() > end:
                say(f"no time for more than {seconds:.0f} s of trials in the chain")
                return launches, best
            best = time_us(launches)  # again: a GPU that became faster meanwhile is no gain
            for change in changes(launches):
                other = {**launches, **change}
                if other == launches:
                    continue
                us = time_us(other)
                if us < best * GAIN:  # both again, right after each other
                    best, us = time_us(launches), max(us, time_us(other))
                if us < best * GAIN:
                    say(f"chain {best / 1000:.4f} → {us / 1000:.4f} ms: {described(change)}")
                    launches, best = other, us
        if launches == before:
            break
    return launches, best


Changes = Callable[[Launches], list[Launches]]


def _turns(tried: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """What is tried together: of each pair of products, then of each op; each gives changes of some launches."""
    pairs = [partial(_pair_changes, tried, *pair) for pair in PAIRS if set(pair) <= set(tried)]
    return [*pairs, *(partial(_op_changes, tried, name) for name in tried)]


def _pair_changes(tried: Mapping[str, Sequence[Any]], first: str, second: str, now: Launches) -> list[Launches]:
    """The norm between the products in halves and not, with their launches of now and with others.

    What is made as now comes first: else a better launch would take a way of making norms along that is no better.
    """
    firsts, seconds = (list(filter(is_tiled, tried[name])) for name in (first, second))
    if is_tiled(now[first]) and is_tiled(now[second]):
        halves = (now[first].halves, not now[first].halves)
        firsts, seconds = [now[first], *firsts[:BESIDE]], [now[second], *seconds[:BESIDE]]
    else:
        halves = (True, False)
        firsts, seconds = firsts[:1], seconds[:1]
    if not firsts or not seconds:
        return []
    together = [(launch, seconds[0]) for launch in firsts] + [(firsts[0], launch) for launch in seconds[1:]]
    changes = dict.fromkeys((replace(a, halves=made), b) for made in halves for a, b in together)
    return [{first: a, second: b} for a, b in changes]


def _op_changes(tried: Mapping[str, Sequence[Any]], name: str, now: Launches) -> list[Launches]:
    """Other launches of the op; between tiled ones, what it does of the next norm stays."""
    found: list[Launches] = []
    for launch in tried[name]:
        if not is_tiled(launch) or not any(name == first for first, _ in PAIRS):
            found.append({name: launch})
        else:
            halves = (now[name].halves,) if is_tiled(now[name]) else (True, False)
            found += [{name: replace(launch, halves=made)} for made in halves]
    return found


def described(launches: Launches) -> str:
    """In one line."""
    return ", ".join(f"{name} {choices.fields_of(launch) if launch else 'cuBLAS'}" for name, launch in launches.items())
