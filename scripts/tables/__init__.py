"""The tables of README.md and docs/: each is a small function with a name, registered by `@table("name")`.

A function takes the marker's arguments as text and returns Markdown. It reads committed runs, the model configs or the
code itself, never the clock, the machine or anything random, so that the same checkout always gives the same text.
To add one: write it in the module of its theme (or a new module, imported here) and put its marker into a document.
"""

from scripts.tables import (
    attention,
    baseline,
    blocks,
    cache,
    choices,
    comparison,
    costs,
    engines,
    goals,
    graphs,
    ops,
    paces,
    pairs,
    studies,
    traces,
    trial,
    validation,
    verification,
)
from scripts.tables.registry import TABLES, InputError, filled, stale, table

__all__ = [
    "TABLES",
    "InputError",
    "attention",
    "baseline",
    "blocks",
    "cache",
    "choices",
    "comparison",
    "costs",
    "engines",
    "filled",
    "goals",
    "graphs",
    "ops",
    "paces",
    "pairs",
    "stale",
    "studies",
    "table",
    "traces",
    "trial",
    "validation",
    "verification",
]
