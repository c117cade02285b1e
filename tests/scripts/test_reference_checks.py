"""scripts/reference_checks.sh and its parts with an interpreter that does nothing, or only fails or hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from engines.fused.features import FEATURES
from harness.compare.__main__ import parse
from harness.compare.contestants import contestants

ROOT = Path(__file__).resolve().parents[2]
CHECKS, RUNS, MEMCHECK = (f"scripts/{name}.sh" for name in ("reference_checks", "reference_runs", "memcheck"))


def script(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RESULTS", "MODEL", "CACHES")}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """Stands for the interpreter: a soak fails, a validation hangs, a start says where its caches go."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *soak*) exit 3;; *validate*) exec sleep 60;; *) echo "ran: $*";; esac\n')
    fake.chmod(0o755)
    return str(fake)


def test_run_bare_it_tells_of_every_part_that_it_has() -> None:
    told = script(CHECKS).stdout
    parts = re.findall(r"^    ([a-z |]+)\)", (ROOT / CHECKS).read_text(), re.MULTILINE)
    names = [name.strip() for part in parts for name in part.split("|")] + re.findall(
        r"^    ([a-z]+)\) \S", (ROOT / CHECKS).read_text(), re.MULTILINE
    )
    assert {"startup", "ablation", "soak", "ops", "energy"} <= set(names)
    assert [name for name in names if not re.search(rf"^  {name}  ", told, re.MULTILINE)] == []


def test_a_part_that_fails_or_takes_too_long_stops_no_other(tmp_path: Path, python: str) -> None:
    done = script(
        CHECKS, "soak", "validate", "startup", "serving", PYTHON=python, RESULTS=str(tmp_path / "r"), LIMIT_VALIDATE="1"
    )
    assert done.returncode == 1
    outcomes = [re.sub(r" +\d+ s  ", ": ", line) for line in done.stdout.splitlines()[-4:]]
    assert outcomes == [
        "soak: failed, exit code 3", "validate: stopped after 1 s", "startup: ok", "serving: ok"
    ]  # fmt: skip
    assert f"ran: scripts/startup.py --caches {tmp_path / 'r' / 'caches'}" in done.stdout


@pytest.mark.parametrize("parts", [["soak", "startup"], ["checks"]])
def test_an_interrupt_reaches_the_part_that_runs_and_ends_all(tmp_path: Path, parts: list[str]) -> None:
    """It comes to the script alone: `timeout` has made a process group of its own."""
    fake = tmp_path / "python"
    log = tmp_path / "log"
    fake.write_text(f"#!/bin/sh\ntrap 'echo told >> {log}; exit 3' INT\necho up >> {log}\nsleep 60 & wait\n")
    fake.chmod(0o755)
    env = os.environ | {"PYTHON": str(fake), "RESULTS": str(tmp_path / "r")}
    # A suite that was started in the background ignores interrupts, and so would all that it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(["bash", CHECKS, *parts], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, preexec_fn=heed)
    wanted = 2 if parts == ["checks"] else 1  # of checks, memcheck looks for compute-sanitizer first
    end = time.monotonic() + 30
    while (log.read_text().count("up") if log.exists() else 0) < wanted and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    assert log.read_text().count("told") == log.read_text().count("up") == wanted


def test_checks_run_at_once_and_are_all_in_the_table(tmp_path: Path, python: str) -> None:
    done = script(CHECKS, "checks", PYTHON=python, RESULTS=str(tmp_path / "r"), LIMIT_VALIDATE="2")
    assert done.returncode == 1
    assert {line.split()[0] for line in done.stdout.splitlines()[-3:]} == {"validate", "soak", "memcheck"}


@pytest.mark.parametrize(("part", "sign", "baseline"), [("ablation", "-", "fused"), ("alone", "", "fused:features=[]")])
def test_each_feature_is_left_out_or_alone_once_and_never_too_many_at_once(part: str, sign: str, baseline: str) -> None:
    told = script(RUNS, part, DRY_RUN="1", PYTHON=sys.executable, TOGETHER="5").stdout
    seen = []
    for line in told.splitlines():
        settings, overrides = parse(line.partition("harness.compare ")[2].split())
        assert len(settings.engines) <= 5 and settings.engines[0] == baseline
        seen += settings.engines[1:]
        # What harness.compare makes of them.
        assert len(contestants(settings.engines, overrides)) == len(settings.engines)
    assert seen == [f"fused:features=[{sign}{name}]" for name in FEATURES]


def test_other_models_are_compared_one_by_one_each_in_a_folder_of_its_own() -> None:
    models = ("qwen3-4b", "llama-3.2-1b")
    told = script(RUNS, "models", DRY_RUN="1", PYTHON=sys.executable, MODELS=" ".join(models), RESULTS="r").stdout
    for line, model in zip(told.splitlines(), models, strict=True):
        settings, overrides = parse(line.partition("harness.compare ")[2].split())
        assert (settings.engines, settings.baseline, settings.rounds) == (["nano", "fused"], "nano", 3)
        assert settings.into == f"r/compare-models-{model}"
        for one in contestants(settings.engines, overrides):
            work, limits = one.config.workload, one.config.limits
            assert one.config.model.name == model and limits.gpu_memory_utilization == 0.4
            assert work.prefill == [[1, 128], [1, 1024]] and work.decode == [[1, 128], [8, 128], [32, 128]]


def test_what_the_sanitizer_said_is_kept(tmp_path: Path) -> None:
    sanitizer, file = tmp_path / "sanitizer", tmp_path / "memcheck.json"
    sanitizer.write_text(
        '#!/bin/sh\necho "========= ERROR SUMMARY: 2 errors" > "$4"\necho "8 passed, 8 deselected in 1.00s"\nexit 7\n'
    )
    sanitizer.chmod(0o755)
    done = script(MEMCHECK, "bfloat16", SANITIZER=str(sanitizer), PYTHON=sys.executable, JSON=str(file))
    assert done.returncode == 1
    made = json.loads(file.read_text())
    assert (made["tool"], made["chosen"], made["exit_code"]) == ("memcheck", "bfloat16", 7)
    assert (made["summary"], made["tests"]) == ("ERROR SUMMARY: 2 errors", "8 passed, 8 deselected in 1.00s")
