"""The command as a user types it: exit codes, what is printed, and what is left on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The command line with a runner whose doings the engine and the seed choose, so that no model has to run.
STAND_IN = """
import runpy, sys, types
from pathlib import Path
from engines.base import InputError

def run(config, run_dir):
    if config.engine.name == "nano":
        raise InputError("nano cannot do this.")
    if config.engine.name == "hf":
        raise RuntimeError("boom")
    if config.seed == 130:
        (run_dir / "steps.parquet").write_text("measured")
    if config.seed >= 130:
        raise KeyboardInterrupt
    (run_dir / "run.json").write_text("{}")

module = types.ModuleType("harness.runner")
module.run = run
sys.modules["harness.runner"] = module
sys.argv[0] = "harness"
runpy.run_module("harness", run_name="__main__", alter_sys=True)
"""
HAVE_VLLM = subprocess.run([sys.executable, "-c", "import importlib.util as u; exit(u.find_spec('vllm') is None)"])
needs_no_vllm = pytest.mark.skipif(HAVE_VLLM.returncode == 0, reason="vllm is installed here")


def call(cwd: Path, *arguments: str, program: tuple[str, ...] = ("-c", STAND_IN), **env: str):
    """The finished process of `python -m harness ARGUMENTS` in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    environment.pop("HYDRA_FULL_ERROR", None) if "HYDRA_FULL_ERROR" not in env else None
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_ends_with_its_folder(tmp_path: Path) -> None:
    done = call(tmp_path, "engine=fused", "model=tiny")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.splitlines()[-1].removeprefix("Results: ")
    assert folder.match("results/????-??-??/??-??-??-fused-tiny-latency")
    assert {"run.json", ".hydra/config.yaml"} <= set(files(folder))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["engine=vlm"], "Did you mean vllm or nano_vllm?"),
        (["limits.max_num_seqs=-3"], "at least 1, not -3"),
        (["-m", "engine=fused,nan"], "Did you mean nano or nano_vllm?"),
        (["--cfg", "job", "sed=1"], "did you mean seed?"),
        (["results=file"], "Cannot write results to file: Not a directory."),
        (["engine=nano"], "nano cannot do this."),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_leaves_nothing(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "file").write_text("")
    done = call(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert files(tmp_path) == ["file"]
    assert [path.name for path in (tmp_path / "results").glob("*")] == []


@needs_no_vllm
def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    done = call(tmp_path, "engine=vllm")
    assert done.returncode == 2
    assert "pip install -e '.[vllm" in done.stderr and len(done.stderr.splitlines()) == 1
    assert files(tmp_path) == []


def test_a_crash_shows_its_traceback_once(tmp_path: Path) -> None:
    done = call(tmp_path, "engine=hf")
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: boom") == 1 and done.stderr.count("Traceback") == 1


def test_full_error_shows_where_a_sentence_comes_from(tmp_path: Path) -> None:
    done = call(tmp_path, "engine=vlm", HYDRA_FULL_ERROR="1")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    done = call(tmp_path, "seed=130")
    assert done.returncode == 130
    folder = tmp_path / done.stdout.splitlines()[-1].partition(": ")[2]
    assert (folder / "steps.parquet").read_text() == "measured"
    assert "Traceback" not in done.stderr


def test_interrupt_before_anything_was_measured_leaves_nothing(tmp_path: Path) -> None:
    done = call(tmp_path, "seed=131")
    assert (done.returncode, done.stdout.strip()) == (130, "Stopped before anything was measured.")
    assert files(tmp_path) == []


def test_a_sweep_goes_on_after_a_failure_and_says_which(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", "engine=nano,hf,fused", "model=tiny")
    assert done.returncode == 1
    assert "2 of 3 runs failed:" in done.stderr
    assert "  nano-tiny-latency: nano cannot do this." in done.stderr
    assert "  hf-tiny-latency: RuntimeError: boom" in done.stderr
    [sweep] = (tmp_path / "results/sweeps").glob("*/*")
    assert sorted(path.name for path in sweep.iterdir()) == ["fused-tiny-latency", "hf-tiny-latency", "multirun.yaml"]
    assert (sweep / "fused-tiny-latency/run.json").is_file()


@needs_no_vllm
def test_a_sweep_runs_the_engines_that_are_installed(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", "engine=vllm,fused")
    assert done.returncode == 1
    assert "1 of 2 runs failed:" in done.stderr and "needs the package vllm" in done.stderr
    assert len(list((tmp_path / "results/sweeps").glob("*/*/fused-*/run.json"))) == 1


def test_a_sweep_of_bad_input_alone_exits_2_and_leaves_nothing(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", "engine=nano", "seed=1,2")
    assert done.returncode == 2
    assert files(tmp_path) == []


def test_interrupt_ends_a_sweep(tmp_path: Path) -> None:
    done = call(tmp_path, "-m", "seed=1,130,2", "verify=false")
    assert done.returncode == 130
    [sweep] = (tmp_path / "results/sweeps").glob("*/*")
    names = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert names == ["fused-qwen3-0.6b-latency-seed=1", "fused-qwen3-0.6b-latency-seed=130"]


@pytest.mark.parametrize(
    ("flags", "shows"),
    [
        (["--help"], "engine: fused, hf, nano, nano_vllm, vllm"),
        (["--cfg", "job"], "hub_id: Qwen/Qwen3-0.6B"),
        (["--info", "defaults"], "workload/latency"),
    ],
)
def test_hydras_own_questions_still_work(tmp_path: Path, flags: list[str], shows: str) -> None:
    done = call(tmp_path, *flags, program=("-m", "harness"))
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout
    assert files(tmp_path) == []
