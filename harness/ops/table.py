"""A study for people: a table per product, and in a sentence where fusing wins and where it loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WORDS = {"faster": "wins", "slower": "loses", "even": "is even"}
COLD = "each call finds inputs and weights gone from the L2 (buffers in rotation inside one CUDA graph)"
LOOPED = "calls in a row by the wall clock, caches warm"


def print_study(record: Mapping[str, Any], console: Console) -> None:
    """All products of a study's `run.json`."""
    names = [name for name, told in record["variants"].items() if told["status"] == "ok"]
    how = COLD if record["device"] == "cuda" else LOOPED
    console.print(f"{record['workload']}, {record['dtype']} on {record['device']}: median us of one call; {how}.")
    for product in record["study"]:
        console.print(table(product, names))
        for line in crossovers(product["rows"]):
            console.print(line, markup=False, soft_wrap=True)
    for name, told in record["variants"].items():
        if told["status"] != "ok":
            console.print(f"{name} is left out: {told['status']}", markup=False, soft_wrap=True)
        elif told["version"]:
            console.print(f"{name}: version {told['version']}", markup=False)


def table(product: Mapping[str, Any], names: Sequence[str]) -> Table:
    """One product. What stands right of the ratio is of the fastest fused variant: its rates count each input and
    output once, and what it saves is the traffic of intermediate tensors."""
    bias = " with bias" if product["bias"] else ""
    models = ", ".join(product["models"])
    made = Table(title=f"{product['op']}{bias}, W {product['weight_rows']} x {product['k']} ({models})",
                 title_justify="left")  # fmt: skip
    for name in ("rows", *names, "best fused / best unfused", "GB/s", "TFLOP/s", "of ceiling", "saved MB"):
        made.add_column(name, justify="right")
    for shape in product["rows"]:
        cells = shape["variants"]
        made.add_row(f"{shape['rows']:,}", *(_time(cells.get(name)) for name in names), *_outcome(shape))
    return made


def crossovers(shapes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Runs of neighbouring row counts with one verdict, like "fusing wins at 1 to 128 rows (0.62× to 0.91×)"."""
    judged = [shape for shape in shapes if "verdict" in shape.get("fused_over_unfused", {})]
    parts = []
    for verdict, group in groupby(judged, key=lambda shape: shape["fused_over_unfused"]["verdict"]):
        members = list(group)
        ratios = [shape["fused_over_unfused"]["ratio"] for shape in members]
        first, last = members[0]["rows"], members[-1]["rows"]
        rows = f"{first:,} {'row' if first == 1 else 'rows'}" if first == last else f"{first:,} to {last:,} rows"
        spread = f"{min(ratios):.2f}×" if len(ratios) == 1 else f"{min(ratios):.2f}× to {max(ratios):.2f}×"
        parts.append(f"{WORDS[verdict]} at {rows} ({spread})")
    if parts:
        yield f"Fusing {'; '.join(parts)}."


def _time(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return f"{cell['median_us']:,.2f}" if "median_us" in cell else escape(cell["status"][:40])


def _outcome(shape: Mapping[str, Any]) -> Iterator[str]:
    both = shape.get("fused_over_unfused")
    if both is None:
        yield from ("–",) * 5
        return
    text = f"{both['ratio']:.3f}×"
    if "verdict" in both:
        text += f" ({both['low']:.3f} - {both['high']:.3f}) {WORDS[both['verdict']]}"
    best = shape["variants"][both["fused"]]
    yield text
    yield f"{best['gb_per_s']:,.0f}"
    yield f"{best['tflop_per_s']:,.1f}"
    yield f"{max(best['of_read'], best['of_matrix']):.0%}" if "of_read" in best else "–"
    yield f"{best['saved_bytes'] / 1e6:,.3f}"
