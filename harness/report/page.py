"""The executed notebook as one HTML page that needs nothing else: no scripts, no fonts, no other files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from engines.base import InputError

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "report.ipynb"
INSTALL = "pip install -e '.[report]'"
_CSS = Path(__file__).with_name("page.css")
_ONLY_IN_JUPYTER = "jupyter-only"
"""Tag of cells that explain the notebook and do not go into the page."""
_QUIET = "--IPKernelApp.log_level=ERROR"
"""The kernel's own warnings, of its ports, say nothing to who wants a report."""
_HEADING = re.compile(r'<h2 id="([^"]+)">(.*?)</h2>')


class ReportFailed(RuntimeError):
    """A cell of the notebook raised; the message says what."""


def write(parameters: Mapping[str, Any], target: Path) -> None:
    """Execute the notebook with `parameters` and write its output to `target`.

    InputError: packages are missing, or the notebook raised one. ReportFailed: it raised something else.
    """
    try:
        import nbformat
        import papermill
        from nbconvert import HTMLExporter
        from traitlets.config import Config
    except ImportError as error:
        raise InputError(f"A report needs the package {error.name}: {INSTALL}.") from None
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / NOTEBOOK.name
        try:
            papermill.execute_notebook(
                NOTEBOOK, executed, dict(parameters), kernel_name="python3", progress_bar=False, log_output=False,
                extra_arguments=[_QUIET],
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            if error.ename == InputError.__name__:
                raise InputError(error.evalue) from None
            raise ReportFailed(f"{error.ename}: {error.evalue}") from None
        config = Config()
        config.TagRemovePreprocessor.enabled = True
        config.TagRemovePreprocessor.remove_cell_tags = (_ONLY_IN_JUPYTER,)
        config.HTMLExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
        exporter = HTMLExporter(config=config, template_name="basic", exclude_input=True, exclude_output_prompt=True)
        notebook = nbformat.read(executed, as_version=4)
        for cell in notebook.cells:  # what libraries print is not part of the report
            cell["outputs"] = [o for o in cell.get("outputs", []) if o["output_type"] != "stream"]
        body, _ = exporter.from_notebook_node(notebook)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(body))


def page(body: str) -> str:
    """`body` with a title, the style and links to its sections."""
    title = re.search(r"<h1>(.*?)</h1>", body)
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in _HEADING.findall(body))
    # Below the title, which is the notebook's first output.
    nav = f'<nav aria-label="Sections">{links}</nav>'
    first = _HEADING.search(body)
    place = body.rfind("<section", 0, first.start()) if first else len(body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title[1]) if title else 'Report'}</title><style>{_CSS.read_text()}</style></head>\n"
        f"<body>{body[:place]}{nav}{body[place:]}</body></html>\n"
    )
