"""Pieces of the page: tables, figures, sections. Everything that comes from data is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Cell = str | tuple[str, ...]
"""Text, or several lines of it."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page; Jupyter shows it as it stands there."""

    title: str
    parts: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        return (
            f'<section><h2 id="{slug(self.title)}">{escape(self.title)}</h2>\n' + "\n".join(self.parts) + "</section>"
        )


def slug(text: str) -> str:
    """`text` as an id or a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, kind: str = "note") -> str:
    """A sentence or two."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], kind: str = "", numbers: int = 1) -> str:
    """A table that scrolls by itself where it is too wide; columns from number `numbers` on are aligned right."""
    head = "".join(f"<th{_align(i, numbers)}>{escape(name)}</th>" for i, name in enumerate(header))
    body = []
    for row in rows:
        cells = "".join(f"<td{_align(i, numbers)}>{_text(cell)}</td>" for i, cell in enumerate(row))
        body.append(f"<tr>{cells}</tr>")
    shape = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{shape}</div>'


def folded(summary: str, content: str) -> str:
    """Something that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def figure(svg: str, title: str, caption: str) -> str:
    """A drawing with its name for people who cannot see it, and a caption."""
    drawing = svg[svg.index("<svg") :]
    named = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)
    return f'<figure><div class="scroll" tabindex="0">{named}</div><figcaption>{escape(caption)}</figcaption></figure>'


def number(value: float) -> str:
    """About four digits of a time or rate."""
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}" if size >= 0.01 or value == 0 else f"{value:.2g}"


def interval(middle: float, low: float, high: float) -> str:
    """A value with the ends of its interval."""
    return f"{number(middle)} ({number(low)} – {number(high)})"


def _align(index: int, numbers: int) -> str:
    return ' class="n"' if index >= numbers else ""


def _text(cell: Cell) -> str:
    return "<br>".join(map(escape, cell)) if isinstance(cell, tuple) else escape(cell)
