"""Times decode_attention's launches on this machine's GPU, beside FlashAttention 3 after `qk_norm_rope_cache`.

    python -m kernels._tune_attention [--rows 1,16,256] [--contexts 128-256,1024,4096] [--max-context 4096] [--all]

Each launch is checked against the reference once (its output and workspace full of NaN before), then timed as a
captured graph of dependent launches over many layers' caches, more than the L2 holds: `alone` one after the other,
`chained` each between the layer's qkv and o projections, less what these take by themselves. That is what it costs in
an engine, where the first keys are loaded while the one projection ends, and the other's programs come to lie beside
those of attention before it has ended. Without `--all` only some candidates, the default among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import choices, decode_linear, qk_norm_rope_cache
from kernels._rows import copied_rows
from kernels._timing import checked, poisoned, relative_error, time_graph_us
from kernels.decode_attention import decode_attention, reference, workspace
from kernels.decode_attention_launch import SHORT_ROWS, Launch, candidates, default_launch, shape_key

LAYERS = 28
CACHE_BYTES = 256 << 20
"""At least so much cache in one graph: several times the largest L2."""
BLOCK_SIZE = 256
HIDDEN = 1024
EPS = 1e-6
TOLERANCE = 1e-2
MAX_CONTEXT = 4096
SHORT, LONG = (128, 256), (512, 2048)
"""Tokens of the contexts for which launches are chosen; the latter where those of short contexts have their own."""
TRIES = 8
"""How many of the fastest at short contexts go on: to the chain, or to long contexts."""
GAIN = 0.998
"""Of the time before: not for what the next run may turn around."""
LONG_LOSS = 0.03
"""What is slower by more than this share than the best of them there is no choice for all lengths."""


class Heads(NamedTuple):
    """A model's attention."""

    heads: int
    kv_heads: int
    head_dim: int


QWEN3_06B = Heads(16, 8, 128)


@dataclass(frozen=True)
class Timed:
    """One launch (or, by name, another way): µs per layer, GB/s of cache read alone, relative error."""

    launch: Launch | str
    alone_us: float
    chained_us: float
    gb_s: float
    error: float


class Contexts:
    """`rows` random contexts with lengths spread evenly over `context` (from, to), in the caches of so many layers."""

    def __init__(
        self, device: torch.device, rows: int, context: tuple[int, int], heads: Heads, max_context: int, layers: int
    ) -> None:
        self.device, self.rows, self.shape, self.max_context = device, rows, heads, max_context
        low, high = context
        lengths = torch.linspace(low, high, rows).round().int() if rows > 1 else torch.tensor([(low + high) // 2]).int()
        self.lengths = lengths[torch.randperm(rows)].to(device)
        self.cache_bytes = int(self.lengths.sum()) * token_bytes(heads)
        blocks = -(-high // BLOCK_SIZE)
        size = (layers, 2, rows * blocks, BLOCK_SIZE, heads.kv_heads, heads.head_dim)
        self.caches = torch.empty(size, dtype=torch.bfloat16, device=device)
        for cache in self.caches:
            cache.normal_()
        self.tables = torch.zeros(rows, max_context // BLOCK_SIZE, dtype=torch.int32, device=device)
        self.tables[:, :blocks] = torch.randperm(rows * blocks).view(rows, blocks)
        # `positions` is the place of the new token: the context counts it.
        self.positions = self.lengths - 1
        self.gammas = torch.rand(2, heads.head_dim, device=device).add_(0.5).bfloat16()
        angle = torch.rand(max_context, heads.head_dim // 2, device=device) * 6
        self.cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)
        self.space = workspace(rows, heads.heads, heads.head_dim, device)

    def arguments(self, qkv: Tensor, cache: Tensor) -> tuple[Any, ...]:
        """Of `decode_attention` and its reference."""
        return (
            qkv, *self.gammas, self.cos_sin, self.positions, self.tables, cache[0], cache[1],
            *self.shape, EPS, self.shape.head_dim**-0.5,
        )  # fmt: skip

    def attend(self, qkv: Tensor, cache: Tensor, launch: Launch) -> Tensor:
        """o of the joint projection qkv [rows, (heads + 2 kv_heads) * head_dim], on one of `caches`."""
        return decode_attention(*self.arguments(qkv, cache), workspace=self.space, dependent=True, launch=launch)


def token_bytes(heads: Heads) -> int:
    """Of a layer's cache, for one token."""
    return 2 * heads.kv_heads * heads.head_dim * 2


class Bench(Contexts):
    """Contexts in as many layers as the L2 does not hold, each with its qkv and o projections."""

    def __init__(
        self,
        device: torch.device,
        rows: int,
        context: tuple[int, int],
        heads: Heads = QWEN3_06B,
        max_context: int = MAX_CONTEXT,
    ) -> None:
        layer_bytes = rows * -(-context[1] // BLOCK_SIZE) * BLOCK_SIZE * token_bytes(heads)
        layers = max(LAYERS, -(-CACHE_BYTES // layer_bytes))
        super().__init__(device, rows, context, heads, max_context, layers)
        width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
        self.x = torch.randn(rows, HIDDEN, device=device).bfloat16()
        weights = torch.randn(LAYERS, width, HIDDEN, device=device, dtype=torch.bfloat16).mul_(HIDDEN**-0.5)
        self.weights = [weights[layer % LAYERS] for layer in range(layers)]
        wide = heads.heads * heads.head_dim
        weights_o = torch.randn(LAYERS, HIDDEN, wide, device=device, dtype=torch.bfloat16).mul_(wide**-0.5)
        self.weights_o = [weights_o[layer % LAYERS] for layer in range(layers)]
        self.attended = copied_rows(torch.randn(rows, wide, device=device).bfloat16())
        self.stream = torch.randn(rows, HIDDEN, device=device).bfloat16()
        self.qkv = self._project(self.weights[0])
        self.expected = reference(*self.arguments(self.qkv, self.caches[0].clone())).float()
        self.projections_us = self._layers_us(lambda _qkv, _cache: self.attended)

    def _project(self, weight: Tensor) -> Tensor:
        return decode_linear(self.x, weight, dependent=True)

    def _layers_us(self, attend: Callable[[Tensor, Tensor], Tensor]) -> float:
        """µs of a layer of qkv projection, attention and o projection, which adds to the stream."""

        def layer(weight: Tensor, cache: Tensor, weight_o: Tensor) -> Tensor:
            out = attend(self._project(weight), cache)
            return decode_linear(out, weight_o, residual=self.stream, dependent=True)

        layers = zip(self.weights, self.caches, self.weights_o, strict=True)
        return self._graph_us([partial(layer, *parts) for parts in layers])

    def flash_attention_3(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Norm, rotation and write, then attention as vLLM bundles it; None where that is not installed."""
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func
        except ImportError:
            return None
        slots = self.tables.gather(1, (self.positions // BLOCK_SIZE).long()[:, None])[:, 0] * BLOCK_SIZE
        slots = slots + self.positions % BLOCK_SIZE
        starts = torch.arange(self.rows + 1, dtype=torch.int32, device=self.device)

        def attend(qkv: Tensor, cache: Tensor) -> Tensor:
            q: Any = qk_norm_rope_cache(
                qkv, self.gammas[0], self.gammas[1], self.cos_sin, self.positions, slots, cache[0], cache[1],
                *self.shape, EPS,
            )  # fmt: skip
            out = flash_attn_varlen_func(
                q, cache[0], cache[1], max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=self.max_context,
                seqused_k=self.lengths, block_table=self.tables, softmax_scale=self.shape.head_dim**-0.5, causal=True,
                fa_version=3,
            )  # fmt: skip
            return out.flatten(1)

        return attend

    def error(self, launch: Launch) -> float:
        """Relative error; NaN where it left something unwritten."""
        self.space.parts.fill_(float("nan"))
        self.space.lse.fill_(float("nan"))
        return self._error(partial(self.attend, launch=launch))

    def _error(self, attend: Callable[[Tensor, Tensor], Tensor]) -> float:
        return relative_error(poisoned(lambda: attend(self.qkv, self.caches[0].clone())), self.expected)

    def time(self, attend: Callable[[Tensor, Tensor], Tensor], name: Launch | str) -> Timed:
        """Any function of (qkv, cache) that gives o."""
        error = self._error(attend)
        alone = self._graph_us([partial(attend, self.qkv, cache) for cache in self.caches])
        return Timed(name, alone, self._layers_us(attend) - self.projections_us, self.cache_bytes / alone / 1000, error)

    @staticmethod
    def _graph_us(calls: Sequence[Callable[[], Any]]) -> float:
        """µs of a call, all captured as one graph."""
        return time_graph_us(calls) / len(calls)


def measure(
    device: torch.device, rows: int, context: tuple[int, int], launches: Sequence[Launch], heads: Heads = QWEN3_06B,
    max_context: int = MAX_CONTEXT, failures: list[str] | None = None,
) -> list[Timed]:  # fmt: skip
    """Every launch that runs and is right, fastest in the chain first; FlashAttention 3, where installed, last.

    `failures` gets what is wrong.
    """
    bench = Bench(device, rows, context, heads, max_context)
    where = f"attention rows {rows} context {context}"
    right = [launch for launch in launches if checked(bench, launch, where, TOLERANCE, failures)]
    found = [bench.time(partial(bench.attend, launch=launch), launch) for launch in right]
    found.sort(key=lambda timed: timed.chained_us)
    flash = bench.flash_attention_3()
    return [*found, bench.time(flash, "qk_norm_rope_cache + FlashAttention 3")] if flash else found


@dataclass(frozen=True)
class Found:
    """What attention came to at some rows, under which keys.

    timed: launches, the best at long contexts first, or where one launch is for all, at short and long ones together;
        none much slower than another at long ones. The first is the choice for all that `short` is not for
    short: where short contexts may have a launch of their own, the fastest there
    beside: FlashAttention 3 at short ones, if it is there
    """

    rows: int
    key: str
    timed: list[Timed]
    beside: Timed | None
    short_key: str = ""
    short: Sequence[Timed] = ()

    def launches(self) -> list[Any]:
        """What a chain of short contexts may choose from, the best by itself first."""
        return [timed.launch for timed in self.short or self.timed]

    def ordered(self, time_us: Callable[[Any], float]) -> Found:
        """With the launches for all lengths in the order of another measurement; the first stays where none gains."""
        times = [time_us(timed.launch) for timed in self.timed]
        if not times or min(times) >= times[0] * GAIN:
            return self
        order = sorted(range(len(times)), key=times.__getitem__)
        return replace(self, timed=[self.timed[i] for i in order])

    def entries(self, settled: Launch) -> dict[str, dict[str, Any]]:
        """Of the table of choices, by their keys; `settled` is what the chain has chosen."""
        if not self.short:
            return {self.key: self._entry(settled, self.timed)}
        general = {self.key: self._entry(self.timed[0].launch, self.timed)} if self.timed else {}
        return general | {self.short_key: self._entry(settled, self.short)}

    def _entry(self, launch: Launch | str, among: Sequence[Timed]) -> dict[str, Any]:
        us = next(timed.chained_us for timed in among if timed.launch == launch)
        beside = {"flash_attention_us": round(self.beside.chained_us, 2)} if self.beside else {}
        return {"launch": choices.fields_of(launch), "us": round(us, 2), **beside}


def time_attention(device: torch.device, heads: Heads, rows: int, failures: list[str]) -> Found:
    """All candidates at short contexts; at long ones all too where short ones have a launch of their own, else only the
    best. None is kept for all lengths that is far behind at long ones. `failures` gets what is wrong."""
    apart = rows <= SHORT_ROWS
    long = LONG if apart else (512, 768)
    launches = candidates(rows, *heads, MAX_CONTEXT)
    found = measure(device, rows, SHORT, launches, heads, failures=failures)
    beside = next((t for t in found if isinstance(t.launch, str)), None)
    tried = launches if apart else [t.launch for t in found if isinstance(t.launch, Launch)][:TRIES]
    again: dict[Launch | str, Timed] = {
        t.launch: t
        for t in measure(device, rows, long, tried, heads, failures=failures)
        if not isinstance(t.launch, str)
    }
    best_us = min((t.chained_us for t in again.values()), default=0.0)
    limit_us = best_us + LONG_LOSS * abs(best_us)
    kept = [t for t in found if t.launch in again and again[t.launch].chained_us <= limit_us]
    kept.sort(key=lambda t: again[t.launch].chained_us * (1 if apart else t.chained_us))
    for t in kept[:1]:
        print(
            f"{rows:5} attention chained {t.chained_us:6.2f} alone {t.alone_us:6.2f} µs {t.gb_s:5.0f} GB/s, long "
            f"{again[t.launch].chained_us:6.2f} {again[t.launch].gb_s:5.0f}; fastest short {found[0].chained_us:6.2f}; "
            + " ".join(f"{name}={value}" for name, value in choices.fields_of(t.launch).items())
            + (f"; {beside.launch} {beside.chained_us:.2f}, {beside.alone_us:.2f}" if beside else ""),
            flush=True,
        )
    found_here = Found(rows, shape_key(rows, *heads), kept, beside)
    if not apart:
        return found_here
    short = [t for t in found if isinstance(t.launch, Launch)][:TRIES]
    return replace(found_here, short_key=shape_key(rows, *heads, short=True), short=short)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16,256")
    parser.add_argument("--contexts", default="128-256,1024")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda")
    heads = QWEN3_06B
    print(f"{'rows':>5} {'context':>9} {'alone µs':>9} {'chained':>8} {'GB/s':>6} {'error':>8}  launch")
    with choices.none_chosen():
        for rows in map(int, options.rows.split(",")):
            launches = candidates(rows, *heads, options.max_context)
            if not options.all:
                launches = [default_launch(rows, *heads, options.max_context), *launches[1::4]]
            for text in options.contexts.split(","):
                low, _, high = text.partition("-")
                for t in measure(device, rows, (int(low), int(high or low)), launches, heads, options.max_context):
                    times = f"{t.alone_us:9.2f} {t.chained_us:8.2f} {t.gb_s:6.0f}"
                    print(f"{rows:5} {text:>9} {times} {t.error:8.1e}  {t.launch}", flush=True)


if __name__ == "__main__":
    main()
