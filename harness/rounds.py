"""Blocks: what is measured of one item in one go, so that engines can take turns block by block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from engines.base import Engine, InputError, Request, SamplingParams
from harness.limits import Work
from harness.passes import ShapeSteps, UnexpectedStep, out_of_memory, undisturbed
from harness.statistics import warmup_count
from harness.workloads import Call, Prompts, Shape

PREFILL_STEPS = 5
"""Prefill steps or calls in a block; a decode block takes what one batch of prompts gives (`Shape.width`)."""
WARM_UP_REQUESTS, WARM_UP_TOKENS = 4, 9


class BlockFailed(RuntimeError):
    """A block has no value; the message says why. The engine can go on with the next one."""


@contextmanager
def _failing() -> Iterator[None]:
    """What may happen to one block as `BlockFailed`; anything else goes through."""
    try:
        yield
    except (UnexpectedStep, RuntimeError, MemoryError) as error:
        if not isinstance(error, UnexpectedStep | BlockFailed) and not out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise BlockFailed(str(error).splitlines()[0]) from error


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
    """Everything that a workload measures, in its order. InputError: it cannot be measured in blocks."""
    if work.loads:
        raise InputError("A serving workload is run by one engine after the other; it has no rounds.")
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

    def _measure(self, item: Item) -> list[float]:
        match item.work:
            case Shape():
                return self._steps(item.work)
            case Call():
                return [self._tpot_ms(item.work)] if item.metric == "tpot_ms" else self._prompts_ms(item.work)
            case None:
                return [self._output_tok_s()]

    def row(self, item: Item, launch: int, number: int, started_s: float) -> dict[str, Any]:
        """One block as a row of `rounds`, with its value or with the reason why there is none."""
        try:
            samples, status = self.measure(item), "ok"
        except BlockFailed as error:
            samples, status = [], str(error)
        place = {"launch": launch, "round": number, "started_s": started_s, "samples": len(samples)}
        value = statistics.median(samples) if samples else None
        who = {"engine": self._engine.name, "arm": self._engine.arm}
        return {**who, **item.key, **place, "value": value, "status": status}

    def measure(self, item: Item) -> list[float]:
        """The samples of one block, in the item's unit. BlockFailed: there are none, and the engine goes on."""
        with _failing():
            return self._measure(item)

    def warm_up(self, item: Item) -> None:
        """A short form of a block, for whatever happens only once: compilation, first touches, another arm's start.

        BlockFailed, as from `measure`.
        """
        with _failing():
            match item.work:
                case Call(output_len=output):
                    self._call_ms(replace(item.work, output_len=min(output, WARM_UP_TOKENS)))
                case None:
                    self._call_ms(Call(min(item.batch_size, WARM_UP_REQUESTS), WARM_UP_TOKENS, WARM_UP_TOKENS))
                case Shape():
                    self._measure(item)

    def _steps(self, shape: Shape) -> list[float]:
        """The steps of one block, without those at its beginning that still find what other engines left."""
        source = ShapeSteps(self._engine, self._prompts, self._temperature).samples(shape)
        count = PREFILL_STEPS if shape.phase == "prefill" else shape.width
        try:
            with undisturbed():
                steps_ms = [sample.wall_us / 1e3 for sample in islice(source, count)]
            return steps_ms[warmup_count(steps_ms) :]
        finally:
            source.close()

    def _tpot_ms(self, call: Call) -> float:
        """Time per output token after the first: a whole call less one that ends with its first token.

        So it is measured alike for every engine, also where single steps cannot be seen from outside.
        """
        first_ms = self._call_ms(replace(call, output_len=1))
        tpot_ms = (self._call_ms(call) - first_ms) / (call.output_len - 1)
        if tpot_ms <= 0:
            raise BlockFailed(f"{call.output_len} tokens took no longer than one: ask for more output_tokens.")
        return tpot_ms

    def _prompts_ms(self, call: Call) -> list[float]:
        """The first call finds caches and clocks as the other engines left them, and does not count."""
        return [self._call_ms(call) for _ in range(1 + PREFILL_STEPS)][1:]

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
            raise BlockFailed(f"{missing} tokens too few came back.")
        return wall_s
