"""Where drawings go: inline into the page, and as SVG and PNG files into a folder."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness.report import html
from harness.report.style import INK, PAGE

_PNG_DPI = 150
_LIGHT, _DARK = ("#1b1f24", "#ffffff"), ("#e6e9ed", "#14181d")
"""Ink and page of the files; the page itself has these colours in page.css."""
_OWN_COLOURS = (
    f"<style>:root{{color:{_LIGHT[0]};--page:{_LIGHT[1]}}}"
    f"@media (prefers-color-scheme: dark){{:root{{color:{_DARK[0]};--page:{_DARK[1]}}}}}</style>"
)


_PLACES = re.compile(r'\b(?:d|x|y|points|transform)="[^"]*"')
_LONG = re.compile(r"-?\d+\.\d{3,}")


@dataclass
class Plots:
    """Saves figures to `folder`, which is made when the first one comes."""

    folder: Path

    def add(self, figure: Figure, name: str, title: str, caption: str) -> str:
        """Save `figure` as `name`.svg and .png, close it, and return it as a piece of the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        svg = inline(figure, name)
        (self.folder / f"{html.slug(name)}.svg").write_text(by_itself(svg))
        figure.set_layout_engine("none")  # it is laid out, and doing it again takes longer than drawing
        figure.savefig(self.folder / f"{html.slug(name)}.png", dpi=_PNG_DPI, facecolor=PAGE)
        plt.close(figure)
        return html.figure(svg, title, caption)


def inline(figure: Figure, name: str) -> str:
    """`figure` as SVG for a page that has other drawings and colours of its own."""
    made = io.StringIO()
    figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None})
    return _following_the_page(_rounded(made.getvalue()), html.slug(name))


def by_itself(svg: str) -> str:
    """The SVG of a page as a file, which follows the reader's light or dark mode by itself."""
    return re.sub(r"(<svg[^>]*>)", rf"\1{_OWN_COLOURS}", svg, count=1)


def _rounded(svg: str) -> str:
    """Places to a hundredth of a point, which nobody can see."""
    return _PLACES.sub(lambda places: _LONG.sub(lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), places[0]), svg)


def _following_the_page(svg: str, prefix: str) -> str:
    """Ink and page by the page's own colours, and ids that no other drawing on the page has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(PAGE, "var(--page, #ffffff)")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg)
