"""Pictures in documents: each is what is made anew, holds the runs' numbers, and stands in a document."""

import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from harness.report import style
from scripts import doc_plots
from scripts.doc_plots import PLOTS, ROOT, made, path
from scripts.doc_tables import documents
from scripts.tables.comparison import COMPARISON
from scripts.tables.sources import REFERENCE

PINNED = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
drawn_alike = pytest.mark.skipif(version("matplotlib") != PINNED, reason=f"pictures are matplotlib {PINNED}'s")


@drawn_alike
@pytest.mark.parametrize("name", PLOTS)
def test_a_committed_picture_is_what_is_made_anew(name: str) -> None:
    assert path(name).read_text() == made(name)


def test_no_picture_is_left_over_and_every_one_stands_in_a_document() -> None:
    assert {file.name for file in doc_plots.IMAGES.iterdir()} == {path(name).name for name in PLOTS}
    texts = "".join(document.read_text() for document in documents())
    assert [name for name in PLOTS if f"images/{name}.svg" not in texts] == []
    shown = re.findall(r"!\[[^\]]+\]\((?:docs/)?(images/[^)]+)\)", texts)
    assert {name for name in shown if not (ROOT / "docs" / name).is_file()} == set()


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_is_small_text_without_dates_or_paths(name: str) -> None:
    svg = path(name).read_text()
    assert len(svg) < 120_000 and "<text" in svg and "prefers-color-scheme: dark" in svg
    assert not re.search(r"dc:date|<image|(?<![\w/])/(?:root|home|work|tmp)/", svg)


def test_the_curve_of_fused_goes_through_its_rounds() -> None:
    """Heights on the logarithmic axis are those of medians over the committed rounds, up to one scale and shift."""
    rounds = pq.read_table(ROOT / COMPARISON / "launch-0" / "fused" / "rounds.parquet").to_pandas()
    medians = rounds[rounds["metric"] == "tpot_ms"].groupby("batch_size")["value"].median()
    svg = path("time-per-token").read_text()
    lines = re.findall(r'<path d="M ([^"]+?)"[^>]*stroke: ' + style.color("fused"), svg)
    points = [[float(n) for n in re.findall(r"-?[\d.]+", line)] for line in lines]
    [curve] = [p for p in points if len(p) == 2 * len(medians)]
    xs, ys = curve[::2], curve[1::2]
    assert xs == sorted(xs)
    per_decade = (ys[0] - ys[-1]) / np.log10(medians.iloc[-1] / medians.iloc[0])
    for y, value in zip(ys, medians, strict=True):
        assert ys[0] - y == pytest.approx(per_decade * np.log10(value / medians.iloc[0]), abs=0.1)


def test_bars_stand_to_each_other_as_medians() -> None:
    """Attention's bars have their engine's plain colour; all panels have one scale."""
    svg = path("time-per-layer").read_text()
    heights, medians = [], []
    for engine in ("nano", "fused"):
        layers = pq.read_table(ROOT / REFERENCE / f"{engine}-qwen3-0.6b-latency" / "layers.parquet").to_pandas()
        mine = layers[(layers["phase"] == "decode") & (layers["batch_size"] == 1) & (layers["context_len"] == 128)]
        block = mine[(mine["source"] == "cupti") & (mine["block"] == "attention") & (mine["op"] != "layer")]
        sums = block.groupby(["layer_index", "iteration"])["latency_us"].sum()
        medians.append(sums.groupby("layer_index").median().to_numpy())
        heights.append(np.array(bar_heights(svg, style.color(engine))))
    assert len(medians[0]) == len(heights[0]) == 28
    scale = heights[0][0] / medians[0][0]
    for drawn, measured in zip(heights, medians, strict=True):
        assert drawn == pytest.approx(scale * measured, abs=0.05)


def bar_heights(svg: str, fill: str) -> list[float]:
    """Heights of the bars of one colour, in the order in which they were drawn."""
    found = re.findall(r'<path d="([^"]+)"[^>]*style="fill: ' + fill, svg)
    return [max(ys) - min(ys) for d in found if (ys := [float(n) for n in re.findall(r"-?[\d.]+", d)][1::2])]


def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doc_plots, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(doc_plots, "ROOT", tmp_path)
    monkeypatch.setattr(doc_plots, "PLOTS", {"one": None})
    monkeypatch.setattr(doc_plots, "made", lambda name: f"<svg>{name}</svg>")

    def run(argument: str) -> int:
        monkeypatch.setattr("sys.argv", ["doc_plots.py", argument])
        return doc_plots.main()

    assert run("--check") == 1 and "images/one.svg is out of date" in capsys.readouterr().out
    assert not (tmp_path / "images").exists()
    assert run("--write") == 0 and (tmp_path / "images" / "one.svg").read_text() == "<svg>one</svg>"
    assert run("--check") == 0
    (tmp_path / "images" / "one.svg").write_text("old")
    assert run("--check") == 1
