"""Requests that arrive over time: what arrives when, and what came of it.

A workload of kind `serving` is run once for each of its rates. All rates get requests of the same lengths in the same
order, and the same pattern of arrivals, faster or slower; prompts are new at each rate, so that none is in a prefix
cache. Everything follows from the seed, so every engine gets the same.

Latencies count from the moment at which a request was due. An engine that falls behind therefore shows its queue,
instead of slowing down the arrivals that it is measured with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import InputError, Request, SamplingParams
from harness.config import SloConf, WorkloadConf
from harness.workloads import Prompts

PERCENTILES = (50, 90, 95, 99)
GROWTH_SIGMAS = 2
"""More unfinished requests than before count as growth from so many standard deviations on."""
_RANGE_SIGMAS = 2
"""Standard deviations from a lognormal's median to the ends of its range."""
_PROMPT_KEYS, _OUTPUT_KEYS, _TIME_KEY = ("prompt_len", "input_length"), ("output_len", "output_length"), "timestamp"


@dataclass(frozen=True, slots=True)
class Load:
    """One pass: requests, and when each arrives, in seconds from the start. `rate` is in requests per second, and None
    where all arrive at once."""

    rate: float | None
    requests: list[Request]
    arrivals_s: list[float]


@dataclass(frozen=True, slots=True)
class Traced:
    """A line of a trace file: lengths in tokens, and a time in any unit, if it has one."""

    prompt_len: int
    output_len: int
    timestamp: float | None


def loads(conf: WorkloadConf, device: str, vocab_size: int, seed: int) -> list[Load]:
    """The passes of a serving workload for this device. InputError: its trace file cannot be used."""
    count = conf.num_requests if device != "cpu" else conf.cpu_num_requests
    rates = conf.rates if device != "cpu" else conf.cpu_rates
    traced = read_trace(Path(conf.trace)) if conf.trace else []
    if traced:
        if count > len(traced):
            raise InputError(f"{conf.trace} has {len(traced)} requests, and the workload asks for {count}.")
        traced = traced[: count or None]
        lengths = [(line.prompt_len, line.output_len) for line in traced]
    else:
        rng = np.random.default_rng([seed, 0])
        ranges = (conf.prompt_len, conf.output_len)
        drawn = [draw_lengths(conf.lengths, low, high, count, rng) for low, high in ranges]
        lengths = list(zip(*drawn, strict=True))
    times = unit_arrivals(conf, len(lengths), traced, np.random.default_rng([seed, 1]))
    made = []
    for index, rate in enumerate([None] if conf.arrivals == "all" else rates):
        prompts = Prompts(vocab_size, seed + 2 + index)  # the first two are the verification's and the warm-up's
        sampling = [SamplingParams(conf.temperature, max_tokens=output, ignore_eos=True) for _, output in lengths]
        requests = [prompts.request(length, how) for (length, _), how in zip(lengths, sampling, strict=True)]
        made.append(Load(rate, requests, (times / (rate or 1.0)).tolist()))
    return made


def draw_lengths(kind: str, low: int, high: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` lengths from `low` to `high`, ends included.

    uniform: each as likely. lognormal: the median is the range's geometric mean, the ends lie two standard deviations
    of the logarithm from it, and what falls outside is drawn again.
    """
    if kind == "uniform":
        return rng.integers(low, high, size=count, endpoint=True).tolist()
    middle, sigma = math.log(low * high) / 2, math.log(high / low) / (2 * _RANGE_SIGMAS)
    drawn: list[int] = []
    while len(drawn) < count:
        lengths = np.rint(rng.lognormal(middle, sigma, size=count)).astype(int)
        drawn += lengths[(lengths >= low) & (lengths <= high)].tolist()
    return drawn[:count]


def unit_arrivals(
    conf: WorkloadConf, count: int, traced: Sequence[Traced], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Arrival times [count] at one request per second, from 0 on. InputError: a trace without usable times."""
    match conf.arrivals:
        case "poisson":
            return np.cumsum([0.0, *rng.exponential(size=count - 1)], dtype=np.float64)
        case "burst":
            return (np.arange(count) // conf.burst_size * conf.burst_size).astype(np.float64)
        case "all":
            return np.zeros(count)
    times = np.array([line.timestamp for line in traced], dtype=np.float64)  # None becomes NaN
    if not np.isfinite(times).all() or (np.diff(times) < 0).any() or times[0] == times[-1]:
        raise InputError(f"arrivals=trace needs a {_TIME_KEY} in each line of {conf.trace}, in order, not all equal.")
    times -= times[0]
    return times * np.count_nonzero(times) / times[-1]


def read_trace(path: Path) -> list[Traced]:
    """The requests of a JSONL file: `prompt_len` (or `input_length`), `output_len` (or `output_length`), `timestamp`.

    InputError: it cannot be read, is empty, or a line lacks a length; the message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The trace {path} cannot be read: {error}.") from None
    traced = [_traced(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not traced:
        raise InputError(f"The trace {path} has no requests.")
    return traced


def _traced(line: str, where: str) -> Traced:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{where} is no JSON object.")
    timestamp = found.get(_TIME_KEY)
    if timestamp is not None and (not isinstance(timestamp, int | float) or isinstance(timestamp, bool)):
        raise InputError(f"{where}: {_TIME_KEY} must be a number, not {timestamp!r}.")
    return Traced(_length(found, _PROMPT_KEYS, where), _length(found, _OUTPUT_KEYS, where), timestamp)


def _length(found: Mapping[str, Any], keys: Sequence[str], where: str) -> int:
    value = next((found[key] for key in keys if key in found), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {' or '.join(keys)} must be a number of tokens from 1 on, not {value!r}.")
    return value


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """`name`_p50, _p90, _p95 and _p99, linear between samples; nothing where there are no values."""
    found = np.percentile(values, PERCENTILES).tolist() if len(values) else []
    return {f"{name}_p{p}": value for p, value in zip(PERCENTILES, found, strict=False)}


def meets(row: Mapping[str, Any], slo: SloConf) -> bool:
    """Whether a row of `requests` keeps every bound. One token has no TPOT to keep; no token is a failure."""
    if row["ttft_ms"] is None:
        return False
    return all(row[name] is None or row[name] <= bound for name, bound in asdict(slo).items() if bound is not None)


def unfinished(rows: Sequence[Mapping[str, Any]], at_s: float) -> int:
    """Requests that had arrived at `at_s`, and whose last token had not come."""
    inside = [row for row in rows if row["arrival_s"] <= at_s]
    return sum(row["e2el_ms"] is None or row["arrival_s"] + row["e2el_ms"] / 1e3 > at_s for row in inside)


def load_record(rate: float | None, rows: Sequence[Mapping[str, Any]], slo: SloConf) -> dict[str, Any]:
    """What `run.json` says of one pass; `rows` are its `requests`, all of them, in the order of arrival.

    `duration_s` goes from the first arrival to the last token. `offered_rate` is what the arrivals drawn come to,
    `achieved_rate` requests over duration, `goodput_rate` the same of those that keep the SLO.

    `still_growing`: more requests were unfinished when the last one arrived than when a quarter of them had, by more
    than chance explains (counts of a queue in balance vary about as Poisson's do). Then the rate is more than the
    engine can do, or the pass too short to reach a balance, and its latencies say how long it went on, not how long
    requests take. Of 256 Poisson arrivals it finds a rate 20 % too high nine times in ten. None where all arrive at
    once.
    """
    first_s, last_s = rows[0]["arrival_s"], rows[-1]["arrival_s"]
    window_s = last_s - first_s
    ends_s = [row["arrival_s"] + row["e2el_ms"] / 1e3 for row in rows if row["e2el_ms"] is not None]
    duration_s = max([last_s, *ends_s]) - first_s
    good = sum(meets(row, slo) for row in rows)
    output = sum(row["output_tokens"] for row in rows)
    early, last = unfinished(rows, rows[len(rows) // 4]["arrival_s"]), unfinished(rows, last_s)
    record = {
        "rate": rate,
        "requests": len(rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "output_tokens": output,
        "duration_s": duration_s,
        "offered_rate": sum(row["arrival_s"] > first_s for row in rows) / window_s if window_s else None,
        "achieved_rate": len(ends_s) / duration_s,
        "output_tok_s": output / duration_s,
        "goodput_share": good / len(rows),
        "goodput_rate": good / duration_s,
        "unfinished_at_quarter": early,
        "unfinished_at_last": last,
        "still_growing": last - early > GROWTH_SIGMAS * math.sqrt(last + early) if window_s else None,
    }
    for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
        record |= percentiles(name, [row[name] for row in rows if row[name] is not None])
    return record | percentiles("itl_ms", [gap for row in rows for gap in row["itl_ms"]])
