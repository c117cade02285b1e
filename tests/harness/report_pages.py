"""Pages of chosen runs for the tests of the report, the warnings of such runs, and a comparison of made-up rounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from report_runs import Page, record, write

from harness.report import doubts
from harness.report.data import Data
from harness.report.page import page
from harness.report.report import Report
from harness.results import write_json

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference" / "h200"
SECTIONS = ("warnings", "headline", "comparison", "latency", "throughput", "serving", "layers", "heat", "steps",
            "roofline", "ops", "ablation", "energy", "provenance")  # fmt: skip


def shown(folders: Path | list[Path], tmp_path: Path, only: tuple[str, ...] = SECTIONS, **ceilings: float) -> Page:
    """The page of some folders, without the notebook around it."""
    paths = folders if isinstance(folders, list) else [folders]
    report = Report(paths, tmp_path / "plots", **ceilings)
    sections = [section for name in only if (section := getattr(report, name)())]
    return Page(page(report.title()._repr_html_() + "".join(section._repr_html_() for section in sections)))


def texts(folder: Path) -> list[tuple[str, str]]:
    """Kind and text of every warning of the runs below a folder."""
    return [(doubt.kind, doubt.text) for doubt in doubts.doubts(Data.read(folder))]


def close(cell: str, value: float) -> bool:
    """Whether a cell's first number is `value` to the digits that it shows."""
    text = re.match(r"[\d.,]+", cell)[0].replace(",", "")  # type: ignore[index]
    return abs(float(text) - value) <= 0.5000001 * 10 ** -len(text.partition(".")[2])


def comparison(folder: Path, values: dict[str, list[float]], dead: str = "", features: Any = None) -> Path:
    """A comparison of one launch with a TPOT per round for each contestant; the first one is the baseline."""
    for label, of in values.items():
        engine = label.partition(":")[0]
        rows = [
            {"engine": engine, "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": 1, "tokens": 128,
             "output_len": 129, "launch": 0, "round": i, "started_s": float(i), "samples": 1, "value": value,
             "status": "ok"}
            for i, value in enumerate(of)
        ]  # fmt: skip
        name = re.sub(r"[^\w.=-]+", "-", label)
        notes = {"features": features[label]} if features else {}
        write(folder / "launch-0" / name, record(engine, workload="tpot", notes=notes), rounds=rows)
    write_json(folder / "launch-0" / "comparison.json", {"launch": 0, "reasons": {}})
    engines = [*values, dead] if dead else list(values)
    settings = {"engines": engines, "baseline": engines[0], "model": {"name": "toy"}, "workload": {"name": "tpot"}}
    reasons = {dead: "no such package"} if dead else {}
    write_json(folder / "comparison.json", {"settings": settings, "status": "ok", "reasons": reasons})
    return folder
