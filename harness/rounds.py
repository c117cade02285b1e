"""Blocks: what is measured of one item in one go, so that engines can take turns block by block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from engines.base import Engine, Request, SamplingParams
from harness.limits import Work
from harness.passes import ShapeSteps, undisturbed
from harness.workloads import Call, Prompts, Shape

PREFILL_STEPS = 5
"""Prefill steps in a block; a decode block takes what one batch of prompts gives (`Shape.width`)."""
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 9


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a comparison. `work` None is the whole served workload."""

    metric: str
    work: Shape | Call | None
    batch_size: int

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "output_tok_s"

    @property
    def key(self) -> dict[str, Any]:
        """The columns of `rounds` that tell items apart."""
        match self.work:
            case Shape(phase=phase, tokens=tokens):
                rest: tuple[str, int, int] = (phase, tokens, 0)
            case Call(phase=phase, prompt_len=tokens, output_len=output):
                rest = (phase, tokens, output)
            case None:
                rest = ("serve", 0, 0)
        names = ("phase", "tokens", "output_len")
        return {"metric": self.metric, "batch_size": self.batch_size, **dict(zip(names, rest, strict=True))}

    def __str__(self) -> str:
        return f"{self.metric} of {self.work or f'{self.batch_size} requests'}"


def items(work: Work) -> list[Item]:
    """Everything that a workload measures, in its order."""
    timed = [Item("generate_ms" if c.phase == "prefill" else "tpot_ms", c, c.batch_size) for c in work.calls]
    if work.requests:  # whose shapes are only examples
        return [*timed, Item("output_tok_s", None, len(work.requests))]
    return timed + [Item("step_ms", shape, shape.batch_size) for shape in work.shapes]


class Blocks:
    """Measures blocks on one started engine. Engines that are asked for the same blocks get the same prompts."""

    def __init__(self, engine: Engine, prompts: Prompts, temperature: float, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._temperature = temperature
        self._requests = requests

    def measure(self, item: Item) -> list[float]:
        """The samples of one block, in the item's unit. RuntimeError (UnexpectedStep, out of memory): it cannot."""
        match item.work:
            case Shape():
                return self._steps(item.work)
            case Call():
                return [self._tpot_ms(item.work) if item.metric == "tpot_ms" else self._call_ms(item.work)]
            case None:
                return [self._output_tok_s()]

    def warm_up(self, item: Item) -> None:
        """A short form of a block, for whatever happens only once: compilation, first touches, another arm's start."""
        match item.work:
            case Call(output_len=output):
                self._call_ms(replace(item.work, output_len=min(output, WARM_UP_TOKENS)))
            case None:
                self._call_ms(Call(min(item.batch_size, WARM_UP_REQUESTS), WARM_UP_TOKENS, WARM_UP_TOKENS))
            case Shape():
                self.measure(item)

    def _steps(self, shape: Shape) -> list[float]:
        source = ShapeSteps(self._engine, self._prompts, self._temperature).samples(shape)
        count = PREFILL_STEPS if shape.phase == "prefill" else shape.width
        try:
            with undisturbed():
                return [sample.wall_us / 1e3 for sample in islice(source, count)]
        finally:
            source.close()

    def _tpot_ms(self, call: Call) -> float:
        """Time per output token after the first: a whole call less one that ends with its first token.

        So it is measured alike for every engine, also where single steps cannot be seen from outside.
        """
        first_ms = self._call_ms(replace(call, output_len=1))
        return (self._call_ms(call) - first_ms) / (call.output_len - 1)

    def _call_ms(self, call: Call) -> float:
        sampling = SamplingParams(self._temperature, max_tokens=call.output_len, ignore_eos=True)
        requests = [self._prompts.request(call.prompt_len, sampling) for _ in range(call.batch_size)]
        return 1e3 * self._serve_s(requests)

    def _output_tok_s(self) -> float:
        """The workload's lengths with prompts of this block's own: no engine may find them in its prefix cache."""
        requests = [self._prompts.request(len(r.prompt_token_ids), r.sampling) for r in self._requests]
        return sum(r.sampling.max_tokens for r in requests) / self._serve_s(requests)

    def _serve_s(self, requests: list[Request]) -> float:
        with undisturbed():
            start_s = time.perf_counter()
            results = self._engine.serve(requests)
            wall_s = time.perf_counter() - start_s
        missing = sum(r.sampling.max_tokens for r in requests) - sum(len(r.token_ids) for r in results)
        if missing:
            raise RuntimeError(f"{missing} tokens too few came back.")
        return wall_s


def row(engine: Engine, item: Item, launch: int, number: int, started_s: float, samples: list[float]) -> dict[str, Any]:
    """A finished block as a row of `rounds`."""
    place = {"launch": launch, "round": number, "started_s": started_s, "samples": len(samples)}
    return {
        "engine": engine.name, "arm": engine.arm, **item.key, **place, "value": statistics.median(samples),
        "status": "ok",
    }  # fmt: skip


def failed_row(engine: Engine, item: Item, launch: int, number: int, started_s: float, reason: str) -> dict[str, Any]:
    """A block without a value."""
    place = {"launch": launch, "round": number, "started_s": started_s, "samples": 0}
    return {"engine": engine.name, "arm": engine.arm, **item.key, **place, "status": reason}
