"""The report's warnings: each kind of doubt is told, once, and a clean run has none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from report_pages import REFERENCE, comparison, shown, texts
from report_runs import SHAPE, Page, key, record, step_row, timed, write

from harness.report import doubts


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


def test_many_runs_of_one_doubt_are_named_behind_a_click() -> None:
    few, many = ["a", "b"], [f"run-{i}" for i in range(30)]
    assert doubts._places(few) == "<small>a; b</small>"
    page = doubts._places(many)
    head, _, rest = page.partition("</summary>")
    assert "30 runs" in head and "run-0" not in head and all(name in rest for name in many)
