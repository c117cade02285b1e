"""Tables in documents: the markers, the command, and that every committed document holds what is made anew."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.base import InputError
from scripts.doc_tables import ROOT, documents
from scripts.tables.registry import TABLES, filled, made, markdown, stale, table


@pytest.fixture(autouse=True)
def sums() -> Iterator[None]:
    """A table of our own while a test runs."""

    @table("sum")
    def _sum(a: str, b: str = "1") -> str:
        return f"| {int(a) + int(b)} |"

    yield
    del TABLES["sum"]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_a_document_holds_the_tables_that_are_made_anew(document: Path) -> None:
    assert stale(document.read_text()) == []


def test_every_table_stands_in_a_document() -> None:
    texts = "".join(document.read_text() for document in documents())
    assert [name for name in TABLES if name != "sum" and f"<!-- table: {name}" not in texts] == []


def test_what_stands_between_markers_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- table: sum a=2 b=3 -->\nold\nlines\n<!-- /table -->\nbetween\n"
    text += "<!-- table: sum a=4 -->\n<!-- /table -->\n"
    anew = "before\n<!-- table: sum a=2 b=3 -->\n| 5 |\n<!-- /table -->\nbetween\n"
    anew += "<!-- table: sum a=4 -->\n| 5 |\n<!-- /table -->\n"
    assert filled(text) == anew
    assert filled(filled(text)) == filled(text)
    assert stale(text) == ["sum a=2 b=3", "sum a=4"]
    assert stale(text.replace("old\nlines", "| 5 |")) == ["sum a=4"]
    assert stale(filled(text)) == []


def test_markers_in_running_text_are_text() -> None:
    text = "Write `<!-- table: sum a=2 -->` and `<!-- /table -->`.\n"
    assert filled(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: sum a=1 -->\nx\n", "not ended"),
        ("<!-- table: sum a=1 -->\n<!-- table: sum a=2 -->\n<!-- /table -->\n", "sum a=1 is not ended"),
        ("x\n<!-- /table -->\n", "no table was started"),
        ("<!-- table: product a=1 -->\n<!-- /table -->\n", "No table is called product; known are .*sum"),
        ("<!-- table: sum 1 -->\n<!-- /table -->\n", "1 is not of the form key=value"),
        ("<!-- table: sum b=1 -->\n<!-- /table -->\n", "missing a required argument: 'a'"),
        ("<!-- table: sum a=1 c=1 -->\n<!-- /table -->\n", "unexpected keyword argument 'c'"),
    ],
)
def test_a_wrong_marker_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        filled(text)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="sum"):
        table("sum")(lambda: "")


def test_markdown_aligns_numbers_to_the_right() -> None:
    assert markdown(["a", "b", "c"], [["x", "1", "2"]], left=1) == "| a | b | c |\n|---|---:|---:|\n| x | 1 | 2 |"


def test_the_command_writes_and_checks(tmp_path: Path) -> None:
    file = tmp_path / "some.md"
    file.write_text("# A\n<!-- table: roofline -->\nold\n<!-- /table -->\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "doc_tables.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    checked = run("--check", str(file))
    assert (checked.returncode, "the table roofline is out of date" in checked.stdout) == (1, True)
    assert "old" in file.read_text()
    assert run("--write", str(file)).returncode == 0
    assert file.read_text() == f"# A\n<!-- table: roofline -->\n{made('roofline')}\n<!-- /table -->\n"
    assert run("--check", str(file)).returncode == 0
    file.write_text("<!-- table: roofline -->\n")
    refused = run("--write", str(file))
    assert (refused.returncode, "not ended" in refused.stderr) == (2, True)
    assert file.read_text() == "<!-- table: roofline -->\n"
