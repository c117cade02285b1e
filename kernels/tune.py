"""Measures how the kernels run best on this machine's GPU and writes `choices/<gpu>.json`.

    python -m kernels.tune [--quick] [--model qwen3-0.6b] [--rows 1,16]
                           [--ops qkv,o,gate_up,down,head,attention,prefill] [--dry-run]

Each candidate is checked against the reference (its output poisoned with NaN before) and timed as a captured graph of
dependent launches over as many weight matrices as the model has layers, so that the L2 does not hold them: the
median of some replays. cuBLAS with separate norm and activation runs beside them in the same way; where it wins, the
choice says so. The tiled kernel takes its norm half made from the product before, so such pairs are chosen together.
The best are then tried in the chain of all layers and, for few rows, the head, because a kernel's neighbours share the
multiprocessors with it.

Attention is timed between the projections before and after it, whose time is taken off again, at short and at long
contexts: one launch serves all lengths, and the best is that of the least product of both times.

Prefill's products with their ends (`prefill`) are timed by kernels/_tune_prefill.py; `--rows` are decode's.

Kernels are compiled first, by many processes, into Triton's cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    choices,
    decode_attention,
    decode_head,
    decode_linear,
    rms_norm,
    silu_mul,
    tile_stats,
)
from kernels._timing import poisoned, relative_error, time_graph_us
from kernels._triton import triton
from kernels._tune_attention import Heads, Timed, measure
from kernels.decode_attention import Launch as AttentionLaunch
from kernels.decode_attention import candidates as attention_candidates
from kernels.decode_attention import shape_key as attention_key
from kernels.decode_attention import workspace
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import default_launch as default_head
from kernels.decode_head import reference as head_reference
from kernels.decode_head import shape_key as head_key
from kernels.decode_linear import (
    MATRIX_PASSES,
    Launch,
    decode_linear_half_norm,
    default_launch,
    half_norm_reference,
    matrix_candidates,
    reference,
    shape_key,
)
from kernels.decode_linear_tiled import HalfNormed
from kernels.sample import TILE

EPS = 1e-6
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 16, 64)
HEAD_VECTOR_ROWS = 4
HEAD_ROWS = 16
"""Above, the engine uses cuBLAS and `tile_stats`."""
VECTOR_ROWS = 8
MAX_CONTEXT = 4096
ATTENTION_TRIES = 5
"""How many of the fastest at short contexts are timed at long ones."""
MATRIX_ROWS = 64
TILED_ROWS = 8
"""From here on the tiled kernel is tried, with norms in halves."""
HALF_COLUMNS = 64
"""Over so many columns each, the sums of squares are taken that come with half-normed rows here."""
PAIRS = (("o", "gate_up"), ("down", "qkv"))
"""Products with a norm between them, of which the tiled kernel can make half in the first, half in the second."""
PREFILL_SECONDS = 150.0
"""After so long no other candidate of prefill is begun."""
WORKERS = 14
TOLERANCE = 1e-2
HEAD_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Op:
    """One product of a layer: `out` columns of output from `k` of input."""

    name: str
    out: int
    k: int
    norm: bool = False
    gated: bool = False
    residual: bool = False

    @property
    def weight_rows(self) -> int:
        return self.out * 2 if self.gated else self.out

    @property
    def weight_bytes(self) -> int:
        return self.weight_rows * self.k * 2


@dataclass(frozen=True)
class Model:
    """What of a model's shape its products depend on."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def ops(self) -> list[Op]:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Op("qkv", wide + 2 * narrow, self.hidden, norm=True),
            Op("o", self.hidden, wide, residual=True),
            Op("gate_up", self.inter, self.hidden, norm=True, gated=True),
            Op("down", self.hidden, self.inter, residual=True),
        ]


MODELS = {
    "qwen3-0.6b": Model(28, 1024, 3072, 16, 8, 128, 151936),
    "qwen3-1.7b": Model(28, 2048, 6144, 16, 8, 128, 151936),
    "qwen3-4b": Model(36, 2560, 9728, 32, 8, 128, 151936),
    "qwen3-8b": Model(36, 4096, 12288, 32, 8, 128, 151936),
    "qwen2.5-0.5b": Model(24, 896, 4864, 14, 2, 64, 151936),
    "llama-3.2-1b": Model(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.1-8b": Model(32, 4096, 14336, 32, 8, 128, 128256),
}


def candidates(op: Op, rows: int, quick: bool) -> list[Launch]:
    """Launches worth timing, the default first."""
    found = [default_launch(rows, op.out, op.k, op.gated, 2)]
    if rows <= VECTOR_ROWS:
        found += _vector_candidates(op)
    if rows <= MATRIX_ROWS:
        found += matrix_candidates(rows, op.out, op.k, op.gated, 2)
    if rows >= TILED_ROWS:
        found += _tiled_candidates(op, rows, quick)
    return list(dict.fromkeys(found))


def _vector_candidates(op: Op) -> Iterable[Launch]:
    """4 to 16 KiB of W per warp: 32 to 128 registers of each thread."""
    row_bytes = op.k * 2 * (2 if op.gated else 1)
    for num_warps in (1, 2, 4):
        for block_n in (1, 2, 4, 8):
            if 4096 <= block_n * row_bytes / num_warps <= 16384:
                # Without a limit the compiler spreads x's loads over the sums, and each of them is waited for.
                for registers in (0, 255 if num_warps == 1 else 128):
                    yield Launch("vector", block_n, 256 * num_warps, num_warps, registers=registers)


def _tiled_candidates(op: Op, rows: int, quick: bool) -> Iterable[Launch]:
    """Tiles of W of 32 to 128 rows for 64 to 400 programs: their W held, or few and many loads under way in a loop."""
    padded = max(16, 1 << (rows - 1).bit_length())
    for block_m in {min(64, padded), min(128, padded)}:
        for tile_n in (32, 64, 128):
            block_n = tile_n // 2 if op.gated else tile_n
            tiles = -(-op.out // block_n) * -(-rows // block_m)
            warps = 8 if tile_n * block_m > 64 * 64 else 4
            for split_k in (1, 2, 4, 6, 8, 12, 16):
                part = op.k // split_k
                if op.k % split_k or not 64 <= tiles * split_k <= 400:
                    continue
                if part in (128, 256, 512) and (tile_n + block_m) * part * 2 <= 160 << 10:
                    # A thread's registers hold W's part, then x's, and in the end the sums' tiles of all parts.
                    held = max(tile_n, block_m) * part // 64
                    held_warps = max(4, min(8, held // 64))
                    if split_k == 1 or split_k * tile_n * block_m < 512 * 32 * held_warps:
                        yield Launch("tiled", block_n, part, held_warps, block_m, 1, split_k)
                block_k = 128 if block_m <= 64 and tile_n <= 64 else 64
                if split_k > 4 or part % block_k or part < 3 * block_k:
                    continue
                stage_bytes = (tile_n + block_m) * block_k * 2
                # The next kernel's programs start early only if there is room for both.
                for shared_bytes in (108 << 10,) if quick else (108 << 10, 200 << 10):
                    num_stages = min(6, part // block_k, shared_bytes // stage_bytes)
                    if num_stages >= 2:
                        yield Launch("tiled", block_n, block_k, warps, block_m, num_stages, split_k)


def head_candidates(rows: int, hidden: int, quick: bool) -> list[HeadLaunch]:
    """Launches of the head worth timing, the default first."""
    found = [default_head(hidden, 2)]
    for block_n, num_warps, registers in ((4, 1, 255), (8, 2, 128), (8, 4, 128)) if rows <= HEAD_VECTOR_ROWS else ():
        found.append(HeadLaunch(product=Launch("vector", block_n, 256 * num_warps, num_warps, registers=registers)))
    for block_n, num_warps, chunks in ((16, 4, 1), (16, 4, 4), (8, 4, 1), (16, 8, 1)) if rows > 1 else ():
        block_k = 32 * num_warps * chunks
        product = Launch("matrix", block_n, block_k, num_warps, block_m=8 if rows <= 8 else 16, registers=255)
        found.append(HeadLaunch(product=product))
    for block_k, num_stages in ((64, 4), (128, 3)) if quick else ((64, 3), (64, 4), (64, 5), (128, 3), (128, 5)):
        for num_warps in (4, 8):
            found += [HeadLaunch(block_k, num_warps, num_stages, ahead) for ahead in ((1,) if quick else (0, 2))]
    return list(dict.fromkeys(found))


def half_normed(x: Tensor, gamma: Tensor) -> HalfNormed:
    """x as a tiled product of HALF_COLUMNS a program leaves it."""
    half = half_norm_reference(x, gamma)
    squares = x.float().square().unflatten(1, (-1, min(HALF_COLUMNS, x.shape[1]))).sum(2).T.contiguous()
    return HalfNormed(half.rows, squares)


class Bench:
    """Random data of one op for some rows, and the calls to time over it."""

    def __init__(self, op: Op, layers: int, device: torch.device) -> None:
        self.op = op
        self.weights = [
            torch.randn(op.weight_rows, op.k, device=device).mul_(op.k**-0.5).bfloat16() for _ in range(layers)
        ]
        self.gamma = torch.rand(op.k, device=device).add_(0.5).bfloat16()
        self.device = device

    def prepare(self, rows: int) -> None:
        """Fresh x and residual, and what the op makes of them with the first weights."""
        self.x = torch.randn(rows, self.op.k, device=self.device).bfloat16()
        self.stream = torch.randn(rows, self.op.out, device=self.device).bfloat16()
        self.next_gamma = torch.rand(self.op.out, device=self.device).add_(0.5).bfloat16()
        self.half = half_normed(self.x, self.gamma)
        kept = self.stream.clone()
        self.expected = reference(self.x, self.weights[0], **self._options(kept))

    def _options(self, stream: Tensor) -> dict[str, Any]:
        op = self.op
        gamma = self.gamma if op.norm else None
        return {"norm_weight": gamma, "eps": EPS, "residual": stream if op.residual else None, "gated": op.gated}

    def fused(self, weight: Tensor, launch: Launch, stream: Tensor) -> Tensor | HalfNormed:
        """The tiled kernel's norms in halves, as in an engine whose other products are tiled too."""
        if launch.kernel == "tiled" and self.op.residual:
            return decode_linear_half_norm(self.x, weight, stream, self.next_gamma, dependent=True, launch=launch)
        if launch.kernel == "tiled" and self.op.norm:
            return decode_linear(self.half, weight, eps=EPS, gated=self.op.gated, dependent=True, launch=launch)
        return decode_linear(self.x, weight, **self._options(stream), dependent=True, launch=launch)

    def norm(self, x: Tensor) -> Tensor:
        """In a kernel of its own."""
        return rms_norm(x, self.gamma, EPS, dependent=True)

    def cublas(self, x: Tensor, weight: Tensor, stream: Tensor) -> Tensor:
        """As the engine runs it where this is the choice."""
        if self.op.residual:
            return stream.addmm_(x, weight.T)
        y = F.linear(self.norm(x) if self.op.norm else x, weight)
        return silu_mul(y, dependent=True) if self.op.gated else y

    def error(self, launch: Launch) -> float:
        """Relative error of a launch, in all that it writes; NaN where it left something unwritten."""
        stream = self.stream.clone()
        out = poisoned(lambda: self.fused(self.weights[0], launch, stream))
        if not isinstance(out, HalfNormed):
            return relative_error(out, self.expected)
        half = half_norm_reference(stream, self.next_gamma)
        pairs = ((stream, self.expected), (out.rows, half.rows), (out.squares.sum(0), half.squares.sum(0)))
        return sum(relative_error(ours, theirs) for ours, theirs in pairs)  # max() would lose a NaN

    def time_us(self, call: Callable[[Tensor], Any]) -> float:
        """µs per call over all weights in turn."""
        return time_graph_us([partial(call, weight) for weight in self.weights]) / len(self.weights)


class HeadBench:
    """Random data of the head; its one matrix is far larger than any L2."""

    def __init__(self, hidden: int, vocab: int, device: torch.device) -> None:
        self.hidden, self.vocab, self.device = hidden, vocab, device
        self.gamma = torch.rand(hidden, device=device).add_(0.5).bfloat16()
        self.weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16).mul_(hidden**-0.5)

    @property
    def weight_bytes(self) -> int:
        return self.hidden * self.vocab * 2

    def prepare(self, rows: int) -> None:
        """Fresh x, and what the head makes of it."""
        self.x = torch.randn(rows, self.hidden, device=self.device).bfloat16()
        self.temperatures = torch.full((rows,), 0.6, device=self.device)
        self.expected = head_reference(self.x, self.gamma, self.weight, EPS, self.temperatures)

    def fused(self, launch: HeadLaunch) -> tuple[Tensor, Tensor, Tensor]:
        return decode_head(self.x, self.gamma, self.weight, EPS, self.temperatures, dependent=True, launch=launch)

    def cublas(self) -> Tensor:
        """Norm, product and the statistics' kernel."""
        logits = F.linear(F.rms_norm(self.x, (self.hidden,), self.gamma, EPS), self.weight)
        tile_stats(logits, self.temperatures)
        return logits

    def error(self, launch: HeadLaunch) -> float:
        """The greatest relative error of logits and statistics; NaN where something was left unwritten."""
        out = poisoned(lambda: self.fused(launch))
        errors = [relative_error(ours, theirs) for ours, theirs in zip(out, self.expected, strict=True)]
        return sum(errors)  # max() would lose a NaN

    def time_us(self, call: Callable[[], Any]) -> float:
        return time_graph_us([call] * 4) / 4


@dataclass(frozen=True)
class Found:
    """What one op came to at some rows: candidates by time, fastest first, and what ran beside them."""

    op: str
    rows: int
    key: str
    weight_bytes: int
    timed: list[tuple[float, Any]]
    cublas_us: float
    norm_us: float = 0.0

    def tiled(self) -> list[tuple[float, Any]]:
        return [(us, launch) for us, launch in self.timed if launch.kernel == "tiled"]

    def alone(self) -> list[tuple[float, Any]]:
        """Where the neighbour is another kernel, the tiled one wants a norm in front; and cuBLAS, as None."""
        ours = [(us + (self.norm_us if launch.kernel == "tiled" else 0.0), launch) for us, launch in self.timed]
        return sorted([*ours, (self.cublas_us, None)], key=lambda pair: pair[0])

    def choice(self, launch: Any) -> dict[str, Any]:
        """The entry of the table of choices; `launch` None is cuBLAS, beside which our fastest stands."""
        us = next((us for us, other in self.timed if other == launch), self.timed[0][0])
        beside = {"us": round(us, 2), "cublas_us": round(self.cublas_us, 2)}
        return {"path": "cublas", **beside} if launch is None else {"launch": _brief(launch), **beside}

    def line(self) -> str:
        us, launch = self.timed[0]
        norm = f"{self.norm_us:9.2f}" if self.norm_us else " " * 9
        bandwidth = self.weight_bytes / min(us, self.cublas_us) / 1000
        text = " ".join(f"{name}={value}" for name, value in _brief(launch).items())
        return f"{self.rows:5} {self.op:8} {us:9.2f} {self.cublas_us:9.2f} {norm} {bandwidth:7.0f}  {text}"


HEADER = " rows op         ours µs cuBLAS µs  norm µs    GB/s  best launch"


def _brief(launch: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    values = {f.name: getattr(launch, f.name) for f in fields(launch) if getattr(launch, f.name) != f.default}
    return {name: _brief(value) if is_dataclass(value) else value for name, value in values.items()}


def time_op(bench: Bench, rows: int, quick: bool, failures: list[str]) -> Found:
    """All candidates of one op."""
    op = bench.op
    bench.prepare(rows)
    stream = bench.stream.clone()  # timing adds to it over and over
    timed = []
    for launch in candidates(op, rows, quick):
        try:
            error = bench.error(launch)
        except triton.runtime.errors.OutOfResources:
            continue
        if not error < TOLERANCE:
            failures.append(f"{op.name} rows {rows} {launch}: relative error {error:.3g}")
            continue
        timed.append((bench.time_us(partial(bench.fused, launch=launch, stream=stream)), launch))
    timed.sort(key=lambda pair: pair[0])
    norm = bench.time_us(lambda _weight: bench.norm(bench.x)) if op.norm else 0.0
    cublas = bench.time_us(lambda weight: bench.cublas(bench.x, weight, stream))
    return Found(op.name, rows, shape_key(rows, op.out, op.k, op.gated), op.weight_bytes, timed, cublas, norm)


def time_head(bench: HeadBench, rows: int, quick: bool, failures: list[str]) -> Found:
    """All candidates of the head."""
    bench.prepare(rows)
    timed = []
    for launch in head_candidates(rows, bench.hidden, quick):
        try:
            error = bench.error(launch)
        except triton.runtime.errors.OutOfResources:
            continue
        if not error < HEAD_TOLERANCE:
            failures.append(f"head rows {rows} {launch}: relative error {error:.3g}")
            continue
        timed.append((bench.time_us(partial(bench.fused, launch)), launch))
    timed.sort(key=lambda pair: pair[0])
    key = head_key(rows, bench.vocab, bench.hidden)
    return Found("head", rows, key, bench.weight_bytes, timed, bench.time_us(bench.cublas))


class Chain:
    """The products of all layers (and the head) as one graph: what a step takes at least, attention left out."""

    def __init__(self, benches: dict[str, Bench], head: HeadBench | None, rows: int) -> None:
        self.benches, self.head = benches, head
        qkv, o = benches["qkv"], benches["o"]
        self.hidden, self.attended = (torch.randn(rows, b.op.k, device=b.device).bfloat16() for b in (qkv, o))
        self.first = half_normed(self.hidden, qkv.gamma)
        if head:
            head.prepare(rows)

    def calls(self, launches: dict[str, Any], same_layer: bool = False) -> list[Callable[[], Any]]:
        """The step's launches, in order; `same_layer`: the first layer's weights in every layer."""
        halves = {second: all(is_tiled(launches[name]) for name in (first, second)) for first, second in PAIRS}
        carried: list[Tensor | HalfNormed] = [self.first if halves["qkv"] else self.hidden]

        def layer(i: int) -> None:
            self._run("qkv", launches, carried[0], i)
            half = self._run("o", launches, self.attended, i, self._gamma("gate_up", halves))
            inter = self._run("gate_up", launches, half, i)
            assert isinstance(inter, Tensor)
            carried[0] = self._run("down", launches, inter, i, self._gamma("qkv", halves))

        layers = [partial(layer, 0 if same_layer else i) for i in range(len(self.benches["qkv"].weights))]
        return [*layers, partial(self._run_head, launches)] if self.head else list(layers)

    def _gamma(self, name: str, halves: dict[str, bool]) -> Tensor | None:
        """Of the norm of which the product before makes half."""
        return self.benches[name].gamma if halves[name] else None

    def _run(
        self, name: str, launches: dict[str, Any], x: Tensor | HalfNormed, i: int, next_gamma: Tensor | None = None
    ) -> Tensor | HalfNormed:
        bench, launch = self.benches[name], launches[name]
        weight, stream = bench.weights[i], self.hidden
        if next_gamma is not None:
            assert isinstance(x, Tensor)
            return decode_linear_half_norm(x, weight, stream, next_gamma, dependent=True, launch=launch)
        if isinstance(x, HalfNormed):
            return decode_linear(x, weight, eps=EPS, gated=bench.op.gated, dependent=True, launch=launch)
        if launch is None:
            return bench.cublas(x, weight, stream)
        return decode_linear(
            x, weight, norm_weight=bench.gamma if bench.op.norm else None, eps=EPS,
            residual=stream if bench.op.residual else None, gated=bench.op.gated, dependent=True, launch=launch,
        )  # fmt: skip

    def _run_head(self, launches: dict[str, Any]) -> None:
        assert self.head is not None
        self.head.x = self.hidden
        self.head.fused(launches["head"])

    def time_us(self, launches: dict[str, Any], same_layer: bool = False) -> float:
        self.hidden.normal_()
        return time_graph_us(self.calls(launches, same_layer))


def is_tiled(launch: Any) -> bool:
    """Whether a product with this launch takes and leaves norms in halves."""
    return launch is not None and getattr(launch, "kernel", "") == "tiled"


def best_pairs(found: dict[str, Found]) -> dict[str, Any]:
    """The fastest launches by their own times, both tiled or each as it is alone; None for cuBLAS."""
    launches: dict[str, Any] = {name: result.alone()[0][1] for name, result in found.items() if name != "head"}
    for first, second in PAIRS:
        if first in found and second in found and found[first].tiled() and found[second].tiled():
            (first_us, first_launch), (second_us, second_launch) = found[first].tiled()[0], found[second].tiled()[0]
            if first_us + second_us < found[first].alone()[0][0] + found[second].alone()[0][0]:
                launches |= {first: first_launch, second: second_launch}
    return launches | {name: result.timed[0][1] for name, result in found.items() if name == "head"}


def settle_in_chain(
    chain: Chain, found: dict[str, Found], launches: dict[str, Any], tries: int
) -> tuple[dict[str, Any], float]:
    """From `launches`, take another of an op's `tries` best of the same kernel wherever the whole chain gets faster."""
    best = chain.time_us(launches)
    for name, result in found.items():
        for _, launch in result.timed[:tries]:
            if launch == launches[name] or is_tiled(launch) != is_tiled(launches[name]):
                continue
            us = chain.time_us({**launches, name: launch})
            if us < best * 0.998:  # not for what the next run may turn around
                launches, best = {**launches, name: launch}, us
    return launches, best


def time_attention(model: Model, rows: int) -> tuple[str, list[Timed], Timed | None]:
    """(key, launches timed at short and at long contexts, best first; FlashAttention 3 at short ones, if there)."""
    heads, device = Heads(model.heads, model.kv_heads, model.head_dim), torch.device("cuda")
    short, long = (128, 256), (1024, 2048) if rows <= 16 else (512, 768)
    found = measure(device, rows, short, attention_candidates(rows, *heads, MAX_CONTEXT), heads)
    beside = [t for t in found if isinstance(t.launch, str)]
    best = [t for t in found if not isinstance(t.launch, str)]
    again = {
        t.launch: t
        for t in measure(
            device,
            rows,
            long,
            [t.launch for t in best[:ATTENTION_TRIES] if isinstance(t.launch, AttentionLaunch)],
            heads,
        )
    }
    best = [t for t in best if t.launch in again]
    best.sort(key=lambda t: t.chained_us * again[t.launch].chained_us)
    for t in best[:1]:
        print(
            f"{rows:5} attention chained {t.chained_us:6.2f} alone {t.alone_us:6.2f} µs {t.gb_s:5.0f} GB/s, long "
            f"{again[t.launch].chained_us:6.2f} {again[t.launch].gb_s:5.0f}; fastest short {found[0].chained_us:6.2f}; "
            + " ".join(f"{name}={value}" for name, value in _brief(t.launch).items())
            + "".join(f"; {b.launch} {b.chained_us:.2f}, {b.alone_us:.2f}" for b in beside),
            flush=True,
        )
    return attention_key(rows, *heads), best, beside[0] if beside else None


def _compile(jobs: list[tuple[Op | Model, int, Any]]) -> None:
    """In a process of its own: launch each job once, which leaves its kernel in Triton's cache."""
    device = torch.device("cuda")
    for subject, rows, launch in jobs:
        bench: Any
        if isinstance(launch, AttentionLaunch):
            call = partial(_attend_once, subject, launch)
        elif isinstance(subject, Op):
            bench = Bench(subject, 1, device)
            bench.prepare(rows)
            call = partial(bench.fused, bench.weights[0], launch, bench.stream)
        else:
            bench = HeadBench(subject.hidden, 16 * TILE, device)
            bench.prepare(rows)
            call = partial(bench.fused, launch)
        with suppress(triton.runtime.errors.OutOfResources):  # found again, and left out, when it is timed
            call()
    torch.cuda.synchronize()


def _attend_once(model: Any, launch: AttentionLaunch) -> None:
    """On a cache of one block, whose contents do not matter."""
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
    new = lambda *shape: torch.zeros(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    numbers = torch.zeros(1, MAX_CONTEXT // 256, dtype=torch.int32, device="cuda")
    decode_attention(
        new(1, (heads + 2 * kv_heads) * dim), new(dim), new(dim), torch.zeros(MAX_CONTEXT, dim, device="cuda"),
        numbers[0, :1], numbers, new(1, 256, kv_heads, dim), new(1, 256, kv_heads, dim), heads, kv_heads, dim, EPS,
        dim**-0.5, workspace=workspace(1, heads, dim, torch.device("cuda")), dependent=True, launch=launch,
    )  # fmt: skip


def _compiled_for(launch: Launch, rows: int) -> int:
    """What of the rows a kernel is compiled for: vector for each, matrix for its passes, tiled for none."""
    if launch.kernel == "vector":
        return rows
    return min(MATRIX_PASSES, triton.next_power_of_2(-(-rows // launch.block_m))) if launch.kernel == "matrix" else 0


def compile_all(
    model: Model, ops: list[Op], rows: list[int], with_head: bool, with_attention: bool, quick: bool
) -> int:
    """Fill Triton's cache from several processes at once; how many kernels were asked for."""
    jobs: dict[Any, tuple[Op | Model, int, Any]] = {}
    for count in rows:
        for op in ops:
            for launch in candidates(op, count, quick):
                jobs.setdefault((op, launch, _compiled_for(launch, count)), (op, count, launch))
        if with_attention:
            for attention in attention_candidates(count, model.heads, model.kv_heads, model.head_dim, MAX_CONTEXT):
                jobs.setdefault(attention, (model, 1, attention))
        if with_head and count <= HEAD_ROWS:
            for head_launch in head_candidates(count, model.hidden, quick):
                compiled_for = _compiled_for(head_launch.product, count) if head_launch.product else int(count > 1)
                jobs.setdefault((head_launch, compiled_for), (model, count, head_launch))
    work = list(jobs.values())
    workers = min(WORKERS, max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, [work[i::workers] for i in range(workers)], chunksize=1)
    return len(work)


def main() -> None:
    """See this module's docstring."""
    parser = argparse.ArgumentParser(description="Measure how the kernels run best on this GPU.")
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=None)
    parser.add_argument(
        "--ops",
        type=lambda text: text.split(","),
        default=["qkv", "o", "gate_up", "down", "head", "attention", "prefill"],
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and fewer candidates, under a minute")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no table of choices")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.tune measures on an NVIDIA GPU, and there is none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    model = MODELS[arguments.model]
    rows = arguments.rows or list(QUICK_ROWS if arguments.quick else ROWS)
    ops = [op for op in model.ops() if op.name in arguments.ops]
    with_head, with_attention = "head" in arguments.ops, "attention" in arguments.ops
    start = time.perf_counter()
    kernels_compiled = compile_all(model, ops, rows, with_head, with_attention, arguments.quick)
    print(f"{kernels_compiled} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)

    benches = {op.name: Bench(op, model.layers, device) for op in ops}
    head_bench = HeadBench(model.hidden, model.vocab, device) if with_head else None
    failures: list[str] = []
    table: dict[str, dict[str, Any]] = {"decode_linear": {}, "decode_head": {}, "decode_attention": {}}
    for count in rows if with_attention else []:
        key, timed, beside = time_attention(model, count)
        if timed:
            entry = {"launch": _brief(timed[0].launch), "us": round(timed[0].chained_us, 2)}
            table["decode_attention"][key] = entry | (
                {"flash_attention_us": round(beside.chained_us, 2)} if beside else {}
            )
    print(HEADER)
    for count in rows:
        found: dict[str, Found] = {
            name: time_op(bench, count, arguments.quick, failures) for name, bench in benches.items()
        }
        if head_bench and count <= HEAD_ROWS:
            found["head"] = time_head(head_bench, count, arguments.quick, failures)
        for result in found.values():
            print(result.line(), flush=True)
        launches = best_pairs(found)
        if len(benches) == 4:
            chain = Chain(benches, head_bench if "head" in found else None, count)
            start_us = chain.time_us(launches)
            settled, us = settle_in_chain(chain, found, launches, 3 if arguments.quick else 6)
            print(
                f"{count:5} chain: {us / 1000:.3f} ms with {_differences(launches, settled)}; each op's best alone "
                f"{start_us / 1000:.3f} ms",
                flush=True,
            )
            launches = settled
        for name, result in found.items():
            kernel = "decode_head" if name == "head" else "decode_linear"
            table[kernel][result.key] = result.choice(launches[name])
    for failure in failures:
        print("WRONG", failure)
    if "prefill" in arguments.ops:
        from kernels import _tune_prefill  # it knows the models from here

        prompts = _tune_prefill.QUICK_ROWS if arguments.quick else _tune_prefill.ROWS
        table |= _tune_prefill.measured(model, device, prompts, PREFILL_SECONDS)
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    if not arguments.dry_run:
        print("written:", choices.save(device, table, facts).name)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if failures:
        raise SystemExit(1)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Which ops' launches in the chain are not their best alone."""
    other = [
        f"{name} {_brief(launch) if launch else 'cuBLAS'}" for name, launch in after.items() if launch != before[name]
    ]
    return ", ".join(other) or "each op's best alone"


if __name__ == "__main__":
    main()
