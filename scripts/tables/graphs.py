"""What CUDA graphs are captured."""

from __future__ import annotations

from engines.nano.graphs import BATCH_SIZES
from scripts.tables.registry import table


@table("graph-sizes")
def graph_sizes() -> str:
    """The rows that decode graphs are captured for."""
    return f"{', '.join(map(str, BATCH_SIZES))}: {len(BATCH_SIZES)} sizes."
