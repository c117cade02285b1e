"""What documents say of the code exists: `path::name` references, paths in backticks, and links."""

import ast
import re
from pathlib import Path

import pytest

from scripts.doc_tables import ROOT, documents

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
ROOMS = ("conf/", "engines/", "harness/", "kernels/", "results/", "scripts/", "tests/", "docs/")


def names_in(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Functions, classes and assigned names of a module or class body, `self.name` too, each with the body below it."""
    found: dict[str, list[ast.stmt]] = {}
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found[node.attr] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.body
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                found |= {name.id: [] for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def problem(reference: str) -> str:
    """Why `path` or `path::name.name` does not resolve; empty if it does."""
    path, _, name = reference.partition("::")
    if not (ROOT / path).exists():
        return f"{path} does not exist"
    if "::" not in reference:
        return ""
    body = ast.parse((ROOT / path).read_text()).body
    for part in name.split("."):
        here = names_in(body)
        if part not in here:
            return f"{path} has no {name}"
        body = here[part]
    return ""


def references(text: str) -> list[str]:
    """What stands in backticks and is a path into this repository, or bears the mark of a reference."""
    return [code for code in CODE.findall(text) if "::" in code or (code.startswith(ROOMS) and " " not in code)]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_references_to_code_resolve(document: Path) -> None:
    found = references(document.read_text())
    assert [f"{reference}: {why}" for reference in found if (why := problem(reference))] == []
    assert len(found) >= (3 if document.parent.name == "docs" else 1)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if not link.startswith(("http:", "https:"))]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_no_document_names_a_line() -> None:
    for document in documents():
        assert re.findall(r"\.(?:py|yaml)(?::|#L)\d+", document.read_text()) == []


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("engines/nano/scheduler.py::Scheduler.schedule", ""),
        ("engines/nano/graphs.py::BATCH_SIZES", ""),
        ("engines/base.py::EngineConfig.max_num_seqs", ""),
        ("engines/nano", ""),
        ("engines/nano/schedule.py::Scheduler", "engines/nano/schedule.py does not exist"),
        ("engines/nano/scheduler.py::Scheduler.plan", "engines/nano/scheduler.py has no Scheduler.plan"),
        ("engines/nano/scheduler.py::Scheduler.running", ""),
        ("engines/nano/scheduler.py::Scheduler.sequences", "engines/nano/scheduler.py has no Scheduler.sequences"),
        ("engines/nano/scheduler.py::schedule", "engines/nano/scheduler.py has no schedule"),
    ],
)
def test_the_check_itself(reference: str, why: str) -> None:
    assert problem(reference) == why


def test_what_counts_as_a_reference() -> None:
    text = "`engines/nano` and `engine/x.py::Y`, not `python -m harness` nor `conf/ holds` nor plain engines/nano."
    assert references(text) == ["engines/nano", "engine/x.py::Y"]
