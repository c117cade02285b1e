"""Everything that makes the numbers less believable, in kinds, worst first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.compare.ratios import MIN_LAUNCHES
from harness.report import html
from harness.report.data import PASSED, Comparison, Data, Shape
from harness.report.html import Section
from harness.verify import NOISE_FACTOR

FAILED, UNVERIFIED, DEAD = "failed", "unverified", "dead contestant"
UNPROVEN, THROTTLED, OTHERS, LAUNCHES = "unproven", "throttled", "other processes", "few launches"
SLOWED = "slow host"
UNSURE, QUEUE, TRACE, NOTE = "unsure", "queue grows", "trace", "note"
KINDS = {
    FAILED: "failed: there is no number, or not all of them",
    UNVERIFIED: "unverified: the output was not shown to be right",
    DEAD: "dead contestants: they took no part to the end",
    UNPROVEN: "unproven: passed only because the check cannot tell",
    THROTTLED: "throttled: the GPU held its clocks back",
    SLOWED: "slow host: something else took the processor's time",
    OTHERS: "other processes on the GPU",
    LAUNCHES: "few launches: an interval holds for these processes only",
    UNSURE: "unsure: the interval is wide, or reaches over 1",
    QUEUE: "queues that still grew: latencies say how long the pass went on",
    TRACE: "traces that do not add up, or are missing",
    NOTE: "notes",
}
BAD = (FAILED, UNVERIFIED, DEAD)
_AROUND = ("gpu_before", "gpu_after")
_ONLY_ON_A_GPU = re.compile(r"^No (kernels|graph) trace")
"""What a run without a GPU cannot have: a note there, not a doubt."""
_SAYS = (
    (re.compile(r"throttled"), THROTTLED),
    (re.compile(r"the host was .* slower"), SLOWED),
    (re.compile(r"other processes"), OTHERS),
    (re.compile(r"not verified"), UNVERIFIED),
    (re.compile(r"^No \w+ trace|add up to|has a place in the model|left out of the trace"), TRACE),
    (re.compile(r"left out\.$"), FAILED),
)
"""How a sentence of `run.json` tells its kind; others are notes."""
_SAME = re.compile(r": (?=the GPU was throttled|the host was )")
"""Where what a run says of one shape after the other begins."""
_SHOWN = 6
"""Sentences of one kind that are shown without a click."""
_NAMED = 4
"""Runs that a sentence is true of, likewise."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A sentence on one run or comparison, named by `where`."""

    kind: str
    where: str
    text: str


def doubts(data: Data) -> list[Doubt]:
    """Of all runs and comparisons, worst kind first, none twice."""
    found = dict.fromkeys(
        [d for run in data.runs.runs for d in _of_run(data, run)] + [d for c in data.comparisons for d in _of(data, c)]
    )
    order = list(KINDS)
    return sorted(found, key=lambda doubt: order.index(doubt.kind))


def section(data: Data) -> Section:
    """All doubts at the page's top; a sentence that there are none where that is so."""
    found = doubts(data)
    if not found:
        return Section(
            "Warnings", [html.paragraph("None: all runs finished, verified, unthrottled, alone on the GPU.")]
        )
    parts = []
    for kind, title in KINDS.items():
        texts: dict[str, list[str]] = {}
        for doubt in found:
            if doubt.kind == kind:
                texts.setdefault(doubt.text, []).append(doubt.where)
        if not texts:
            continue
        items = [f"<li>{html.escape(text)} {_places(where)}</li>" for text, where in texts.items()]
        shown, rest = items[:_SHOWN], items[_SHOWN:]
        more = html.folded(f"{len(rest)} more", f"<ul>{''.join(rest)}</ul>") if rest else ""
        weight = "bad" if kind in BAD else "note" if kind == NOTE else "doubt"
        parts.append(f'<div class="doubts {weight}"><h3>{html.escape(title)}</h3><ul>{"".join(shown)}</ul>{more}</div>')
    return Section("Warnings", parts)


def _places(where: Sequence[str]) -> str:
    """The runs that a sentence is true of: by name if they are few, behind a click if they are many."""
    names = f"<small>{html.escape('; '.join(where))}</small>"
    return names if len(where) <= _NAMED else f"<small>{html.folded(f'{len(where)} runs', names)}</small>"


def _of_run(data: Data, run: Mapping[str, Any]) -> Iterator[Doubt]:
    where = data.name_of(run)
    told = [(_kind(text, run), text) for text in _merged(run.get("warnings") or ())]
    kinds = {kind for kind, _ in told}
    if data.comparison_of(run):  # the comparison says it once for all of its runs
        told, kinds = [(kind, text) for kind, text in told if kind != OTHERS], kinds | {OTHERS}
    for kind, text in told:
        yield Doubt(kind, where, text)
    checks: list[tuple[str, Callable[[Data, Mapping[str, Any]], Iterator[str]]]] = [
        (FAILED, _failures), (UNVERIFIED, _unverified), (UNPROVEN, _unproven), (THROTTLED, _throttled),
        (OTHERS, _others), (UNSURE, _unsure), (QUEUE, _growing), (NOTE, _notes),
    ]  # fmt: skip
    for kind, check in checks:
        if kind in (THROTTLED, OTHERS) and kind in kinds:  # the run says so itself
            continue
        for text in check(data, run):
            yield Doubt(kind, where, text)


def _merged(texts: Sequence[str]) -> list[str]:
    """Sentences, those that say the same of several shapes as one."""
    shapes: dict[str, list[str]] = {}
    for text in texts:
        shape, *rest = _SAME.split(text, maxsplit=1)
        shapes.setdefault(": " + rest[0], []).append(shape) if rest else shapes.setdefault(text, [])
    return ["; ".join(of) + rest for rest, of in shapes.items()]


def _kind(text: str, run: Mapping[str, Any]) -> str:
    if run.get("device") == "cpu" and _ONLY_ON_A_GPU.search(text):
        return NOTE
    return next((kind for pattern, kind in _SAYS if pattern.search(text)), NOTE)


def _failures(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    status = run.get("status")
    if status != "ok":
        yield f"This run is {status}. {run.get('error', '')}".rstrip()
    yield from run.get("failures") or ()
    told = " ".join(run.get("failures") or ())
    for name in ("steps", "rounds"):
        frame = getattr(data.runs, name)
        failed = frame[(frame["run_id"] == run["run_id"]) & (frame["status"] != "ok")]
        for reason, count in failed["status"].value_counts().items():
            if str(reason) not in told:
                yield f"{count} rows of {name} failed: {reason}"
    for shape in run.get("shapes") or ():
        if "timed" not in shape:
            yield f"{Shape.of(shape)}: not reached."


def _unverified(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    verification = run.get("verification") or {}
    status = verification.get("status", "missing")
    if status != PASSED and "not verified" not in " ".join(run.get("warnings") or ()):
        reason = verification.get("reason")
        yield f"Verification: {status}{f' ({reason})' if reason else ''}."


def _unproven(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    verification = run.get("verification") or {}
    ratios = {name: (verification.get(f"{name}_ratio") or {}).get("value") for name in ("kl", "nll_delta")}
    above = {name: value for name, value in ratios.items() if isinstance(value, int | float) and value > NOISE_FACTOR}
    if verification.get("status") == PASSED and above:
        each = ", ".join(f"{name} {value:.2f} times the noise of its dtype" for name, value in above.items())
        yield f"{each}, above {NOISE_FACTOR}; passed because the interval reaches down to it."


def _throttled(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    states = {name: run.get(name) for name in _AROUND}
    states |= {str(Shape.of(s)): (s.get("timed") or {}).get("gpu") for s in run.get("shapes") or ()}
    for name, state in states.items():
        if state and state.get("throttled"):
            yield f"{name.replace('_', ' ')}: the GPU was throttled ({', '.join(state['throttle_reasons'] or ())})."


def _others(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    for name in _AROUND:
        if count := _others_on_gpu(run, name):
            yield f"{_processes(count)} on the GPU ({name.replace('_', ' ')})."


def _others_on_gpu(run: Mapping[str, Any], name: str) -> int:
    return len((run.get(name) or {}).get("other_processes") or ())


def _processes(count: int) -> str:
    return f"{count} other process{' was' if count == 1 else 'es were'}"


def _unsure(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    """One sentence on all wide intervals, and one on shapes that were timed once."""
    asked = ((run.get("config") or {}).get("instrument") or {}).get("precision")
    timed = [(Shape.of(s), s["timed"]) for s in run.get("shapes") or () if (s.get("timed") or {}).get("status") == "ok"]
    if once := [str(shape) for shape, of in timed if of.get("samples") == 1]:
        yield f"Timed once, so that there is no interval: {'; '.join(once)}."
    wide = [
        (width, shape, str(of.get("stop", "an unknown rule")).replace("_", " ")) for shape, of in timed
        if asked is not None and of.get("stop") != "precision" and (width := _width(of)) > asked
    ]  # fmt: skip
    if wide:
        width, shape, _ = max(wide, key=lambda of: of[0])
        ends = " or ".join(dict.fromkeys(stop for *_, stop in wide))
        yield (
            f"{len(wide)} of {len(timed)} shapes have an interval wider than the {asked:.0%} that was asked, at most "
            f"{width:.1%} ({shape}); sampling ended by {ends}."
        )


def _width(timed: Mapping[str, Any]) -> float:
    return (timed["wall_us_high"] - timed["wall_us_low"]) / timed["wall_us"]


def _growing(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    for served in run.get("serving") or ():
        if served.get("still_growing"):
            yield f"At {served['rate']:g} requests/s more requests were unfinished at the end than before."


def _notes(data: Data, run: Mapping[str, Any]) -> Iterator[str]:
    if (run.get("weights") or {}).get("source") == "random" and "andom weights" not in " ".join(
        run.get("warnings") or ()
    ):
        yield "Random weights."
    if slimmed := run.get("slimmed"):
        yield (
            f"Its tables hold at most {slimmed['max_iterations']} iterations of each shape; medians of whole steps and "
            "their intervals are from all."
        )
    if ((run.get("provenance") or {}).get("git") or {}).get("dirty"):
        yield "The code differed from its commit."


def _of(data: Data, comparison: Comparison) -> Iterator[Doubt]:
    where = comparison.folder.name
    if comparison.record.get("status") != "ok":
        yield Doubt(FAILED, where, f"This comparison is {comparison.record.get('status')}.")
    for label, reason in comparison.reasons.items():
        yield Doubt(DEAD, where, f"{label}: {reason}")
    if comparison.launches < MIN_LAUNCHES:
        yield Doubt(
            LAUNCHES,
            where,
            f"{comparison.launches} launch{'' if comparison.launches == 1 else 'es'}: what differs from one start of "
            f"the engines to the next is not in the intervals (from {MIN_LAUNCHES} launches on it is).",
        )
    most = max((_others_on_gpu(run, name) for run in data.runs.runs if data.comparison_of(run) is comparison
                for name in _AROUND), default=0)  # fmt: skip
    if most:
        yield Doubt(
            OTHERS,
            where,
            f"Up to {_processes(most)} on the GPU beside a contestant; the other contestants are among them "
            f"({len(comparison.engines)} in all).",
        )
    unsure: dict[str, list[str]] = {}
    for row in comparison.rows:
        for label, cell in row.cells.items():
            if cell.spread is None and label not in comparison.reasons:
                yield Doubt(FAILED, where, f"{row.name}, {label}: {cell.reason}")
            elif cell.ratio and cell.ratio.pairs > 1 and cell.ratio.verdict(row.higher_is_better) == "even":
                ends = f"{row.name} ({cell.ratio.low:.3f} to {cell.ratio.high:.3f})"
                unsure.setdefault(label, []).append(ends)
    for label, names in unsure.items():
        yield Doubt(
            UNSURE,
            where,
            f"{comparison.names[label]}: the ratio's interval reaches over 1 in {len(names)} of "
            f"{len(comparison.rows)} rows: {'; '.join(names)}.",
        )
