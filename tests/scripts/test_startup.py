"""Start-up times: two starts with the same caches, empty for the first, and what run.json says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import startup
from scripts.tables import validation

RUN = {
    "device": "cuda", "model": "qwen3-0.6b", "limits": {"max_num_seqs": 256},
    "provenance": {"gpu": {"name": "NVIDIA H200"}, "cpu": {"model": "CPU"}},
    "notes": {"graph_batch_sizes": [1, 2, 4]},
}  # fmt: skip


@pytest.fixture
def starts(monkeypatch):
    """Instead of processes: caches are filled, and the second start is faster for it."""
    seen = []

    def run(command, env, **_):
        caches = [Path(env[name]) for name in startup.CACHES]
        was_warm = all(cache.exists() for cache in caches)
        for cache in caches:
            cache.mkdir(parents=True, exist_ok=True)
        results = Path(next(a for a in command if a.startswith("results=")).removeprefix("results="))
        results.mkdir()
        took = {"weights": 99.0, "engine_start": 4.25 if was_warm else 61.5}
        notes = {**RUN["notes"], "start_s": {"load weights": 1.5, "compile kernels": 0.25 if was_warm else 50.5}}
        (results / "run.json").write_text(json.dumps({**RUN, "phases_s": took, "notes": notes}))
        seen.append(command)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(startup.subprocess, "run", run)
    return seen


def test_the_first_start_is_cold_and_the_second_warm(starts, tmp_path, monkeypatch, capsys):
    file = tmp_path / "startup.json"
    monkeypatch.setattr(sys, "argv", ["startup", "--json", str(file), "--", "model=qwen3-4b"])
    assert startup.main() == 0
    made = json.loads(file.read_text())
    assert made["start_s"] == {"cold": 61.5, "warm": 4.25}
    assert (made["device"], made["graphs"]) == ("NVIDIA H200", 3)
    assert all(command[-1] == "model=qwen3-4b" and "engine=fused" in command for command in starts)
    assert "fused, warm: 4.2 s (goal 15 s)" in capsys.readouterr().out
    shown = validation.startup(str(file))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    assert rows[0] == ["", "cold", "warm"]
    assert rows[2:] == [
        ["load weights", "1.5", "1.5"], ["compile kernels", "50.5", "0.2"],
        ["the rest", "9.5", "2.5"], ["**in all**", "61.5", "4.2"], ["goal", "90", "15"],
    ]  # fmt: skip
    assert validation.startup("nothing.json").startswith("Not measured yet")


def test_caches_that_are_there_already_make_no_cold_start(starts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["startup", "--caches", str(tmp_path)])
    assert startup.main() == 2
    assert "a cold start needs a new folder" in capsys.readouterr().err
    assert not starts


def test_its_overrides_are_the_harnesss():
    from harness.config import compose

    command = startup.command("fused", ["limits.max_num_seqs=128"], Path("results"))
    made = compose(command[command.index("harness") + 1 :])
    assert (made.engine.name, made.limits.max_num_seqs, made.verify) == ("fused", 128, False)
