"""The report's headline: medians, ratios and intervals against the tables, and who is compared with whom."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from report_pages import REFERENCE, close, shown
from report_runs import SHAPE, Page, record, timed, write


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
