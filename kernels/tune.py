"""Measures how the kernels run best on this machine's GPU and writes `choices/<gpu>.json`.

    python -m kernels.tune [--quick] [--model qwen3-0.6b] [--rows 1,16]
                           [--ops qkv,o,gate_up,down,head,attention,prefill] [--dry-run]

Each candidate is checked against the reference (its output poisoned with NaN before) and timed as a captured graph of
dependent launches over as many weight matrices as the model has layers, so that the L2 does not hold them: the
median of some replays. cuBLAS with separate norm and activation runs beside them in the same way; where it wins, the
choice says so. The tiled kernel takes its norm half made from the product before, so such pairs are chosen together.

Attention is timed between the projections before and after it, whose time is taken off again, at short and at long
contexts: one launch serves all lengths, and what is far behind at long ones is no choice for it. Of few rows, steps in
which all contexts are short have another.

The head is timed with the sampler's sums: of more than 16 rows that is a kernel behind a norm, or norm, cuBLAS and
`tile_stats`.

The best of each op are then tried in the chain of all layers, attention between the products and the head at the end,
as they run in a decode step (kernels/_tune_chain.py): there launches are chosen, and whether norms are made in halves
(kernels/_tune_settle.py), from each op's best alone or from what was chosen before, whichever is faster. What counts is
the slowest of a few captures, while another process has a context on the GPU; where several numbers of rows share a
choice, it is the mean of the most and the fewest. That needs all four products among `--ops`. Attention that is not
among them runs as it was chosen before.

Prefill's products with their ends (`prefill`) are timed by kernels/_tune_prefill.py, its attention by _tune_causal.py;
`--rows` are decode's. Gate and up of a decode step of many rows are tried with prefill's kernel too.

Kernels are compiled first, by many processes, into Triton's cache. Exit codes: 0 done, 1 a launch is wrong, 2 there is
no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from kernels import _tune_causal, _tune_prefill, choices
from kernels._timing import beside_another, checked
from kernels._triton import triton
from kernels._tune_attention import LONG, MAX_CONTEXT, SHORT, Contexts, time_attention
from kernels._tune_attention import Found as FoundAttention
from kernels._tune_chain import PAIRS, Chain, Launches, in_halves
from kernels._tune_compile import Job, compile_all, jobs_of
from kernels._tune_models import MODELS, Model
from kernels._tune_products import (
    HEAD_ROWS,
    HEADER,
    TOLERANCE,
    Bench,
    Found,
    HeadBench,
    is_tiled,
    time_head,
    time_op,
)
from kernels._tune_settle import best_pairs, described, settle, ways
from kernels.choices import rows_measured
from kernels.decode_attention_launch import best_launch as best_attention
from kernels.decode_head import best_launch as best_head
from kernels.decode_linear_launch import best_launch as best_linear
from kernels.decode_linear_launch import best_prefill_gate_up
from kernels.decode_linear_launch import shape_key as linear_key

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
QUICK_ROWS = (1, 16, 64)
SIZES = (1, 2, 4, 8, *range(16, 513, 16))
"""Rows of decode steps as engines pad them: at least those that the graphs are captured for."""
TRIES, QUICK_TRIES = 6, 3
"""How many of an op's fastest launches are tried in the chain."""
CHAIN_SECONDS = 60.0
"""After so long with one number of rows no other turn begins in the chain."""
PREFILL_SECONDS = 90.0
"""After so long no other candidate of prefill is begun."""
CAUSAL_SECONDS = 60.0
"""The same of shapes of prompts' attention."""

Table = dict[str, dict[str, Any]]


class Tuner:
    """Measures some ops of a model at some numbers of rows, in this order: `compile`, `measure`, `settle`."""

    def __init__(
        self, model: Model, device: torch.device, rows: Sequence[int], ops: Sequence[str], quick: bool = False
    ) -> None:
        self.model, self.device, self.rows, self.quick = model, device, rows, quick
        self.ops = [op for op in model.ops() if op.name in ops]
        self.with_head, self.with_attention = "head" in ops, "attention" in ops
        self.chained = len(self.ops) == len(model.ops())
        self.tries = QUICK_TRIES if quick else TRIES
        self.failures: list[str] = []
        self.found: dict[int, dict[str, Found]] = {}
        self.attention: dict[int, FoundAttention] = {}
        self.table: Table = {"decode_linear": {}, "decode_head": {}, "decode_attention": {}}

    def compile(self) -> int:
        """All candidates; how many kernels these are."""
        return compile_all(jobs_of(self.model, self.ops, self.rows, self.with_head, self.with_attention, self.quick))

    def measure(self) -> None:
        """Each op by itself, and print what is best."""
        if self.with_attention:
            for count in self.rows:
                self.attention[count] = time_attention(self.device, self.model.attention(), count, self.failures)
        self.benches = {op.name: Bench(op, self.model.layers, self.device) for op in self.ops}
        self.head = HeadBench(self.model.hidden, self.model.vocab, self.device) if self.with_head else None
        print(HEADER)
        for count in self.rows:
            found = {name: time_op(bench, count, self.quick, self.failures) for name, bench in self.benches.items()}
            if self.head and count <= HEAD_ROWS:
                found["head"] = time_head(self.head, count, self.quick, self.failures)
            for result in found.values():
                print(result.line(), flush=True)
            self.found[count] = found

    def settle(self) -> Iterator[None]:
        """Choose, in the chain if all of its products are there, and fill the table; goes on from one number of rows to
        the next."""
        if self.chained:
            start = time.perf_counter()
            compiled = compile_all([job for count in self.rows for job in self._apart(count)])
            print(f"{compiled} kernels of norms apart compiled in {time.perf_counter() - start:.0f} s", flush=True)
        for count in self.rows:
            launches = best_pairs(self.found[count])
            if self._attention_launches(count):
                launches["attention"] = self._attention_launches(count)[0]
            if self.chained:
                launches = self._settled(count, launches)
                if count in self.attention and self.attention[count].short:
                    self._at_long_contexts(count, launches)
            self._choose(count, launches)
            yield

    def _attention_launches(self, count: int) -> list[Any]:
        """Launches of attention that may be chosen, the best by itself first; none where it is not measured."""
        return self.attention[count].launches() if count in self.attention else []

    def _apart(self, count: int) -> list[Job]:
        """What the chain will want besides the candidates: tiled products with their norms apart."""
        tried = [(op, launch) for op in self.ops for launch in ways(self.found[count][op.name], self.tries)]
        return [Job(op, count, replace(launch, halves=False)) for op, launch in tried if is_tiled(launch)]

    def _settled(self, count: int, start: Launches) -> Launches:
        """The best that was found in the chain from `start` on, which is printed beside it."""
        tried = {name: ways(result, self.tries) for name, result in self.found[count].items()}
        for name, bench in self.benches.items():
            bench.prepare(count)
            right = partial(checked, bench, where=f"{name} rows {count}", tolerance=TOLERANCE, failures=self.failures)
            # With its norm in halves a launch was found right before.
            tried[name] = [way for way in tried[name] if not is_tiled(way) or right(replace(way, halves=False))]
        if "attention" in start:
            tried["attention"] = self._attention_launches(count)
        else:
            start = {**start, "attention": self._choice("attention", count)}
        head = self.head if "head" in tried else None
        chains = [Chain(self.benches, self._contexts(rows, SHORT), head) for rows in served(count, self._counts())]
        time_us = lambda launches: fmean(chain.time_us(launches) for chain in chains)  # noqa: E731
        start_us = time_us(start)
        chosen = self._chosen_before(count, start)
        chosen_us = time_us(chosen)
        say = lambda text: print(f"{count:5} {text}", flush=True)  # noqa: E731
        settled, us = settle(time_us, tried, chosen if chosen_us < start_us else start, CHAIN_SECONDS, say)
        halves = " and ".join(first for first, second in PAIRS if in_halves(settled, first, second))
        say(
            f"chain: {us / 1000:.3f} ms with {_differences(start, settled)}; each op's best alone "
            f"{start_us / 1000:.3f} ms, what was chosen before {chosen_us / 1000:.3f} ms; norms in halves after "
            f"{halves or 'no product'}"
        )
        return settled

    def _chosen_before(self, count: int, start: Launches) -> Launches:
        """Choices of now for `count` rows where they are candidates, else `start`'s. From one place alone the search
        may end where no single step gains, and another place does."""
        offered = {name: [None, *(launch for _, launch in result.timed)] for name, result in self.found[count].items()}
        offered["attention"] = self._attention_launches(count)
        now = {name: self._choice(name, count) for name in offered}
        return {**start, **{name: launch for name, launch in now.items() if _with_halves(launch) in offered[name]}}

    def _choice(self, name: str, count: int) -> Any:
        """Of an op, by the table of now; None is cuBLAS."""
        if name == "attention":
            return best_attention(count, *self.model.attention(), SHORT[1], 2, self.device)
        if name == "head":
            return best_head(count, self.model.vocab, self.model.hidden, 2, self.device)
        op = self.benches[name].op
        shape = count, op.out, op.k, op.gated, 2, self.device
        return best_linear(*shape) or best_prefill_gate_up(*shape)

    def _at_long_contexts(self, count: int, launches: Launches) -> None:
        """Choose attention for all that short contexts' is not for, beside `launches` of the other ops."""
        head = self.head if "head" in launches else None
        chain = Chain(self.benches, self._contexts(count, LONG), head)
        time_us = lambda attention: chain.time_us({**launches, "attention": attention})  # noqa: E731
        self.attention[count] = self.attention[count].ordered(time_us)

    def _counts(self) -> list[int]:
        """Numbers of rows with a choice of their own: those of this run, and those in the GPU's file."""
        key = lambda rows, op: linear_key(rows, op.out, op.k, op.gated)  # noqa: E731
        measured = lambda rows: all(choices.chosen("decode_linear", key(rows, op), self.device) for op in self.ops)  # noqa: E731
        return sorted({*(rows_measured(rows)[0] for rows in self.rows), *filter(measured, ROWS)})

    def _contexts(self, rows: int, lengths: tuple[int, int]) -> Contexts:
        return Contexts(self.device, rows, lengths, self.model.attention(), MAX_CONTEXT, self.model.layers)

    def _choose(self, count: int, launches: Launches) -> None:
        """Into the table."""
        for name, result in self.found[count].items():
            kernel = "decode_head" if name == "head" else "decode_linear"
            self.table[kernel][result.key] = result.choice(launches[name], self._apart_us(count, name, launches))
        if self._attention_launches(count):
            self.table["decode_attention"] |= self.attention[count].entries(launches["attention"])

    def _apart_us(self, count: int, name: str, launches: Launches) -> float | None:
        """Of a tiled product whose norm is not made in halves: candidates were timed as if it were."""
        pair = next((pair for pair in PAIRS if name in pair), None)
        if not self.chained or pair is None or not is_tiled(launches[name]) or in_halves(launches, *pair):
            return None
        bench, launch = self.benches[name], replace(launches[name], halves=False)
        bench.prepare(count)
        return bench.time_us(partial(bench.fused, launch=launch, stream=bench.stream))


def _with_halves(launch: Any) -> Any:
    """As it stands among the candidates, whatever was chosen of norms."""
    return replace(launch, halves=True) if is_tiled(launch) else launch


def served(count: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Rows of the steps in which a choice for `count` is tried, where there are choices for all of `counts`: so many,
    and the fewest it serves, which may fill tiles badly."""
    key = rows_measured(count)[0]
    ours = [rows for rows in SIZES if next((c for c in rows_measured(rows) if c in counts), None) == key]
    fewest = min(ours, default=count)
    return (count, fewest) if fewest < count else (count,)


def main() -> None:
    """See this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument(
        "--rows", type=lambda text: [int(part) for part in text.split(",")], default=None, help="of decode steps"
    )
    parser.add_argument(
        "--ops",
        type=lambda text: text.split(","),
        default=["qkv", "o", "gate_up", "down", "head", "attention", "prefill"],
        help="what to measure; launches are chosen in the chain if qkv, o, gate_up and down are among them",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and fewer candidates")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no table of choices")
    arguments = parser.parse_args()
    device = _gpu()
    model = MODELS[arguments.model]
    rows = arguments.rows or list(QUICK_ROWS if arguments.quick else ROWS)
    start = time.perf_counter()
    tuner = Tuner(model, device, rows, arguments.ops, arguments.quick)
    print(f"{tuner.compile()} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    write: Callable[[Table], Any] = (
        (lambda table: None) if arguments.dry_run else partial(choices.save, device, facts=facts)
    )
    with beside_another(device):  # the slower of two paces, if there are two
        tuner.measure()
        for _ in tuner.settle():
            write(tuner.table)  # what comes may fail, or be stopped
    if "prefill" in arguments.ops:
        prompts = _tune_prefill.QUICK_ROWS if arguments.quick else _tune_prefill.ROWS
        write(_tune_prefill.measured(model, device, prompts, PREFILL_SECONDS, tuner.failures))
        write(_tune_causal.measured(model, device, arguments.quick, CAUSAL_SECONDS, tuner.failures))
    print("nothing is written" if arguments.dry_run else f"written: {choices.gpu_slug(device)}.json")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if tuner.failures:
        raise SystemExit(f"{len(tuner.failures)} launches are wrong, each named above.")


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        print("kernels.tune measures on an NVIDIA GPU, and there is none here.", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def _differences(before: Launches, after: Launches) -> str:
    """Which ops' launches in the chain are not their best alone."""
    other = {name: launch for name, launch in after.items() if launch != before[name]}
    return described(other) or "each op's best alone"


if __name__ == "__main__":
    main()
