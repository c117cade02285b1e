"""Features in the report: weighed against their baseline, in tables and in bars."""

from __future__ import annotations

from pathlib import Path

import matplotlib.colors
import pytest
from report_pages import comparison, shown

from harness.report import ablation, style
from harness.report.headline import Value


def test_features_are_weighed_against_the_baseline(tmp_path: Path) -> None:
    """Without a feature over all of them, and with one over none; comparisons with one baseline are one table."""
    none, alone, other = "fused:features=[]", "fused:features=[head]", "fused:features=[fp8]"
    ablation = {
        "a": {"fused": ["head", "loop"], "fused:features=[-head]": ["loop"]},
        "b": {"fused": ["head", "loop"], "fused:features=[-loop]": ["head"]},
        "c": {none: [], alone: ["head"], other: []},
    }
    values = {
        "a": ([2.0, 2.0, 4.0], [2.5, 2.5, 5.0]),
        "b": ([3.0] * 3, [6.0] * 3),
        "c": ([4.0] * 3, [3.0] * 3, [4.0] * 3),
    }
    for name, features in ablation.items():
        each = dict(zip(features, values[name], strict=True))
        comparison(tmp_path / "runs" / name, each, features=features)
    found = shown(tmp_path / "runs", tmp_path, ("ablation", "comparison"))
    tables = [t for t in found.tables if t.section == "What each feature is worth"]
    item = "decode, batch 1, prompt 128, TPOT ms"
    assert [t.header for t in tables] == [["", item]] * 2
    assert tables[0].rows == [
        ["all features", "2.000 (2.000 – 4.000)"],
        ["without head", "2.500 (2.500 – 5.000) | 1.250× (1.250 – 1.250)"],
        ["without loop", "6.000 (6.000 – 6.000) | 2.000× (2.000 – 2.000)"],
    ]
    assert [row[0] for row in tables[1].rows] == [
        "no features",
        "with head",
        "the same features (fused:features=[fp8])",
    ]
    assert tables[1].rows[1][1].endswith("0.750× (0.750 – 0.750)")
    assert "Comparison" not in found.headings  # the same ratios


def test_bars_of_features_tell_what_is_sure_and_hide_nothing() -> None:
    """One that dwarfs the others is cut off; one whose interval reaches over the line is empty."""
    ratios = {"graphs": (15.0, 14.0, 16.0), "norm": (1.3, 1.2, 1.4), "loop": (1.1, 0.9, 1.3)}
    every = tuple(ratios)
    reference = ablation.Variant("all", "fused", every, {"ms": Value(1, 1, 1)}, {})
    others = [
        ablation.Variant(name, "fused", tuple(f for f in every if f != name), {"ms": Value(1, 1, 1)},
                         {"ms": Value(*ratio)})
        for name, ratio in ratios.items()
    ]  # fmt: skip
    style.use()
    [axes] = ablation.drawn(ablation.Family("toy", reference, others)).axes
    assert [text.get_text() for text in axes.texts] == ["→ +1,400.0", "+30.0", "+10.0"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([45, 30, 10])
    empty = [bar.get_facecolor() == matplotlib.colors.to_rgba(style.PAGE) for bar in axes.patches]
    assert empty == [False, False, True]
