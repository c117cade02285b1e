"""The report as a page: by itself, in a real browser, from the notebook, and of runs with little or nothing to show."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from report_pages import REFERENCE, shown, texts
from report_runs import SHAPE, Page, record, write

from harness.report import doubts, style
from harness.report.__main__ import BAD_INPUT, main, plots_folder
from harness.report.data import Data
from harness.results import write_json

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


def test_an_empty_and_a_failed_run(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "empty", record("nano"))
    failed = record(
        "fused", status="failed", error="RunFailed: it broke", shapes=[SHAPE], verification={"status": "failed"}
    )
    write(tmp_path / "runs" / "failed", failed)
    write_json(
        write(tmp_path / "runs" / "begun", {}) / "run.json", {"run_id": "x", "schema_version": 1, "status": "running"}
    )
    found = shown(tmp_path / "runs", tmp_path)
    assert found.table("Headline").cell("decode, batch 1, context 128, ms", "fused (not verified)") == "not reached"
    assert {"Warnings", "Headline", "Provenance"} <= set(found.headings)
    assert not {"Time per layer", "Op study", "What each feature is worth", "Energy"} & set(found.headings)
    kinds = texts(tmp_path / "runs")
    assert (doubts.FAILED, "This run is failed. RunFailed: it broke") in kinds
    assert (doubts.FAILED, "This run is running.") in kinds and (doubts.UNVERIFIED, "Verification: failed.") in kinds


def test_what_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "report.html")]) == BAD_INPUT
    assert "holds no run" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_the_page_needs_nothing_else(h200: Path, h200_page: Page) -> None:
    text = h200.read_text()
    assert "<script" not in text and "jp-InputArea" not in text and "Report([" not in text
    for name, value in h200_page.attributes:
        if name in ("src", "href", "xlink:href") and value:
            assert value.startswith(("#", "data:")), (name, value[:80])
    assert "@import" not in text and "url(http" not in text
    assert not re.search(r"(?<![\w/])/(root|home|tmp)/", text)


def test_plots_lie_beside_the_page(h200: Path, h200_page: Page) -> None:
    files = sorted(path.name for path in plots_folder(h200).iterdir())
    assert len(files) == 2 * h200_page.tags["svg"] > 20
    assert {name.rpartition(".")[2] for name in files} == {"svg", "png"}
    svg = next(plots_folder(h200).glob("latency-*.svg")).read_text()
    assert "prefers-color-scheme: dark" in svg and "currentColor" in svg and style.INK not in svg


def test_ids_are_unique(h200: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', h200.read_text())
    assert len(ids) == len(set(ids))


def test_engines_keep_their_colours(h200: Path) -> None:
    engines = {"vllm", "nano", "fused", "nano_vllm", "hf"}
    settings = [s for s in Data.read(REFERENCE).settings if not any(entry.run.get("study") for entry in s.entries)]
    assert settings
    for setting in settings:  # a study's lines are variants of one op, not engines
        shown = {entry.engine for entry in setting.entries}
        drawn = [path for path in plots_folder(h200).glob("*.svg") if setting.slug in path.name]
        assert drawn
        for path in drawn:
            if not path.name.startswith("heat"):
                text = path.read_text()
                assert {e for e in engines if style.color(e) in text} == shown, path.name
    looks = {(style.color(e), style.marker(e)) for e in (*engines, "somebody's")}
    assert len({c for c, _ in looks}) == len({m for _, m in looks}) == 6


@pytest.fixture(scope="module")
def browser() -> Iterator[str]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    yield found


@pytest.mark.parametrize(
    ("scheme", "setting", "background"), [("light", 1, (255, 255, 255)), ("dark", 0, (20, 24, 29))]
)
def test_a_browser_opens_it(
    browser: str, h200: Path, tmp_path: Path, scheme: str, setting: int, background: tuple[int, int, int]
) -> None:
    """Drawn in the wanted scheme, with nothing on the console."""
    shot = tmp_path / f"{scheme}.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={setting}",
        "--window-size=1200,2400", f"--screenshot={shot}", h200.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shot.is_file(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    assert tuple(pixels[2, 2]) == background
    assert (np.abs(pixels - background).sum(-1) > 60).mean() > 0.02  # and there is something on it


def test_the_notebook_runs_by_itself(tiny: Path, tmp_path: Path) -> None:
    """From its own folder with its own parameters, as Jupyter starts it; on a small run in place of the large ones."""
    nbformat = pytest.importorskip("nbformat", reason="the extra `report` is not installed")
    nbclient = pytest.importorskip("nbclient")
    source = Path(__file__).parents[2] / "notebooks" / "report.ipynb"
    text = source.read_text()
    assert "../results/reference/h200" in text and REFERENCE.is_dir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "results" / "reference").mkdir(parents=True)
    shutil.copytree(tiny, tmp_path / "results" / "reference" / "h200")
    notebook = nbformat.reads(text, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
    html = "".join(o["data"].get("text/html", "") for c in notebook.cells for o in c.get("outputs", []) if "data" in o)
    assert "<h2" in html and (tmp_path / "notebooks" / "report_plots").is_dir()
