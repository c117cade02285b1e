"""Tables of engines beside each other and of one engine over time, from runs with chosen numbers."""

from pathlib import Path

import pytest

from engines.base import InputError
from scripts.tables import engines
from tests.scripts.table_runs import cells, made_up_run, write


def test_a_change_of_steps_by_hand(tmp_path: Path) -> None:
    times = {"first": (2000.0, 1000.0), "second": (1500.0, None), "third": (1000.0, 1200.0)}
    prefill_us = {"first": 9000.0, "second": 9500.0, "third": 3000.0}
    for name, us in times.items():
        shapes = [
            {"phase": "prefill", "batch_size": 1, "tokens": 1024, "timed": {"status": "failed"}},
            {
                "phase": "prefill", "batch_size": 2, "tokens": 64,
                "timed": {"status": "ok", "wall_us": prefill_us[name]},
            },
        ]  # fmt: skip
        row = {
            "engine": "nano", "arm": "default", "phase": "decode", "batch_size": 4, "new_tokens": 4, "mode": "graph",
            "wall_us": 1.0, "host_us": 0.0, "status": "ok",
        }  # fmt: skip
        steps = [
            row
            | {"context_len": 16 * (i + 1), "source": source, "iteration": at, "gpu_us": off * at + time_us}
            | {"instrumented": source == "cupti"}
            for i, time_us in enumerate(us)
            if time_us is not None
            for at in (-1, 0, 1)
            for source, off in (("cupti", 90.0), ("cuda_event", 500.0))
            if (source, at) != ("cuda_event", -1)
        ]
        provenance = {"gpu": {"name": "Toy"}}
        run = made_up_run(shapes=shapes, started=f"2030-01-0{len(name)}T00:00:00", provenance=provenance)
        write(tmp_path / name, run, steps=steps)
    made = engines.step_history(f"{tmp_path / 'first'},{tmp_path / 'second'},{tmp_path / 'third'}", engine="nano")
    assert "| step | 2030-01-05 | 2030-01-06 |" in made
    assert cells(made) == [
        ["prefill 2 × 64", "9.000", "9.500", "3.000", "0.33×"],
        ["decode 4 × 16", "2.000", "1.500", "1.000", "0.50×"],
        ["decode 4 × 32", "1.000", "–", "1.200", "1.20×"],
    ]


def test_steps_of_different_gpus_are_no_history(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write(tmp_path / name, made_up_run(started="2030-01-01", provenance={"gpu": {"name": f"The {name} one"}}))
    with pytest.raises(InputError, match="The new one, The old one"):
        engines.step_history(f"{tmp_path / 'old'},{tmp_path / 'new'}", engine="nano")


def test_engines_by_hand(tmp_path: Path) -> None:
    timed = {"status": "ok", "wall_us": 1234.0, "wall_us_low": 1200.0, "wall_us_high": 1300.0}
    prefill = {"phase": "prefill", "batch_size": 1, "tokens": 8, "timed": timed}
    decode = {"phase": "decode", "batch_size": 2, "tokens": 16, "timed": {"status": "out of memory"}}
    write(tmp_path / "nano", made_up_run(shapes=[prefill, decode]))
    write(tmp_path / "vllm", made_up_run(engine="vllm", shapes=[prefill | {"timed": {**timed, "wall_us": 2000.0}}]))
    served = {"requests": 3, "output_tokens": 4567, "output_tok_s": 1234.6}
    write(tmp_path / "served", made_up_run(workload="throughput", throughput=served))
    text = engines.engines(str(tmp_path))
    table, source = text.split("\n\n")
    assert cells(table) == [
        ["prefill, 1 × 8 tokens, ms", "2.00 (1.20 to 1.30)", "1.23 (1.20 to 1.30)", ""],
        ["decode, batch 2, context 16, ms", "", "out of memory", ""],
        ["3 requests, 4,567 output tokens, tok/s", "", "1,235", ""],
    ]
    assert source.startswith("One A GPU, random weights, torch 2.9, Triton 3.5, vLLM 0.20.")
