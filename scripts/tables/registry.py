"""Named tables, and the places in documents that they fill."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence

from engines.base import InputError

Table = Callable[..., str]
TABLES: dict[str, Table] = {}

_START = re.compile(r"^<!-- table: (?P<call>.*?) -->$")
_END = "<!-- /table -->"


def table(name: str) -> Callable[[Table], Table]:
    """Register a function as the table `name`; ValueError if there is one of that name."""

    def register(function: Table) -> Table:
        if name in TABLES:
            raise ValueError(f"Two tables are called {name}.")
        TABLES[name] = function
        return function

    return register


def made(call: str) -> str:
    """The table that a marker asks for: `NAME key=value ...`. InputError says what of it is not known."""
    name, *words = call.split()
    if name not in TABLES:
        raise InputError(f"No table is called {name}; known are {', '.join(sorted(TABLES))}.")
    unfit = [word for word in words if "=" not in word]
    if unfit:
        raise InputError(f"Table {name}: {unfit[0]} is not of the form key=value.")
    arguments = dict(word.split("=", 1) for word in words)
    try:
        inspect.signature(TABLES[name]).bind(**arguments)
    except TypeError as error:
        raise InputError(f"Table {name}: {error}.") from None
    return TABLES[name](**arguments).strip("\n")


def filled(text: str) -> str:
    """`text` with what stands between each pair of markers made anew. InputError where markers do not pair."""
    lines: list[str] = []
    asked: str | None = None
    for line in text.splitlines():
        start = _START.match(line)
        if start and asked is not None:
            raise InputError(f"The table {asked} is not ended by {_END} before the next one starts.")
        if start:
            asked = start["call"]
            lines += [line, made(asked)]
        elif line == _END:
            if asked is None:
                raise InputError(f"{_END} stands where no table was started.")
            asked = None
            lines.append(line)
        elif asked is None:
            lines.append(line)
    if asked is not None:
        raise InputError(f"The table {asked} is not ended by {_END}.")
    return "\n".join(lines) + "\n"


def stale(text: str) -> list[str]:
    """The markers' calls whose table differs from the one made anew."""
    return [call for (call, old), (_, new) in zip(_blocks(text), _blocks(filled(text)), strict=True) if old != new]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others, numbers, to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _blocks(text: str) -> list[tuple[str, str]]:
    """Each marker's call and what stands below it, in order."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.splitlines():
        start = _START.match(line)
        if start:
            found.append((start["call"], []))
        inside = (inside or start is not None) and line != _END
        if inside and not start:
            found[-1][1].append(line)
    return [(call, "\n".join(lines)) for call, lines in found]


__all__ = ["TABLES", "InputError", "filled", "made", "markdown", "stale", "table"]
