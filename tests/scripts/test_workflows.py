"""The workflows and the script that they run on a GPU machine: what they name exists, and failures come through."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.overrides import combinations
from harness.regress.__main__ import parser

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
JOBS = [(path, name) for path in WORKFLOWS for name in yaml.safe_load(path.read_text())["jobs"]]


def workflow(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key `on` as a truth value
    return content


def commands(path: Path, job: str) -> list[str]:
    return [step["run"] for step in workflow(path)["jobs"][job]["steps"] if "run" in step]


def test_each_job_runs_what_people_run() -> None:
    run = {(path.stem, job): commands(path, job) for path, job in JOBS}
    assert run["tests", "tests"] == [".ci/run"]
    install, check, _ = run["gpu", "regression"]
    assert install == "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]'"
    assert shlex.split(check) == ["scripts/gpu_check.sh", "results/checks/ci"]
    artifact = workflow(ROOT / ".github/workflows/gpu.yml")["jobs"]["regression"]["steps"][-1]["with"]
    assert artifact["path"] == shlex.split(check)[1]


@pytest.mark.parametrize(("path", "job"), JOBS)
def test_what_a_job_names_exists(path: Path, job: str) -> None:
    for command in commands(path, job):
        for name in re.findall(r"(?<![\w./-])(?:\.ci|scripts|tests|harness|conf)/[\w./-]+", command):
            assert (ROOT / name).exists(), name
        first = shlex.split(command)[0]
        if "/" in first:
            assert (ROOT / first).stat().st_mode & stat.S_IXUSR, f"{first} is not executable"


@pytest.mark.parametrize(("path", "job"), JOBS)
def test_a_job_can_do_no_harm(path: Path, job: str) -> None:
    content = workflow(path)
    assert content["permissions"] == {"contents": "read"}
    assert content["concurrency"]["group"]
    assert "pull_request_target" not in content["on"]
    assert set(re.findall(r"secrets\.(\w+)", path.read_text())) <= {"GITHUB_TOKEN"}
    spec = content["jobs"][job]
    assert 0 < spec["timeout-minutes"] <= 90
    for step in spec["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step["uses"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
            assert "write" not in spec.get("permissions", {}).values()
    if "self-hosted" in spec["runs-on"]:
        assert "github.event.pull_request.head.repo.full_name == github.repository" in spec["if"]


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
[[ $* == *"import machine_slug"* ]] && echo h200
if [[ $* == *"$FAILING"* ]]; then exit "$CODE"; fi
"""


def check(tmp_path: Path, *arguments: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished script, and the arguments of each python that it started, which is one that does nothing."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log.write_text("")
    told = {"PYTHON": str(python), "LOG": str(log), "FAILING": "nothing", "CODE": "0", **env}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run([SCRIPT, *arguments], env={**kept, **told}, capture_output=True, text=True, cwd=tmp_path)
    return done, log.read_text().splitlines()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_bare_it_says_what_it_does_and_does_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done, started = check(tmp_path, *arguments)
    assert done.returncode == 0 and started == []
    assert "python -m harness.regress REFERENCE NEW" in done.stdout


def test_steps_in_order_with_arguments_that_are_taken(tmp_path: Path) -> None:
    done, started = check(tmp_path, "new", LAUNCHES="2", ENGINES="nano,fused", WORKLOAD="smoke")
    assert done.returncode == 0, done.stderr
    modules = [re.match(r"-m (\S+)", line)[1] for line in started[1:]]
    assert modules == ["harness.doctor", "pytest", "harness", "harness", "harness.regress"]
    sweep = started[3].split()
    assert sweep[2] == "-m"
    configs = combinations(sweep[3:], multirun=True)
    assert [(c.engine.name, c.workload.name, c.results) for c in configs] == [
        ("nano", "smoke", str(tmp_path / "new")), ("fused", "smoke", str(tmp_path / "new")),
    ]  # fmt: skip
    regress = parser().parse_args(started[-1].split()[2:])
    assert (ROOT / regress.baseline, regress.candidate) == (ROOT / "results/reference/h200", tmp_path / "new")
    assert (regress.markdown, regress.json) == (tmp_path / "new/regress.md", tmp_path / "new/regress.json")


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path: Path) -> None:
    done, started = check(tmp_path, "new", DRY_RUN="1", REFERENCE="anything")
    assert done.returncode == 0 and started == []
    printed = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert len(printed) == 6 and "harness.regress anything" in printed[-1]


@pytest.mark.parametrize(
    ("failing", "code", "expected", "steps"),
    [
        ("harness.doctor", 1, 4, 1),
        ("pytest", 1, 4, 2),
        ("engine=", 130, 4, 3),
        ("harness.regress", 1, 1, 6),
        ("harness.regress", 2, 2, 6),
        ("harness.regress", 3, 3, 6),
    ],
)
def test_failures_come_through(tmp_path: Path, failing: str, code: int, expected: int, steps: int) -> None:
    done, started = check(tmp_path, "new", FAILING=failing, CODE=str(code))
    assert (done.returncode, len(started) - 1) == (expected, steps)


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (["."], {}, "exists; name a new folder."),
        (["new"], {"REFERENCE": "nowhere"}, "There is no nowhere to compare with"),
        (["new", "other"], {}, "One folder, please"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path: Path, arguments: list[str], env: dict, says: str) -> None:
    done, started = check(tmp_path, *arguments, **env)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [line for line in started if line.startswith("-m")]
