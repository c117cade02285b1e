"""Our NVTX ranges: which steps there are, and which of a thread's ranges were open at a moment."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from engines.base import NO_LAYER, OPS, WHOLE_LAYER, Site
from harness.instruments.nvtx import DOMAIN
from harness.nsys.export import NVTX, Export

PUSH_POP, DOMAIN_CREATED = 59, 75
"""Kinds of NVTX_EVENTS (`eventType`)."""
_STEP = re.compile(r"(prefill|decode|mixed) b=(\d+) t=(\d+) c=(\d+)")  # as instruments.nvtx.step_label makes it
_LAYER = re.compile(r"layer (\d+)")
_RUN = re.compile(r"(\S+) (\S+) (\S+)")
_BLOCKS = {
    "embed": "embed", "input_norm": "attention", "qkv_proj": "attention", "qk_norm": "attention", "rope": "attention",
    "kv_write": "attention", "attention": "attention", "o_proj": "attention", "post_norm": "mlp", "gate_up_proj": "mlp",
    "silu_mul": "mlp", "down_proj": "mlp", "final_norm": "head", "lm_head": "head", "sample": "sample",
    "prepare": "step", "read_back": "step",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StepRange:
    """A step, as its range's message says it."""

    phase: str
    batch_size: int
    new_tokens: int
    context_len: int


@dataclass(frozen=True, slots=True)
class _Span:
    """A range. `what`: a step, a layer's number, or an op; `parent`: the number of the range around it, -1 for none."""

    start_ns: int
    end_ns: int
    what: StepRange | int | str
    parent: int


class Ranges:
    """The push/pop ranges of our domain, by thread; those of all domains where the export names none."""

    def __init__(self, export: Export) -> None:
        events = export[NVTX]
        events = events.assign(name=events["text"].fillna(export.texts(events["textId"])))
        ours = events[(events["eventType"] == DOMAIN_CREATED) & (events["name"] == DOMAIN)]["domainId"]
        ranges = events[(events["eventType"] == PUSH_POP) & events["end"].notna() & events["name"].notna()]
        if len(ours):
            ranges = ranges[ranges["domainId"].isin(ours)]
        self.run: tuple[str, str, str] | None = None
        """Engine, model and workload, as the run's range says them."""
        self._spans: dict[int, list[_Span]] = {}
        ordered = ranges.sort_values(["start", "end"], ascending=[True, False], kind="stable")
        for start, end, thread, name in ordered[["start", "end", "globalTid", "name"]].itertuples(index=False):
            what = _what(name)
            if what is not None:
                spans = self._spans.setdefault(int(thread), [])
                parent = _around(spans, len(spans) - 1, int(start))
                spans.append(_Span(int(start), int(end), what, parent))
            elif self.run is None and (found := _RUN.fullmatch(name)):
                self.run = found[1], found[2], found[3]
        self._starts = {thread: [span.start_ns for span in spans] for thread, spans in self._spans.items()}

    @property
    def steps(self) -> list[tuple[StepRange, int]]:
        """All steps with their time on the host in ns, in the order in which they began."""
        spans = sorted((s for of in self._spans.values() for s in of), key=lambda span: span.start_ns)
        return [(s.what, s.end_ns - s.start_ns) for s in spans if isinstance(s.what, StepRange)]

    def at(self, thread: int, at_ns: int) -> tuple[StepRange | None, Site | None]:
        """The step, and the innermost layer and op, that were open on `thread`.

        The site is a whole layer in one outside of its ops, and None outside of layers and ops.
        """
        spans = self._spans.get(thread, [])
        number = _around(spans, bisect_right(self._starts.get(thread, []), at_ns) - 1, at_ns)
        step, layer, op = None, NO_LAYER, ""
        while number >= 0:
            what = spans[number].what
            if isinstance(what, str):
                op = op or what
            elif isinstance(what, int):
                layer = what if layer == NO_LAYER else layer
            else:
                step = step or what
            number = spans[number].parent
        if layer == NO_LAYER and not op:
            return step, None
        return step, Site(layer, _BLOCKS[op.split("+")[0]], op) if op else Site(layer, WHOLE_LAYER, WHOLE_LAYER)


def _what(name: str) -> StepRange | int | str | None:
    if found := _STEP.fullmatch(name):
        phase, *sizes = found.groups()
        return StepRange(phase, *map(int, sizes))
    if found := _LAYER.fullmatch(name):
        return int(found[1])
    return name if set(name.split("+")) <= set(OPS) else None


def _around(spans: list[_Span], number: int, at_ns: int) -> int:
    """The innermost of span `number` and those around it that has not ended at `at_ns`; -1 if none."""
    while number >= 0 and spans[number].end_ns <= at_ns:
        number = spans[number].parent
    return number
