"""Sweeps whose runs other processes do: joblib, submitit (local executor, a Slurm that is none), a local Ray."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from engines.base import InputError
from harness.__main__ import LAUNCHERS, check_launcher, settle_sweep
from harness.config import CONF_DIR
from harness.gpus import gpu_count
from harness.outcomes import BAD_INPUT, FAILED, INTERRUPTED, LOST, OK, Outcome, Session, collect
from harness.results import load

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("workload=smoke", "model=tiny", "instrument=steps", "verify=false")
ON_THIS_MACHINE = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": ["hydra.launcher.ray.remote.num_gpus=0"],
}
"""Launchers that need no cluster, and what they need on a machine that may have no GPU."""


def installed(launcher: str) -> bool:
    module = LAUNCHERS[launcher][0]
    return importlib.util.find_spec("hydra_plugins") is not None and importlib.util.find_spec(module) is not None


def needing(*names: str) -> list:
    """`names` as parameters, skipped where the launcher is not installed."""
    reason = "pip install -e '.[{}]' brings this launcher"
    return [
        pytest.param(n, marks=pytest.mark.skipif(not installed(n), reason=reason.format(LAUNCHERS[n][1])))
        for n in names
    ]


def sweep(cwd: Path, launcher: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The finished process of a sweep that `launcher` runs, started in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd.parent), **env}
    if launcher == "ray":
        environment["TMPDIR"] = "/tmp"  # Ray's sockets cannot have long paths
    command = [sys.executable, "-m", "harness", "-m", f"hydra/launcher={launcher}", *SMALL]
    command += [*ON_THIS_MACHINE.get(launcher, []), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)


def engines(*names: str) -> list[str]:
    return ["engine=nano", "engine.target=" + ",".join(f"tests.harness.launched_engines.{name}" for name in names)]


def folder_of(done: subprocess.CompletedProcess[str], cwd: Path) -> Path:
    [line] = [line for line in done.stdout.splitlines() if line.startswith("Sweep: ")]
    return cwd / line.removeprefix("Sweep: ")


@pytest.mark.parametrize("launcher", needing(*ON_THIS_MACHINE))
def test_the_reader_merges_good_runs_and_each_bad_one_is_told(tmp_path: Path, launcher: str) -> None:
    bad = {"Refuses": "It cannot do this.", "Dies": "its process died, exit code 3", "Breaks": "RuntimeError: boom"}
    done = sweep(tmp_path, launcher, *engines("Works", *bad, "Fine"))
    assert done.returncode == 1
    told = done.stderr.partition(f"{len(bad)} of {len(bad) + 2} runs failed:\n")[2].splitlines()
    assert len(told) == len(bad), done.stderr
    for line, reason in zip(told, bad.values(), strict=True):
        assert re.fullmatch(rf"  nano-tiny-smoke\S*: {re.escape(reason)}", line)
    assert "validated against" not in done.stderr

    runs = load(folder_of(done, tmp_path))
    classes = sorted(run["config"]["engine"]["target"].rpartition(".")[2] for run in runs.runs if run["status"] == "ok")
    assert classes == ["Fine", "Works"]
    assert set(runs.steps["run_id"]) == {run["run_id"] for run in runs.runs} and len(runs.runs) == 2
    assert not (folder_of(done, tmp_path) / ".outcomes").exists()


@pytest.mark.parametrize("launcher", needing(*ON_THIS_MACHINE))
def test_bad_input_alone_exits_2_and_leaves_nothing(tmp_path: Path, launcher: str) -> None:
    done = sweep(tmp_path, launcher, *engines("Refuses"), "seed=1,2")
    assert done.returncode == 2
    assert not list((tmp_path / "results").rglob("*"))


SBATCH = r"""#!/usr/bin/env bash
script=${@: -1}
cp "$script" "$SLURM_STAND_IN/submitted"
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
echo "Submitted batch job 77"
for ((i = 0; i <= last; i++)); do
  (sleep 1; cd /; SLURM_JOB_ID=$((78 + i)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 \
    SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here \
    bash "$SLURM_STAND_IN/submitted") > /dev/null 2>&1 &
done
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 != *python* ]]; do shift; done\nexec "$@"\n'
SACCT = '#!/usr/bin/env bash\necho "JobID|State|NodeList"; echo "77_0|RUNNING|here"; echo "77_1|RUNNING|here"\n'


@pytest.mark.parametrize("launcher", needing("submitit_slurm"))
def test_slurm_is_asked_for_one_gpu_a_job_and_the_runs_come_together(tmp_path: Path, launcher: str) -> None:
    """Programs with Slurm's names start the jobs, in another folder than the command's."""
    programs, work = tmp_path / "slurm", tmp_path / "work"
    programs.mkdir(), work.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = sweep(
        work, launcher, *engines("Works", "Refuses"), "hydra.launcher.partition=fast",
        PATH=path, SLURM_STAND_IN=str(programs),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "1 of 2 runs failed:" in done.stderr and "It cannot do this." in done.stderr
    [run] = load(folder_of(done, work)).runs
    assert run["status"] == "ok"
    asked = (programs / "submitted").read_text().splitlines()
    assert {"#SBATCH --gpus-per-node=1", "#SBATCH --partition=fast", "#SBATCH --nodes=1"} <= set(asked)


@pytest.mark.parametrize("launcher", needing("joblib", "submitit_local"))
def test_processes_of_one_machine_have_a_gpu_each(tmp_path: Path, launcher: str) -> None:
    work, notes = tmp_path / "work", tmp_path / "notes"
    work.mkdir(), notes.mkdir()
    done = sweep(
        work, launcher, *engines("Works"), "seed=1,2,3,4",
        NOTES=str(notes), CUDA_VISIBLE_DEVICES="61,62",  # made up, so that torch uses the CPU on any machine
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [json.loads(path.read_text()) for path in notes.iterdir()]
    assert len(seen) == 4 and {note["gpus"] for note in seen} == {"61", "62"}
    for one, other in itertools.combinations(seen, 2):
        apart = one["end_s"] < other["start_s"] or other["end_s"] < one["start_s"]
        assert one["gpus"] != other["gpus"] or apart


TAKE = "import time; from harness.gpus import *; take_one(); print(os.environ[VISIBLE], flush=True); time.sleep(60)"


def test_a_gpu_is_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HARNESS_GPUS": "0,1"}
    started = [subprocess.Popen([sys.executable, "-c", TAKE], env=env, stdout=subprocess.PIPE, text=True)]
    try:
        assert started[0].stdout.readline() == "0\n"
        started.append(subprocess.Popen([sys.executable, "-c", TAKE], env=env, stdout=subprocess.PIPE, text=True))
        assert started[1].stdout.readline() == "1\n"
        started.append(subprocess.Popen([sys.executable, "-c", TAKE], env=env, stdout=subprocess.PIPE, text=True))
        with pytest.raises(subprocess.TimeoutExpired):
            started[2].wait(timeout=2)
        started[0].send_signal(signal.SIGKILL)
        assert started[2].stdout.readline() == "0\n"
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("GPU-a, GPU-b", 2)])
def test_gpus_are_those_that_cuda_would_use(monkeypatch, visible: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (gpu_count(), gpu_count(1)) == (count, max(1, count))


def test_outcomes_come_together_in_order_and_a_lost_run_is_a_failure(tmp_path: Path) -> None:
    ok, refused = Outcome(2, "c", OK), Outcome(0, "a", BAD_INPUT, "no")
    ok.leave(tmp_path)
    refused.leave(tmp_path)
    found = collect(tmp_path, ["a", "b", "c"])
    assert found == [refused, Outcome(1, "b", FAILED, LOST), ok]
    assert not list(tmp_path.iterdir())
    assert Session(found).exit_code == 1 and [f.name for f in Session(found).failures] == ["a", "b"]


def test_after_an_interrupt_the_runs_that_never_started_did_not_fail(tmp_path: Path) -> None:
    Outcome(0, "a", INTERRUPTED).leave(tmp_path)
    found = collect(tmp_path, ["a", "b"])
    assert found == [Outcome(0, "a", INTERRUPTED)] and Session(found).exit_code == 130


def test_a_cluster_that_is_not_there_is_a_sentence(monkeypatch) -> None:
    def init(address: str, log_to_driver: bool) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please start one.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.setattr("harness.__main__.check_launcher", lambda name: None)
    monkeypatch.setattr("harness.__main__.SESSION", Session())
    assert settle_sweep(["hydra/launcher=ray"])  # starts a Ray of its own, later
    with pytest.raises(InputError, match=r"address=auto cannot be joined: Could not find any running Ray instance\.$"):
        settle_sweep(["hydra/launcher=ray", "hydra.launcher.ray.init.address=auto"])


def test_each_launcher_has_a_config_a_plugin_and_an_extra(monkeypatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {path.stem for path in (CONF_DIR / "hydra/launcher").glob("*.yaml")} == set(LAUNCHERS)
    for name, (module, extra, _) in LAUNCHERS.items():
        target = OmegaConf.load(CONF_DIR / f"hydra/launcher/{name}.yaml")["_target_"]
        assert target.startswith(f"{module}.")
        distribution = module.partition(".")[2].replace("_", "-")
        assert any(requirement.startswith(distribution) for requirement in extras[extra])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=re.escape(f"pip install -e '.[{extra}]'")):
            check_launcher(name)
