"""Every RMSNorm and the linear layer behind it: shapes, bytes, operations and the least time they take.

Counted is what must pass between a kernel and memory if each kernel reads each input and writes each output once
(`harness.roofline.costs`).
Two kernels, as nano runs them: the norm reads x and the residual, writes their sum and the normalised rows; the product
reads those and the matrix, and writes y. One kernel reads x, the residual and the matrix, and writes the sum and y.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.roofline.costs import Cost, Load, cost
from scripts.tables.registry import markdown, table
from scripts.tables.sources import GPU, MODELS, Model, floor_us
from scripts.tables.sources import model as shapes_of

ROWS = (1, 32, 256, 1024, 4096)
HEAD_ROWS = 256
"""The head sees one row per sequence of the step, so more rows than sequences run at once do not happen."""


@dataclass(frozen=True)
class Pair:
    """One norm and the linear layer behind it, on `rows` rows."""

    config: Model
    norm: str
    linear: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.norm} + {self.linear}"

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.config.matrices[self.linear]

    @property
    def one(self) -> Cost:
        """With one kernel: x, residual, sum, y."""
        return cost(self.config, f"{self.norm}+{self.linear}", self._load)

    @property
    def two(self) -> Cost:
        """With two kernels: x, residual, sum, normalised rows twice, y."""
        return cost(self.config, self.norm, self._load) + cost(self.config, self.linear, self._load)

    @property
    def _load(self) -> Load:
        """As many sequences as rows: the head sees one row of each."""
        return Load(self.rows, self.rows, 0)

    @property
    def saved_bytes(self) -> int:
        return self.two.bytes - self.one.bytes

    @property
    def saved_share(self) -> float:
        """Of all bytes that two kernels move, the matrix included."""
        return self.saved_bytes / self.two.bytes

    @property
    def floor_us(self) -> float:
        return floor_us(self.one.bytes, self.one.flop)


def pairs_of(config: Model, rows: int) -> list[Pair]:
    """The two pairs of a layer; up to `HEAD_ROWS` rows also the final norm and the head."""
    found = [Pair(config, "input_norm", "qkv_proj", rows), Pair(config, "post_norm", "gate_up_proj", rows)]
    if rows <= HEAD_ROWS:
        found.append(Pair(config, "final_norm", "lm_head", rows))
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
            weight = f"{_weight(one)}<br>{one.one.weight_bytes / 1e6:.2f} MB"
            rows.append([name, pair_name, weight, *(_cell(sizes[n]) if n in sizes else "" for n in ROWS)])
    return markdown(["model", "pair", "weight", *(f"rows: {n}" for n in ROWS)], rows, left=3)


def _weight(pair: Pair) -> str:
    out, inside = pair.weight_shape
    return f"{out} × {inside}"


def _row(pair: Pair) -> list[str]:
    one, two = pair.one, pair.two
    return [
        pair.name, _weight(pair), str(pair.rows), f"{one.weight_bytes / 1e6:.2f}",
        f"{two.activation_bytes / 1e6:.3f}", f"{one.activation_bytes / 1e6:.3f}", f"{pair.saved_bytes / 1e6:.3f}",
        f"{pair.saved_share:.1%}", f"{one.flop / 1e9:.3f}", f"{one.flop / one.bytes:.1f}", f"{pair.floor_us:.1f}",
    ]  # fmt: skip


def _cell(pair: Pair) -> str:
    one, two = pair.one, pair.two
    lines = [
        f"{two.activation_bytes / 1e6:.3f} → {one.activation_bytes / 1e6:.3f} MB",
        f"−{pair.saved_bytes / 1e6:.3f} MB ({pair.saved_share:.1%})",
        f"{one.flop / 1e9:.3f} GFLOP",
        f"{one.flop / one.bytes:.1f} FLOP/B",
        f"{pair.floor_us:.1f} µs",
    ]
    return "<br>".join(lines)


@table("roofline")
def roofline() -> str:
    """Where the floors come from."""
    return f"Floors: {GPU}; the larger of bytes / bandwidth and operations / rate."
