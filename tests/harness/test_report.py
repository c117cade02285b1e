"""What the report shows, against the tables themselves, closed forms, and a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from report_runs import DECODE, SHAPE, Page, in_graphs_and_eager, kernel_trace, key, record, step_row, timed, write
from test_runner import TINY, silent

from harness.config import compose
from harness.ops.__main__ import run as study
from harness.report import ablation, doubts, latency, serving, style
from harness.report.__main__ import BAD_INPUT, OK, main, plots_folder
from harness.report.data import Data
from harness.report.headline import Value
from harness.report.labels import feature_set
from harness.report.page import page
from harness.report.report import Report
from harness.results import RunWriter, load, write_json
from harness.runner import run

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference" / "h200"
SECTIONS = ("warnings", "headline", "comparison", "latency", "throughput", "serving", "layers", "heat", "steps",
            "roofline", "ops", "ablation", "energy", "provenance")  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


def shown(folders: Path | list[Path], tmp_path: Path, only: tuple[str, ...] = SECTIONS, **ceilings: float) -> Page:
    """The page of some folders, without the notebook around it."""
    paths = folders if isinstance(folders, list) else [folders]
    report = Report(paths, tmp_path / "plots", **ceilings)
    sections = [section for name in only if (section := getattr(report, name)())]
    return Page(page(report.title()._repr_html_() + "".join(section._repr_html_() for section in sections)))


def texts(folder: Path) -> list[tuple[str, str]]:
    """Kind and text of every warning of the runs below a folder."""
    return [(doubt.kind, doubt.text) for doubt in doubts.doubts(Data.read(folder))]


def first_number(cell: str) -> float:
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))  # type: ignore[index]


def close(cell: str, value: float) -> bool:
    """Whether a cell's first number is `value` to the digits that it shows."""
    text = re.match(r"[\d.,]+", cell)[0].replace(",", "")  # type: ignore[index]
    return abs(float(text) - value) <= 0.5000001 * 10 ** -len(text.partition(".")[2])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run on this machine's processor."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    quick = ("instrument.max_iterations=10", "instrument.traced_iterations=3", "instrument.max_seconds_per_shape=2")
    wanted = ["engine=nano", "model=tiny", f"weights={TINY}", "workload=smoke", "device=cpu", *quick]
    run(compose(wanted), folder, silent())
    return folder


@pytest.fixture(scope="module")
def tiny_page(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return shown(tiny, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def h200(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed runs, made by the command."""
    pytest.importorskip("papermill", reason="the extra `report` is not installed")
    target = tmp_path_factory.mktemp("h200") / "report.html"
    assert main([str(REFERENCE), "-o", str(target), "--read", "4.34", "--matrix", "815"]) == OK
    return target


@pytest.fixture(scope="module")
def h200_page(h200: Path) -> Page:
    return Page(h200.read_text())


# --- numbers ---


def test_headline_of_a_real_run_is_its_steps(tiny: Path, tiny_page: Page) -> None:
    steps = pq.read_table(tiny / "steps.parquet").to_pandas()
    steps = steps[~steps["instrumented"]]
    medians = steps.groupby(["phase", "batch_size", "new_tokens", "context_len"])["wall_us"].median() / 1e3
    table = tiny_page.table("Headline")
    assert len(table.rows) == len(medians) > 2
    for (phase, batch, new, context), median_ms in medians.items():
        size = f"batch {batch}, context {context}" if phase == "decode" else f"{batch} × {new // batch} tokens"
        cell = table.cell(f"{phase}, {size}, ms", "nano")
        assert close(cell, median_ms)
        own = steps[(steps["phase"] == phase) & (steps["batch_size"] == batch)]["wall_us"] / 1e3
        if len(own) == 1:  # a busy machine
            assert cell.endswith("(once)")
            continue
        low, high = (float(end.replace(",", "")) for end in re.findall(r"\((.*) – (.*)\)", cell)[0])
        assert 0.99 * own.min() <= low <= 1.01 * median_ms and 0.99 * median_ms <= high <= 1.01 * own.max()


def test_ops_of_a_real_run_are_its_layers(tiny: Path, tiny_page: Page) -> None:
    layers = pq.read_table(tiny / "layers.parquet").to_pandas()
    largest = layers[(layers["phase"] == "decode") & (layers["batch_size"] == layers["batch_size"].max())]
    ops = largest[(largest["layer_index"] >= 0) & (largest["op"] != "layer")]
    sums = ops.pivot_table(index=["op", "layer_index"], columns="iteration", values="latency_us", aggfunc="sum")
    means = sums.median(axis=1).groupby("op").mean()
    batch = int(largest["batch_size"].iloc[0])
    table = tiny_page.table("Layers and ops", f"decode, batch {batch}")
    assert {row[0] for row in table.rows} == set(means.index) and len(means) > 8
    for op, us in means.items():
        assert close(table.cell(str(op), "nano, µs"), us), op


def test_committed_steps_and_ratios(h200_page: Page) -> None:
    """The headline has the numbers of run.json, which are from all samples, and the ratio is of two of them."""
    by_engine = {}
    for engine in ("fused", "nano", "vllm"):
        run = json.loads((REFERENCE / f"{engine}-qwen3-0.6b-latency" / "run.json").read_text())
        by_engine[engine] = {
            (s["phase"], s["batch_size"], s["tokens"]): s["timed"]["wall_us"] / 1e3 for s in run["shapes"]
        }
    table = h200_page.table("Headline", "qwen3-0.6b, bfloat16, latency")
    for phase, batch, tokens in by_engine["nano"]:
        size = f"batch {batch}, context {tokens}" if phase == "decode" else f"{batch} × {tokens} tokens"
        values = {engine: of[phase, batch, tokens] for engine, of in by_engine.items()}
        for engine, value in values.items():
            cell = table.cell(f"{phase}, {size}, ms", engine)
            assert close(cell, value)
            others = {name: of for name, of in values.items() if name != engine}
            peer = min(others, key=others.__getitem__)
            ratio, name = re.search(r"([\d.]+)× (\w+)", cell).groups()  # type: ignore[union-attr]
            assert name == peer and float(ratio) == pytest.approx(value / others[peer], abs=6e-4)


def test_layers_inside_graphs_are_not_split(tmp_path: Path) -> None:
    """Events in graphs see whole layers only; they are preferred to the eager trace, which alone has the ops."""
    layers, steps = in_graphs_and_eager()
    write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(140.0)}]), layers, steps)
    found = shown(tmp_path / "run", tmp_path, ("layers", "heat"))
    blocks = {row[1]: row[2:] for row in found.table("Time per layer").rows}
    assert blocks["whole layer, not split"] == ["82.00", "41.00", "41.00", "41.00"]
    assert blocks["final norm and head"][0] == "30.00" and "attention" not in blocks
    ops = {row[0]: row[1] for row in found.table("Layers and ops").rows}
    assert ops == {"input_norm": "4.000", "qkv_proj": "22.00", "attention": "14.00", "down_proj": "40.00"}


def test_committed_comparison_is_its_rounds(h200_page: Page) -> None:
    """The ratio of two engines is the geometric mean of rounds of one number."""
    folder = next(REFERENCE.glob("compare-*nano_vllm-nano-fused-vllm"))
    rounds = pd.concat(pq.read_table(f).to_pandas() for f in folder.rglob("rounds.parquet"))
    one = rounds[(rounds["metric"] == "tpot_ms") & (rounds["batch_size"] == 32)]
    values = one.pivot_table(index=["launch", "round"], columns="engine", values="value")
    cell = h200_page.table("Headline", "nano_vllm, nano, fused").cell("decode, batch 32, prompt 128, TPOT ms", "fused")
    assert close(cell, values["fused"].median())
    expected = np.exp(np.log(values["fused"] / values["nano"]).mean())
    assert float(re.search(r"([\d.]+)×", cell)[1]) == pytest.approx(expected, abs=6e-4)  # type: ignore[index]


def test_kernels_are_preferred_and_parts_add_up(tmp_path: Path) -> None:
    """Hand-made: medians over s = 0, 1, 2 are those of s = 1; the eager rows beside them must not show."""
    layers, steps = kernel_trace()
    eager = [{**row, "source": "cuda_event", "mode": "eager", "latency_us": 999.0} for row in layers]
    eager_steps = [{**row, "source": "cuda_event", "mode": "eager"} for row in steps]
    shapes = [{**SHAPE, "timed": timed(140.0), "kernels": {"closure": 0.987, "overhead": 1.04}}]
    host = [
        {**key("host", "graph", i), "host_phase": phase, "latency_us": us + i}
        for i in range(3)
        for phase, us in (("schedule", 7.0), ("launch", 11.0), ("rest", 100.0))
    ]
    write(tmp_path / "run", record(shapes=shapes), layers + eager, steps + eager_steps, host)
    found = shown(tmp_path / "run", tmp_path)
    blocks = {row[1]: row[2:] for row in found.table("Time per layer").rows}
    assert blocks["attention"] == ["40.00", "20.00", "20.00", "20.00"]  # 2 + (10 + 1) + 3 + 4, in two layers
    assert blocks["MLP"] == ["40.00", "20.00", "20.00", "20.00"]
    assert blocks["embedding"][0] == "5.000" and blocks["sampling"][0] == "6.000"
    ops = {row[0]: row[1] for row in found.table("Layers and ops").rows}
    assert ops == {"input_norm": "2.000", "qkv_proj": "11.00", "attention": "7.000", "down_proj": "20.00"}
    parts, phases = (t for t in found.tables if t.section == "Where the step goes")
    [row] = parts.rows
    named = dict(zip(parts.header, row, strict=True))
    # Of s = 1: wall 149, GPU 125; ops of layers 2 × 40, embed 5, head 30, sample 6; 4 in gaps; 24 on the host.
    assert named["traced by"] == "cupti, graph, arm default" and named["step, ms"] == "0.140"
    assert named["decoder layers"] == "0.080" and named["final norm and head"] == "0.030"
    assert named["gaps between kernels"] == "0.004" and named["host only"] == "0.024"
    assert named["traced step"] == "0.149" and named["closure"] == "0.987" and named["overhead"] == "1.04×"
    assert phases.rows == [["decode, batch 1, context 128", "nano", "8.000", "12.00", "101.0"]]


def test_roofline_shares_are_floor_over_time(h200_page: Page) -> None:
    """One op by hand: nano's lm_head at batch 1 reads 151,936 × 1024 bfloat16 weights."""
    heading = "latency: decode, batch 1, context 128"
    table = next(t for t in h200_page.tables if t.section == "Roofline" and heading in t.heading)
    row = dict(zip(table.header, next(r for r in table.rows if r[:2] == ["nano", "lm_head"]), strict=True))
    moved = 151936 * 1024 * 2 + 1024 * 2 + 151936 * 2
    assert close(row["MB"], moved / 1e6) and row["bound by"] == "bytes"
    assert close(row["floor, µs"], moved / 4.34e12 * 1e6)
    assert first_number(row["achieved"]) == pytest.approx(100 * moved / 4.34e6 / first_number(row["µs"]), abs=0.1)


def test_ceilings_of_a_datasheet_stand_in_for_those_that_nobody_measured(tmp_path: Path) -> None:
    """They are said to be that, and are not taken of a GPU without a datasheet here, nor for float32."""
    layers, steps = kernel_trace()
    config = {**record()["config"], "model": yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text())}
    shapes = [{**SHAPE, "timed": timed(140.0), "kernels": {"mode": "graph"}}]

    def roofline(name: str, **changed: Any) -> str:
        write(tmp_path / name, record(shapes=shapes, config=config, **changed), layers, steps)
        section = Report([tmp_path / name], tmp_path / "plots").roofline()
        return section._repr_html_() if section else ""

    text = roofline("h200")
    assert "NVIDIA H200 by its datasheet: nobody measured" in text and "read 4.8 TB/s" in text and "<svg" in text
    for name, changed in (("half", {"dtype": "float32"}), ("other", {"provenance": gpu_of("NVIDIA L4")})):
        text = roofline(name, **changed)
        assert "No ceilings are kept" in text and "<svg" not in text


def gpu_of(name: str) -> dict[str, Any]:
    return {**record()["provenance"], "gpu": {**record()["provenance"]["gpu"], "name": name}}


def test_prefill_is_drawn_over_the_length_of_prompts(tmp_path: Path) -> None:
    """One prompt of 4,096 tokens and four of 1,024 are different work, and stand in different panels."""
    sizes = ((1, 1024, 1.0), (1, 4096, 3.0), (4, 1024, 5.0))
    shapes = [{"phase": "prefill", "batch_size": b, "tokens": t, "timed": timed(us)} for b, t, us in sizes]
    write(tmp_path / "run", record(shapes=shapes))
    [setting] = Data.read(tmp_path / "run").settings
    found = {panel.title: {x: v.median for x, v in panel.curves[0].points.items()} for panel in latency.panels(setting)}
    assert found == {
        "prefill, 1 prompt": {1024: 0.001, 4096: 0.003}, "prefill, prompts of 1024 tokens": {1: 0.001, 4: 0.005},
    }  # fmt: skip


def test_ratios_need_the_same_machine_and_a_verified_peer(tmp_path: Path) -> None:
    def made(name: str, engine: str, us: float, **changed: Any) -> None:
        write(tmp_path / "runs" / name, record(engine, shapes=[{**SHAPE, "timed": timed(us)}], **changed))

    made("a", "nano", 2000.0)
    made("b", "fused", 1000.0)
    made("c", "vllm", 500.0, verification={"status": "skipped", "reason": "verify=false"})
    made("d", "hf", 100.0, contestant=False)
    elsewhere = {**record()["provenance"], "gpu": {"name": "NVIDIA H100", "driver": "580"}}
    made("e", "toy_engine", 10.0, provenance=elsewhere)
    table = shown(tmp_path / "runs", tmp_path, ("headline",)).table("Headline")
    row = "decode, batch 1, context 128, ms"
    assert table.cell(row, "nano") == "2.000 (1.980 – 2.020) | 2.000× fused (1.960 – 2.040)"
    assert table.cell(row, "fused").endswith("0.500× nano (0.490 – 0.510)")
    assert "×" not in table.cell(row, "vllm (not verified)") and "×" not in table.cell(row, "toy_engine")
    assert "10.000× fused" not in table.cell(row, "hf") and "0.100× fused" in table.cell(row, "hf")


def test_energy_is_told_per_token(tmp_path: Path) -> None:
    spent = {"status": "ok", "j_per_token": 0.0025, "subtracted_share": 0.25}
    failed = {"status": "the counter does not move"}
    shapes = [
        {**SHAPE, "timed": timed(100.0), "energy": spent}, {**SHAPE, "batch_size": 8, "energy": failed},
    ]  # fmt: skip
    write(tmp_path / "runs" / "a", record(shapes=shapes))
    write(tmp_path / "runs" / "b", record("fused", shapes=[SHAPE]))
    table = shown(tmp_path / "runs", tmp_path, ("energy",)).table("Energy", "toy")
    assert table.header == ["", "nano", "fused"]
    assert table.rows == [
        ["decode, batch 1, context 128, mJ per token", "2.500 (25%)", "–"],
        ["decode, batch 8, context 128, mJ per token", "the counter does not move", "–"],
    ]


# --- warnings ---


def test_warnings_of_every_kind(tmp_path: Path) -> None:
    gpu = {"throttled": True, "throttle_reasons": ["sw_power_cap"], "other_processes": []}
    others = {"throttled": False, "throttle_reasons": [], "other_processes": [{"pid": 1, "memory_mib": 2}]}
    ratio = {"kl_ratio": {"value": 1.3, "low": 1.0}, "nll_delta_ratio": {"value": 1.0, "low": 0.9}}
    slow = "a: the host was 1.7 times slower than at its best in this run (host_pace)."
    run = record(
        shapes=[{**SHAPE, "timed": timed(100.0, gpu=gpu, stop="time", wall_us_high=120.0)},
                {**SHAPE, "batch_size": 2, "timed": {"status": "out of memory: no"}}],
        gpu_before=others, verification={**record()["verification"], **ratio},
        failures=["decode of 2, timed: out of memory: no"], warnings=["No graph trace: no events here.", slow],
        serving=[{"rate": 4.0, "still_growing": True}, {"rate": 1.0, "still_growing": False}],
        provenance={**record()["provenance"], "git": {"commit": "c", "dirty": True}},
    )  # fmt: skip
    failed = step_row(key("host", "graph", 0), None, instrumented=False, status="out of memory: no")
    write(tmp_path / "runs" / "a", run, steps=[failed])
    write(tmp_path / "runs" / "b", record("vllm", verification={"status": "skipped", "reason": "verify=false"}))
    found = texts(tmp_path / "runs")
    by_kind: dict[str, list[str]] = {}
    for kind, text in found:
        by_kind.setdefault(kind, []).append(text)
    assert by_kind.pop(doubts.FAILED) == ["decode of 2, timed: out of memory: no"]  # its row says it no second time
    assert by_kind.pop(doubts.UNVERIFIED) == ["Verification: skipped (verify=false)."]
    assert "kl 1.30 times" in by_kind.pop(doubts.UNPROVEN)[0]
    assert by_kind.pop(doubts.THROTTLED) == ["decode, batch 1, context 128: the GPU was throttled (sw_power_cap)."]
    assert by_kind.pop(doubts.OTHERS) == ["1 other process was on the GPU (gpu before)."]
    [wide] = by_kind.pop(doubts.UNSURE)
    assert wide.startswith("1 of 1 shapes have an interval wider than the 5% that was asked, at most 21.0%")
    assert wide.endswith("(decode, batch 1, context 128); sampling ended by time.")
    assert "At 4 requests/s" in by_kind.pop(doubts.QUEUE)[0]
    assert by_kind.pop(doubts.TRACE) == ["No graph trace: no events here."]
    assert by_kind.pop(doubts.SLOWED) == [slow]
    assert by_kind.pop(doubts.NOTE) == ["The code differed from its commit."]
    assert not by_kind
    order = [list(doubts.KINDS).index(kind) for kind, _ in found]
    assert order == sorted(order)


def test_what_a_run_says_of_many_shapes_is_one_sentence(tmp_path: Path) -> None:
    throttled = [f"decode of {n} sequences: the GPU was throttled (sw_power_cap)." for n in (1, 2)]
    wide = [
        {**SHAPE, "batch_size": n, "timed": timed(100.0, stop="max_iterations", wall_us_high=100.0 + n)} for n in (7, 9)
    ]
    once = {**SHAPE, "tokens": 4000, "timed": timed(100.0, samples=1, wall_us_low=100.0, wall_us_high=100.0)}
    run = record(shapes=[*wide, once], warnings=[*throttled, "No kernels trace: no GPU."], device="cpu")
    write(tmp_path / "run", run)
    found = dict(texts(tmp_path / "run"))
    assert found[doubts.THROTTLED] == (
        "decode of 1 sequences; decode of 2 sequences: the GPU was throttled (sw_power_cap)."
    )
    unsure = [text for kind, text in texts(tmp_path / "run") if kind == doubts.UNSURE]
    assert unsure[0] == "Timed once, so that there is no interval: decode, batch 1, context 4000."
    assert unsure[1].startswith("2 of 3 shapes") and "at most 10.0% (decode, batch 9, context 128)" in unsure[1]
    assert found[doubts.NOTE] == "No kernels trace: no GPU." and doubts.TRACE not in found
    cell = shown(tmp_path / "run", tmp_path, ("headline",)).table("Headline")
    assert cell.cell("decode, batch 1, context 4000, ms", "nano") == "0.100 (once)"


def test_a_clean_run_has_no_warnings(tmp_path: Path) -> None:
    write(tmp_path / "run", record(shapes=[{**SHAPE, "timed": timed(100.0)}]))
    assert texts(tmp_path / "run") == []


def test_committed_warnings_are_at_the_top(h200: Path, h200_page: Page) -> None:
    text = h200.read_text()
    assert [h for h in h200_page.headings if h in ("Warnings", "Headline")] == ["Warnings", "Headline"]
    top = text[: text.index('<h2 id="headline"')]
    record = json.loads((next(REFERENCE.glob("compare-*nano_vllm-nano-vllm")) / "comparison.json").read_text())
    assert len(record["reasons"]) == 2
    for label in record["reasons"]:
        assert f"{label}: " in top
    assert "1 launch: what differs" in top and "the GPU was throttled" in top


def test_comparisons_say_what_is_unsure_and_who_died(tmp_path: Path) -> None:
    folder = comparison(
        tmp_path / "compare", {"nano": [1.0, 1.0, 1.0, 1.0], "fused": [0.9, 1.2, 0.8, 1.1]}, dead="vllm"
    )
    found = dict(texts(folder))
    assert found[doubts.DEAD] == "vllm: no such package"
    assert "reaches over 1" in found[doubts.UNSURE]
    table = shown(folder, tmp_path, ("headline", "comparison", "latency")).table("Headline")
    cell = table.cell("decode, batch 1, prompt 128, TPOT ms", "fused")
    middle = math.exp(np.mean(np.log([0.9, 1.2, 0.8, 1.1])))
    assert f"{middle:.3f}×" in cell and cell.endswith("unsure")
    assert table.header == ["", "nano", "fused"]


def test_contestants_beside_each_other_are_told_once(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compare", {"nano": [1.0, 1.0], "fused": [0.5, 0.5]})
    for count, file in enumerate(sorted(folder.glob("launch-0/*/run.json")), start=1):
        beside = {"throttled": False, "throttle_reasons": [], "other_processes": [{"pid": n} for n in range(count)]}
        file.write_text(json.dumps({**json.loads(file.read_text()), "gpu_after": beside}))
    found = [text for kind, text in texts(folder) if kind == doubts.OTHERS]
    assert found == ["Up to 2 other processes were on the GPU beside a contestant; the other contestants are among "
                     "them (2 in all)."]  # fmt: skip


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


# --- runs that have little to show ---


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


# --- a sweep, an op study, an ablation ---


def test_runs_of_a_sweep_are_told_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        config = {**record()["config"], "seed": seed}
        write(tmp_path / "runs" / str(seed), record(config=config, shapes=[{**SHAPE, "timed": timed(seed * 1e3)}]))
    write(tmp_path / "runs" / "other", record(model="large", shapes=[{**SHAPE, "timed": timed(7e3)}]))
    found = shown(tmp_path / "runs", tmp_path, ("headline",))
    toy, large = found.table("Headline", "toy"), found.table("Headline", "large")
    assert toy.header == ["", "nano seed=1", "nano seed=2"] and large.header == ["", "nano"]
    assert "7.000" in large.rows[0][1]


def test_op_study_says_where_fusing_loses(tmp_path: Path) -> None:
    times = {("fused", 1): 2.0, ("torch", 1): 3.0, ("fused", 64): 9.0, ("torch", 64): 5.0}
    common = {"op": "qkv_proj", "dtype": "bfloat16", "mode": "graph", "source": "cuda_event", "bytes": 1,
              "operations": 1, "saved_bytes": 0, "error": 0.0}  # fmt: skip
    samples = [
        {**common, "variant": variant, "shape": f"{rows} x 4096 x 1024", "rows": rows, "iteration": i,
         "latency_us": us + noise, "status": "ok"}
        for (variant, rows), us in times.items() for i, noise in enumerate((-0.5, 0.0, 7.0))
    ]  # fmt: skip
    failed = {**samples[0], "variant": "liger", "latency_us": None, "error": None, "status": "not installed"}
    both = {"fused": "fused", "unfused": "torch", "ratio": 1.8, "low": 1.7, "high": 1.9, "verdict": "slower"}
    product = {"op": "qkv_proj", "weight_rows": 4096, "k": 1024, "rows": [{"rows": 64, "fused_over_unfused": both}]}
    writer = RunWriter(tmp_path / "run", "study")
    writer.add_ops([*samples, failed])
    writer.flush()
    writer.write_run(record("ops", study=[product], verification={"status": "passed"}))
    table = shown(tmp_path / "run", tmp_path).table("Op study", "qkv_proj, weight 4096 × 1024, bfloat16")
    assert table.header[:3] == ["rows", "fused, µs", "torch, µs"]
    assert table.rows[0] == ["1", "2.000", "3.000", "fused", "–"]
    assert table.rows[1] == ["64", "9.000", "5.000", "torch", "fused / torch 1.800× | (1.700 – 1.900) fusing loses"]
    assert texts(tmp_path / "run") == []


def test_a_real_study_has_its_ratios_and_crossover(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    quick = ("rows=[1,2]", "variants=[torch,fused]", "max_iterations=12", "min_iterations=10", "device=cpu")
    assert study([f"into={folder}", "op=rms_norm_linear", "model=tiny", *quick]) == OK
    record = json.loads((folder / "run.json").read_text())["study"][0]
    table = shown(folder, tmp_path, ("ops",)).table("Op study", "input_norm+qkv_proj")
    for row, of in zip(table.rows, record["rows"], strict=True):
        assert close(row[table.header.index("torch, µs")], of["variants"]["torch"]["median_us"])
        assert row[-1].startswith(f"fused / torch {of['fused_over_unfused']['ratio']:.3f}×")
    assert "Fusing " in Report([folder], tmp_path / "plots").ops()._repr_html_()  # type: ignore[union-attr]


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


def test_goodput_tells_its_objectives_and_the_share_that_kept_them(tmp_path: Path) -> None:
    served = [
        {"rate": rate, "achieved_rate": 3.0, "output_tok_s": 99.0, "goodput_share": share, "goodput_rate": 3.0 * share,
         "still_growing": growing, **{f"{name}_p50": 5.0 for name in serving.LATENCIES}}
        for rate, share, growing in ((4.0, 1.0, False), (8.0, 0.5, True))
    ]  # fmt: skip
    config = {**record()["config"], "workload": {"slo": {"ttft_ms": 200.0, "tpot_ms": None}}}
    write(tmp_path / "run", record(config=config, serving=served))
    found = Report([tmp_path / "run"], tmp_path / "plots").serving()
    text = found._repr_html_()  # type: ignore[union-attr]
    assert "kept the objectives (TTFT ≤ 200 ms)" in text
    [table] = shown(tmp_path / "run", tmp_path, ("serving",)).tables
    shares = [row[table.header.index("goodput /s")] + ", " + row[table.header.index("kept objectives")]
              for row in table.rows if row[table.header.index("rate /s")]]  # fmt: skip
    assert shares == ["3.000, 100.0%", "1.500, 50.0%"]
    entry = next(Data.read(tmp_path / "run").entries)
    goodput = serving.curves([(entry, served)]).axes[-1]
    filled = [line.get_markerfacecolor() for line in goodput.lines if line.get_marker() not in ("", "None")]
    assert filled == [style.color("nano"), style.PAGE]


def test_feature_sets_in_words() -> None:
    every = [("a", "b", "c", "d"), ("a",), (), ("a", "b", "c")]
    assert [feature_set(f, every) for f in every] == ["all features", "only a", "no features", "without d"]


# --- the page as a page ---


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


def test_many_runs_of_one_doubt_are_named_behind_a_click() -> None:
    few, many = ["a", "b"], [f"run-{i}" for i in range(30)]
    assert doubts._places(few) == "<small>a; b</small>"
    page = doubts._places(many)
    head, _, rest = page.partition("</summary>")
    assert "30 runs" in head and "run-0" not in head and all(name in rest for name in many)


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


def test_report_of_a_run_reads_as_load_does(tiny: Path) -> None:
    """The frames that the sections get are whole: no row is lost between shapes."""
    data = Data.read(tiny)
    entry = data.settings[0].entries[0]
    rows = sum(len(data.rows("layers", entry, shape)) for shape in data.settings[0].shapes)
    assert rows == len(load(tiny).layers) > 0


def test_decode_shape_key_matches_rows() -> None:
    from harness.report.data import KEYS, Shape

    assert dict(zip(KEYS, Shape.of(SHAPE).key, strict=True)) == DECODE
