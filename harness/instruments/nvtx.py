"""NVTX ranges for Nsight Systems, all in the domain "harness": run > step > layer > op.

Ranges are nested on the calling thread. Without a tool attached a range costs well under a microsecond; switched off,
there are neither hooks nor calls. Inside a CUDA graph ranges exist only while it is captured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import nvtx

from engines.base import WHOLE_LAYER, Site, StepKind
from harness.instruments.probe import StepTrace

DOMAIN = "harness"
CATEGORIES = ("run", "step", "layer", "op")


class _Stack:
    """The domain, and how many of our ranges are open in it."""

    def __init__(self) -> None:
        self.domain = nvtx.get_domain(DOMAIN)
        self.depth = 0

    def attributes(self, message: str, category: str, payload: int | None = None) -> Any:
        """A range's description, made once and used often; None where no tool listens."""
        attributes = self.domain.get_event_attributes(message=message, category=category)
        if attributes is not None and payload is not None:
            attributes.payload = payload
        return attributes

    @property
    def listening(self) -> bool:
        """Whether a tool takes our ranges."""
        return self.attributes("", CATEGORIES[0]) is not None

    def push(self, attributes: Any) -> None:
        self.depth += 1
        self.domain.push_range(attributes)

    def pop(self) -> None:
        self.depth -= 1
        self.domain.pop_range()

    def unwind(self, depth: int) -> None:
        """Close what was left open above `depth`, as after an exception inside a layer."""
        while self.depth > depth:
            self.pop()


@cache
def _stack() -> _Stack:
    return _Stack()


def step_label(kind: StepKind, batch: int, new_tokens: int, context: int) -> str:
    """A step's message: kind, sequences (b), new tokens (t) and cached tokens per sequence (c)."""
    return f"{kind} b={batch} t={new_tokens} c={context}"


class _Range:
    def __init__(self, stack: _Stack, attributes: Any) -> None:
        self._stack = stack
        self._attributes = attributes

    def __enter__(self) -> None:
        self._depth = self._stack.depth
        self._stack.push(self._attributes)

    def __exit__(self, *_exception: object) -> None:
        self._stack.unwind(self._depth)


class Ranges:
    """Ranges around runs and steps. With `enabled=False`, or with no tool attached, they are empty contexts."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and _stack().listening

    def run(self, name: str) -> AbstractContextManager[None]:
        """Around a whole run."""
        return self._range(name, "run", None)

    def step(self, label: str, tokens: int) -> AbstractContextManager[None]:
        """Around one step; `label` from `step_label`, the payload is the new tokens of all its sequences."""
        return self._range(label, "step", tokens)

    def _range(self, message: str, category: str, payload: int | None) -> AbstractContextManager[None]:
        if not self.enabled:
            return nullcontext()
        return _Range(_stack(), _stack().attributes(message, category, payload))


class NvtxProbe:
    """A range for each layer ("layer 3", payload 3) and op ("qkv_proj"), described once, when hooks are put on."""

    def __init__(self) -> None:
        self._stack = _stack()
        self._attributes: dict[Site, Any] = {}

    def wants(self, site: Site) -> bool:
        if site.op == WHOLE_LAYER:
            layer = site.layer_index
            self._attributes[site] = self._stack.attributes(f"layer {layer}", "layer", layer)
        else:
            self._attributes[site] = self._stack.attributes(site.op, "op")
        return True

    def begin(self, site: Site, rows: int) -> None:
        self._stack.push(self._attributes[site])

    def end(self, site: Site) -> None:
        self._stack.pop()

    def start_step(self, label: str, kind: StepKind, batch: int, tokens: int) -> None:
        """Steps have their own ranges (`Ranges.step`)."""

    def finish_step(self, rows_bucket: int | None = None) -> StepTrace:
        """NVTX shows and does not measure, so there are no intervals."""
        return StepTrace([])
