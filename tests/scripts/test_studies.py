"""Tables and pictures of ablations, arrivals and energy, from runs with chosen numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from engines.fused.features import FEATURES
from harness.compare.contestants import folder_name
from harness.report import ablation
from harness.report.data import Data
from harness.results import RunWriter
from scripts.tables import studies
from scripts.tables.sources import MODEL
from tests.harness.report_runs import record, write

EVERY = tuple(FEATURES)
FIRST, SECOND = EVERY[:2]


def compared(folder: Path, baseline: str, times: Mapping[str, list[float]], features: Mapping[str, list[str]],
             batch_size: int = 8) -> None:  # fmt: skip
    """A comparison of `baseline` and others whose rounds took so many ms."""
    settings = {"engines": list(times), "baseline": baseline, "rounds": 2, "model": {"name": "toy"},
                "workload": {"name": "ablation"}}  # fmt: skip
    for label, values in times.items():
        item = {"engine": "fused", "arm": "default", "metric": "tpot_ms", "phase": "decode", "batch_size": batch_size,
                "tokens": 128, "output_len": 65, "launch": 0, "samples": 1, "status": "ok"}  # fmt: skip
        rounds = [{**item, "round": n, "started_s": float(n), "value": value} for n, value in enumerate(values)]
        write(folder / "launch-0" / folder_name(label), record("fused", notes={"features": features[label]}), (), (),
              (), rounds)  # fmt: skip
    told = {"settings": settings, "launches": 1, "reasons": {}, "status": "ok"}
    (folder / "comparison.json").write_text(json.dumps(told))


@pytest.fixture
def left_out(tmp_path: Path) -> Path:
    """Two comparisons: without the first feature a call takes twice as long, without the second as long."""
    for name, feature, times in (("0", FIRST, [4.0, 8.0]), ("6", SECOND, [2.0, 4.0])):
        label = f"fused:features=[-{feature}]"
        features = {"fused": list(EVERY), label: [f for f in EVERY if f != feature]}
        compared(tmp_path / f"{studies.WITHOUT}-{name}", "fused", {"fused": [2.0, 4.0], label: times}, features)
    return tmp_path


def test_comparisons_of_features_are_one_table_in_the_features_order(left_out: Path) -> None:
    lines = studies.ablation(str(left_out)).splitlines()
    assert lines[0].startswith("![") and "images/ablation.svg" in lines[0]
    assert lines[2] == "| fused without | decode, batch 8, prompt 128, TPOT ms |"
    assert lines[4:7] == [
        "| all features | 3.00, 3.00 |", f"| `{FIRST}` | +100.0 (+100.0 to +100.0) |",
        f"| `{SECOND}` | +0.0 (+0.0 to +0.0) |",
    ]  # fmt: skip
    assert "NVIDIA H200, toy" in lines[-1] and "within these processes" in lines[-1]


def test_a_call_that_one_comparison_lacks_moves_no_other(tmp_path: Path) -> None:
    """Each change stands below its own call, whichever comparison has it."""
    for feature, before, after, batch_size in ((FIRST, 3.0, 6.0, 8), (SECOND, 1.0, 1.5, 1)):
        label = f"fused:features=[-{feature}]"
        features = {"fused": list(EVERY), label: [f for f in EVERY if f != feature]}
        times = {"fused": [before, before], label: [after, after]}
        folder = tmp_path / f"{studies.WITHOUT}-{EVERY.index(feature)}"
        compared(folder, "fused", times, features, batch_size=batch_size)
    lines = studies.ablation(str(tmp_path)).splitlines()
    assert lines[2] == "| fused without | decode, batch 8, prompt 128, TPOT ms | decode, batch 1, prompt 128, TPOT ms |"
    assert lines[4:7] == [
        "| all features | 3.00 | 1.00 |", f"| `{FIRST}` | +100.0 (+100.0 to +100.0) | not measured |",
        f"| `{SECOND}` | not measured | +50.0 (+50.0 to +50.0) |",
    ]  # fmt: skip


def test_features_alone_are_held_against_none(tmp_path: Path) -> None:
    none, alone = "fused:features=[]", f"fused:features=[{FIRST}]"
    compared(tmp_path / f"{studies.ALONE}-0", none, {none: [4.0, 4.0], alone: [3.0, 3.0]}, {none: [], alone: [FIRST]})
    table = studies.ablation(str(tmp_path), kind="alone")
    assert "| no features | 4.00 |" in table and f"| `{FIRST}` | -25.0 (-25.0 to -25.0) |" in table
    assert "images/" not in table


def test_bars_of_both_comparisons_are_one_picture_and_as_long_as_the_change(left_out: Path) -> None:
    [family] = ablation.families(Data.read(*studies.comparisons(left_out, studies.WITHOUT)))
    figure = ablation.drawn(family)
    try:
        [axes] = figure.axes
        named = [label.get_text() for label in axes.get_yticklabels()]
        assert named == [f"without {FIRST}", f"without {SECOND}"]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([100.0, 0.0])  # type: ignore[attr-defined]
        assert [text.get_text() for text in axes.texts] == ["+100.0", "+0.0"]
    finally:
        plt.close(figure)


def test_what_is_not_measured_says_how_to(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", "run").write_run(record())
    tables = (studies.ablation, studies.serving, studies.energy)
    for table, part in zip(tables, ("ablation", "serving", "energy"), strict=True):
        assert table(str(tmp_path)) == f"Not measured yet (`scripts/reference_checks.sh {part}`)."


def test_arrivals_stand_by_rate_and_energy_by_step(tmp_path: Path) -> None:
    served = {"rate": 20.0, "requests": 9, "output_tok_s": 1234.0, "goodput_share": 0.5, "still_growing": True,
              "ttft_ms_p50": 1.0, "ttft_ms_p99": 2.0, "tpot_ms_p50": 3.0, "tpot_ms_p99": 4.0, "e2el_ms_p50": 5.0,
              "e2el_ms_p99": 6.0}  # fmt: skip
    config = {"workload": {"slo": {"ttft_ms": 200, "tpot_ms": None}, "arrivals": "poisson"}}
    shape = {"phase": "decode", "batch_size": 8, "tokens": 128}
    spent = {"status": "ok", "j_per_token": 0.0125, "subtracted_share": 0.25, "idle_w": 70.4}
    for engine in ("fused", "nano"):
        rates = [served | {"rate": 20.0 * (1 + (engine == "nano"))}]
        energy = {"status": "The counter does not move."} if engine == "nano" else spent
        shapes = [shape | {"energy": energy}, shape | {"tokens": 256, "energy": energy | {"idle_w": 104.6}}]
        for model in (MODEL, "another"):
            run = record(engine, model=model, serving=rates, config=config, shapes=shapes)
            write(tmp_path / f"{engine}-{model}", run)
    table = studies.serving(str(tmp_path))
    row = "1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 1,234 | 50% | grows |"
    assert table.index(f"| 20 | fused | {row}") < table.index(f"| 40 | nano | {row}")
    assert "TTFT up to 200 ms, as a share of all; " in table
    assert table.count("| 20 | fused") == 1 and f", {MODEL}, " in table and "another" not in table
    assert studies.energy(str(tmp_path)).splitlines()[:3] == [
        "| step | fused | nano |", "|---|---:|---:|",
        "| decode, batch 8, context 128 | 12.50 (25%) | The counter does not move. |",
    ]  # fmt: skip
    assert "less the 70 to 105 W" in studies.energy(str(tmp_path))
