"""The command line: `python -m harness engine=fused model=qwen3-0.6b`, and `-m` with lists for sweeps.

Exit codes: 0 done; 1 something failed (in a sweep: some of its runs); 2 what was asked for cannot be done, said in one
sentence, with nothing left behind; 130 stopped by Ctrl-C, with what was measured kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engines.base import InputError
from harness import gpus, launched
from harness.config import CONF_DIR, CONFIG_NAME, Config, EngineConf, compose_node, to_config
from harness.errors import RunFailed
from harness.folders import discard_empty_sweep, discard_unmeasured
from harness.outcomes import BAD_INPUT, FAILED, INTERRUPTED, OK, Outcome, Session, collect
from harness.overrides import combinations, fixed_keys, fixed_overrides

TOLD_ANYWAY = ("engine", "model", "workload")
"""Overrides that every run folder's name tells."""
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib", ""),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm", ""),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm", "sbatch"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray", ""),
}
"""Of each launcher: its plugin's module, the pip extra that brings it, and the program that it cannot do without."""
LAUNCHER_LOGS = ".submitit"
"""In a sweep's folder (conf/hydra/launcher)."""

SESSION = Session()


def check_package(engine: EngineConf) -> None:
    """InputError, with the install command, if the package that `engine` drives is missing."""
    if not engine.package or importlib.util.find_spec(engine.package) is not None:
        return
    raise InputError(
        f"The engine {engine.name} needs the package {engine.package}, which is not installed: "
        f"pip install -e '.[{install_extra(engine)}]' (python -m harness.doctor prints all that this machine needs)"
    )


def install_extra(engine: EngineConf) -> str:
    """The pip extra that brings `engine`'s package to this machine."""
    import torch  # seconds to import, and only the failing path needs it

    return engine.extra if torch.cuda.is_available() or not engine.cpu_extra else engine.cpu_extra


def check_launcher(name: str) -> None:
    """InputError, with the install command, if what the launcher `name` needs is missing."""
    module, extra, program = LAUNCHERS.get(name, ("", "", ""))
    package = "hydra_plugins"  # the namespace itself is missing where no plugin is installed
    if module and (importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None):
        raise InputError(f"The launcher {name} is not installed: pip install -e '.[{extra}]'")
    if program and shutil.which(program) is None:
        raise InputError(f"The launcher {name} needs the program {program}, which this machine does not have.")


def join_cluster(init: DictConfig) -> None:
    """Connect to the Ray cluster of `init` (hydra.launcher.ray.init): a failure in the launcher ends in a traceback.

    The launcher then finds it done. It would also name a size of the object store, which a running cluster refuses.
    InputError: there is no cluster, or Ray takes no such settings.
    """
    import ray

    settings: Any = OmegaConf.to_container(init, resolve=True)
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise InputError(f"hydra.launcher.ray.init.address={init.address} cannot be joined: {reason}.") from error


def check_writable(results: Path) -> None:
    """InputError if run folders cannot be made under `results`. Leaves nothing behind."""
    existing = results.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".harness-"):
            pass
    except OSError as error:
        raise InputError(f"Cannot write results to {results}: {error.strerror or error}.") from error


def check(arguments: argparse.Namespace) -> list[Config]:
    """What each run will be; InputError for whatever would stop every run that `arguments` ask for."""
    configs = combinations(arguments.overrides, multirun=arguments.multirun)
    if arguments.cfg or arguments.info:
        return configs
    missing = []
    for config in configs:
        try:
            check_package(config.engine)
        except InputError as error:
            missing.append(error)
    if len(missing) == len(configs):
        raise missing[0]
    folders = {config.results for config in configs}
    if len(folders) > 1:
        raise InputError("A sweep writes to one folder: give one value for results.")
    check_writable(Path(folders.pop()))
    return configs


def settle_sweep(overrides: list[str]) -> list[str]:
    """Overrides for Hydra that a sweep needs besides `overrides`.

    Its folder is settled here, as an absolute path: jobs may run in other folders, and at other times.
    InputError: the launcher is not installed, or the cluster that it is to use is not there.
    """
    fixed = fixed_overrides(overrides)
    node = compose_node(fixed, with_hydra=True)
    launcher = node.hydra.runtime.choices["hydra/launcher"]
    check_launcher(launcher)
    if launcher == "ray" and node.hydra.launcher.ray.init.address:
        join_cluster(node.hydra.launcher.ray.init)
    SESSION.sweep_dir, SESSION.results = Path(node.hydra.sweep.dir).absolute(), Path(node.results)
    quoted = str(SESSION.sweep_dir).replace("\\", "\\\\").replace("'", "\\'")
    excluded = [*TOLD_ANYWAY, *fixed_keys(overrides)]
    return [
        f"hydra.sweep.dir='{quoted}'",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]",
    ]


def run_one(config: Config, run_dir: Path) -> None:
    """One run, from the checks to the folder's name on the terminal."""
    check_package(config.engine)
    from harness import runner  # brings torch, which a wrong command line need not wait for

    runner.run(config, run_dir)


@hydra.main(config_path=str(CONF_DIR), config_name=CONFIG_NAME, version_base="1.3")
def job(node: DictConfig) -> None:
    """Hydra's task: runs, and notes the outcome instead of raising, so that a sweep goes on.

    Under a launcher it is in another process than `main`, which learns the outcome from the sweep's folder.
    """
    settings = HydraConfig.get()
    os.chdir(settings.runtime.cwd)  # where the command was given; a cluster may start its jobs elsewhere
    run_dir = Path(settings.runtime.output_dir)
    SESSION.results = Path(node.results)
    if settings.mode != RunMode.MULTIRUN:
        SESSION.outcomes.append(attempt(node, run_dir))
        return
    SESSION.sweep_dir = Path(settings.sweep.dir)
    launcher = settings.runtime.choices["hydra/launcher"]
    if launcher == "basic":
        outcome = attempt(node, run_dir, settings.job.num)
        outcome.leave(SESSION.sweep_dir)
        if outcome.code == INTERRUPTED:
            raise KeyboardInterrupt  # Hydra then starts no further run
        return
    launched.run(run_dir, SESSION.sweep_dir, settings.job.num, shares_gpus=launcher in gpus.SHARING_LAUNCHERS)


def attempt(node: DictConfig, run_dir: Path, number: int = 0) -> Outcome:
    """One run, and how it ended, which is also printed. Raises nothing."""
    results, shown = Path(node.results), os.path.relpath(run_dir)
    try:
        run_one(to_config(node), run_dir)
    except InputError as error:
        show_traceback_if_asked()
        discard_unmeasured(run_dir, results)
        print(error, file=sys.stderr)
        return Outcome(number, run_dir.name, BAD_INPUT, str(error))
    except KeyboardInterrupt:
        kept = not discard_unmeasured(run_dir, results)
        print(f"Stopped. What was measured: {shown}" if kept else "Stopped before anything was measured.")
        return Outcome(number, run_dir.name, INTERRUPTED)
    except Exception as error:
        if isinstance(error, RunFailed):
            show_traceback_if_asked()
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"The run failed; its folder: {shown}", file=sys.stderr)
        return Outcome(number, run_dir.name, FAILED, f"{type(error).__name__}: {error}")
    print(f"Results: {shown}")
    return Outcome(number, run_dir.name, OK)


def show_traceback_if_asked() -> None:
    """HYDRA_FULL_ERROR=1 shows where a sentence came from."""
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        traceback.print_exc()


def main() -> int:
    """Check the command line, let Hydra run it, and say how it went; returns the exit code."""
    arguments = get_args_parser().parse_args()
    only_shows = arguments.help or arguments.hydra_help or arguments.shell_completion
    own_config = arguments.config_path or arguments.config_name or arguments.config_dir
    names: list[str] = []
    if not only_shows and not own_config:  # with a config of the user's own, Hydra's messages must do
        try:
            configs = check(arguments)
            if arguments.multirun:
                sys.argv += settle_sweep(arguments.overrides)
        except InputError as error:
            show_traceback_if_asked()
            print(error, file=sys.stderr)
            return BAD_INPUT
        names = [f"{config.engine.name}-{config.model.name}-{config.workload.name}" for config in configs]
    gpus.offer()
    launched = True
    try:
        job()
    except KeyboardInterrupt:  # in a sweep also between two runs
        SESSION.outcomes.append(Outcome(len(names), "", INTERRUPTED))
    except SystemExit:  # Hydra has said why
        if not arguments.multirun:
            raise
        launched = False
    if only_shows or arguments.cfg or arguments.info or not arguments.multirun:
        return SESSION.exit_code
    code = end_sweep(names)
    return code if launched else code or FAILED


def end_sweep(names: list[str]) -> int:
    """Collect what became of the runs called `names`, say which failed, tidy up; returns the exit code."""
    folder = SESSION.sweep_dir
    if folder is None:  # a config of the user's own, and a launcher that runs its jobs elsewhere
        print("What became of the runs is not known here; see the sweep's folder.", file=sys.stderr)
        return FAILED
    SESSION.outcomes += collect(folder, [] if SESSION.exit_code == INTERRUPTED else names)
    if SESSION.exit_code == BAD_INPUT:
        shutil.rmtree(folder / LAUNCHER_LOGS, ignore_errors=True)  # they hold the sentences that are printed here
    discard_empty_sweep(folder, SESSION.results)
    if SESSION.failures:
        print(f"{len(SESSION.failures)} of {len(SESSION.outcomes)} runs failed:", file=sys.stderr)
        for failure in SESSION.failures:
            print(f"  {failure.name}: {failure.reason}", file=sys.stderr)
    if folder.is_dir():
        print(f"Sweep: {os.path.relpath(folder)}")
    return SESSION.exit_code


if __name__ == "__main__":
    sys.exit(main())
