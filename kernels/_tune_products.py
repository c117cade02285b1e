"""Times a decode step's products, op by op, beside cuBLAS with separate kernels, for `python -m kernels.tune`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choices, decode_head, decode_linear, prefill_gate_up, rms_norm, silu_mul, tile_stats
from kernels._rows import copied_rows
from kernels._timing import checked, poisoned, relative_error, time_graph_us
from kernels._tune_candidates import candidates, head_candidates
from kernels._tune_models import Op
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import reference as head_reference
from kernels.decode_head import shape_key as head_key
from kernels.decode_linear import decode_linear_half_norm, half_norm_reference, reference
from kernels.decode_linear_launch import Launch, shape_key
from kernels.decode_linear_tiled import HalfNormed
from kernels.prefill_linear import Launch as PrefillLaunch

EPS = 1e-6
HEAD_ROWS = 256
"""Above, no launch of the head is tried, and the engine uses cuBLAS and `tile_stats`."""
HALF_COLUMNS = 64
"""Over so many columns each, the sums of squares are taken that come with half-normed rows here."""
TOLERANCE = 1e-2
HEAD_TOLERANCE = 5e-2


def half_normed(x: Tensor, gamma: Tensor) -> HalfNormed:
    """x as a tiled product of HALF_COLUMNS a program leaves it."""
    rows = copied_rows(half_norm_reference(x, gamma).rows)
    squares = x.float().square().unflatten(1, (-1, min(HALF_COLUMNS, x.shape[1]))).sum(2).T.contiguous()
    return HalfNormed(rows, squares)


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
        self.x = copied_rows(torch.randn(rows, self.op.k, device=self.device).bfloat16())
        self.stream = torch.randn(rows, self.op.out, device=self.device).bfloat16()
        self.next_gamma = torch.rand(self.op.out, device=self.device).add_(0.5).bfloat16()
        self.half = half_normed(self.x, self.gamma)
        kept = self.stream.clone()
        self.expected = reference(self.x, self.weights[0], **self._options(kept))

    def _options(self, stream: Tensor) -> dict[str, Any]:
        op = self.op
        gamma = self.gamma if op.norm else None
        return {"norm_weight": gamma, "eps": EPS, "residual": stream if op.residual else None, "gated": op.gated}

    def fused(self, weight: Tensor, launch: Launch | PrefillLaunch, stream: Tensor) -> Tensor | HalfNormed:
        """A tiled launch of `halves`: as in an engine whose other products are tiled too, so that they share norms."""
        if isinstance(launch, Launch) and launch.kernel == "tiled" and launch.halves:
            if self.op.residual:
                return decode_linear_half_norm(self.x, weight, stream, self.next_gamma, dependent=True, launch=launch)
            if self.op.norm:
                return self.rest(self.half, weight, launch)
        return self.whole(self.x, weight, launch, stream)

    def rest(self, half: HalfNormed, weight: Tensor, launch: Launch) -> Tensor:
        """Of the op, where the product before made half of its norm."""
        return decode_linear(half, weight, eps=EPS, gated=self.op.gated, dependent=True, launch=launch)

    def whole(self, x: Tensor, weight: Tensor, launch: Launch | PrefillLaunch | None, stream: Tensor) -> Tensor:
        """All of the op, and nothing of the next, as the engine runs it where `launch` is the choice; None: cuBLAS."""
        if launch is None:
            return self.cublas(x, weight, stream)
        if isinstance(launch, PrefillLaunch):
            return prefill_gate_up(self.norm(x), weight, launch, dependent=True)
        return decode_linear(x, weight, **self._options(stream), dependent=True, launch=launch)

    def norm(self, x: Tensor) -> Tensor:
        """In a kernel of its own."""
        return rms_norm(x, self.gamma, EPS, dependent=True)

    def cublas(self, x: Tensor, weight: Tensor, stream: Tensor) -> Tensor:
        """With separate norm and activation."""
        if self.op.residual:
            return stream.addmm_(x, weight.T)
        y = F.linear(self.norm(x) if self.op.norm else x, weight)
        return silu_mul(y, dependent=True) if self.op.gated else y

    def error(self, launch: Launch | PrefillLaunch) -> float:
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
        """Norm, product and the statistics' kernel, of which the engine launches the last dependently."""
        logits = F.linear(F.rms_norm(self.x, (self.hidden,), self.gamma, EPS), self.weight)
        tile_stats(logits, self.temperatures, dependent=True)
        return logits

    def whole(self, launch: HeadLaunch | None) -> None:
        """As the engine runs the head where `launch` is the choice; None: cuBLAS."""
        if launch is None:
            self.cublas()
        else:
            self.fused(launch)

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
        return [(us, launch) for us, launch in self.timed if is_tiled(launch)]

    def alone(self) -> list[tuple[float, Any]]:
        """Where the neighbour is another kernel, the tiled one wants a norm in front; and cuBLAS, as None."""
        ours = [(us + (self.norm_us if is_tiled(launch) else 0.0), launch) for us, launch in self.timed]
        return sorted([*ours, (self.cublas_us, None)], key=lambda pair: pair[0])

    def choice(self, launch: Any, us: float | None = None) -> dict[str, Any]:
        """The entry of the table of choices; `launch` None is cuBLAS, beside which our fastest stands.

        us: of the launch, where it is not among those timed
        """
        us = next((us for us, other in self.timed if other == launch), self.timed[0][0]) if us is None else us
        beside = {"us": round(us, 2), "cublas_us": round(self.cublas_us, 2)}
        if launch is None:
            return {"path": "cublas", **beside}
        path = {"path": "prefill"} if isinstance(launch, PrefillLaunch) else {}
        return {**path, "launch": choices.fields_of(launch), **beside}

    def line(self) -> str:
        us, launch = self.timed[0]
        norm = f"{self.norm_us:9.2f}" if self.norm_us else " " * 9
        bandwidth = self.weight_bytes / min(us, self.cublas_us) / 1000
        text = " ".join(f"{name}={value}" for name, value in choices.fields_of(launch).items())
        return f"{self.rows:5} {self.op:8} {us:9.2f} {self.cublas_us:9.2f} {norm} {bandwidth:7.0f}  {text}"


HEADER = " rows op         ours µs cuBLAS µs  norm µs    GB/s  best launch"


def is_tiled(launch: Any) -> bool:
    """Whether a product with this launch can take and leave norms in halves."""
    return isinstance(launch, Launch) and launch.kernel == "tiled"


def time_op(bench: Bench, rows: int, quick: bool, failures: list[str]) -> Found:
    """All candidates of one op."""
    op = bench.op
    bench.prepare(rows)
    stream = bench.stream.clone()  # timing adds to it over and over
    timed = []
    for launch in candidates(op, rows, quick):
        if checked(bench, launch, f"{op.name} rows {rows}", TOLERANCE, failures):
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
        if checked(bench, launch, f"head rows {rows}", HEAD_TOLERANCE, failures):
            timed.append((bench.time_us(partial(bench.fused, launch)), launch))
    timed.sort(key=lambda pair: pair[0])
    key = head_key(rows, bench.vocab, bench.hidden)
    return Found("head", rows, key, bench.weight_bytes, timed, bench.time_us(bench.cublas))
