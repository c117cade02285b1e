"""Every RMSNorm and the linear layer behind it: shapes, bytes, operations and the least time they take.

Counted is what must pass between a kernel and memory if each kernel reads each input and writes each output once.
Two kernels, as nano runs them: the norm reads x and the residual, writes their sum and the normalised rows; the product
reads those and the matrix, and writes y. One kernel reads x, the residual and the matrix, and writes the sum and y.
"""

from __future__ import annotations

from dataclasses import dataclass

from scripts.tables.registry import markdown, table
from scripts.tables.sources import ELEMENT_BYTES, GPU, MODELS, Model, floor_us
from scripts.tables.sources import model as shapes_of

ROWS = (1, 32, 256, 1024, 4096)
HEAD_ROWS = 256
"""The head sees one row per sequence of the step, so more rows than sequences run at once do not happen."""


@dataclass(frozen=True)
class Pair:
    """One norm and linear layer on `rows` rows: weight [out, hidden]."""

    name: str
    out: int
    hidden: int
    rows: int

    @property
    def weight_bytes(self) -> int:
        return self.out * self.hidden * ELEMENT_BYTES

    @property
    def unfused_bytes(self) -> int:
        """Activations with two kernels: x, residual, sum, normalised rows twice, y."""
        return (5 * self.hidden + self.out) * self.rows * ELEMENT_BYTES

    @property
    def fused_bytes(self) -> int:
        """Activations with one kernel: x, residual, sum, y."""
        return (3 * self.hidden + self.out) * self.rows * ELEMENT_BYTES

    @property
    def saved_bytes(self) -> int:
        return self.unfused_bytes - self.fused_bytes

    @property
    def saved_share(self) -> float:
        """Of all bytes that two kernels move, the matrix included."""
        return self.saved_bytes / (self.unfused_bytes + self.weight_bytes)

    @property
    def flop(self) -> int:
        """Of the product; the norm's few per element are left out."""
        return 2 * self.rows * self.out * self.hidden

    @property
    def moved_bytes(self) -> int:
        return self.weight_bytes + self.fused_bytes

    @property
    def floor_us(self) -> float:
        return floor_us(self.moved_bytes, self.flop)


def pairs_of(config: Model, rows: int) -> list[Pair]:
    """The two pairs of a layer; up to `HEAD_ROWS` rows also the final norm and the head."""
    found = [
        Pair("input_norm + qkv_proj", config.qkv_rows, config.hidden_size, rows),
        Pair("post_norm + gate_up_proj", 2 * config.intermediate_size, config.hidden_size, rows),
    ]
    if rows <= HEAD_ROWS:
        found.append(Pair("final_norm + lm_head", config.vocab_size, config.hidden_size, rows))
    return found


@table("pairs")
def pairs(model: str) -> str:
    """All pairs of one model, by number of rows."""
    found = [pair for rows in ROWS for pair in pairs_of(shapes_of(model), rows)]
    names = list(dict.fromkeys(pair.name for pair in found))
    found.sort(key=lambda pair: (names.index(pair.name), pair.rows))
    head = [
        "pair", "weight [out, in]", "rows", "weight MB", "activations MB: two kernels", "one kernel", "saved MB",
        "of all", "GFLOP", "FLOP/B", "floor µs",
    ]  # fmt: skip
    return markdown(head, [_row(pair) for pair in found], left=2)


@table("pairs-by-model")
def pairs_by_model() -> str:
    """The same of every model but the first, a column per number of rows."""
    rows = []
    for name in MODELS[1:]:
        by_name: dict[str, dict[int, Pair]] = {}
        for pair in (pair for rows_ in ROWS for pair in pairs_of(shapes_of(name), rows_)):
            by_name.setdefault(pair.name, {})[pair.rows] = pair
        for pair_name, sizes in by_name.items():
            one = sizes[ROWS[0]]
            weight = f"{one.out} × {one.hidden}<br>{one.weight_bytes / 1e6:.2f} MB"
            rows.append([name, pair_name, weight, *(_cell(sizes[n]) if n in sizes else "" for n in ROWS)])
    return markdown(["model", "pair", "weight", *(f"rows: {n}" for n in ROWS)], rows, left=3)


def _row(pair: Pair) -> list[str]:
    return [
        pair.name, f"{pair.out} × {pair.hidden}", str(pair.rows), f"{pair.weight_bytes / 1e6:.2f}",
        f"{pair.unfused_bytes / 1e6:.3f}", f"{pair.fused_bytes / 1e6:.3f}", f"{pair.saved_bytes / 1e6:.3f}",
        f"{pair.saved_share:.1%}", f"{pair.flop / 1e9:.3f}", f"{pair.flop / pair.moved_bytes:.1f}",
        f"{pair.floor_us:.1f}",
    ]  # fmt: skip


def _cell(pair: Pair) -> str:
    lines = [
        f"{pair.unfused_bytes / 1e6:.3f} → {pair.fused_bytes / 1e6:.3f} MB",
        f"−{pair.saved_bytes / 1e6:.3f} MB ({pair.saved_share:.1%})",
        f"{pair.flop / 1e9:.3f} GFLOP",
        f"{pair.flop / pair.moved_bytes:.1f} FLOP/B",
        f"{pair.floor_us:.1f} µs",
    ]
    return "<br>".join(lines)


@table("roofline")
def roofline() -> str:
    """Where the floors come from."""
    return f"Floors: {GPU}; the larger of bytes / bandwidth and operations / rate."
