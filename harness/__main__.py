"""The command line: `python -m harness engine=fused model=qwen3-0.6b`, and `-m` with lists for sweeps.

Exit codes: 0 done; 1 something failed (in a sweep: some of its runs); 2 what was asked for cannot be done, said in one
sentence, with nothing left behind; 130 stopped by Ctrl-C, with what was measured kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from engines.base import InputError
from harness.config import CONF_DIR, CONFIG_NAME, Config, EngineConf, to_config
from harness.errors import RunFailed
from harness.folders import discard_empty_sweep, discard_unmeasured
from harness.overrides import combinations, fixed_keys

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
TOLD_ANYWAY = ("engine", "model", "workload")
"""Overrides that every run folder's name tells."""


@dataclass
class Session:
    """What became of the runs of this process: an exit code each and, for those that failed, name and reason."""

    codes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    sweep_dir: Path | None = None
    results: Path = Path("results")

    def failed(self, code: int, name: str, reason: str) -> None:
        self.codes.append(code)
        self.failures.append(f"{name}: {reason}")

    @property
    def exit_code(self) -> int:
        if INTERRUPTED in self.codes:
            return INTERRUPTED
        bad = [code for code in self.codes if code != OK]
        if len(bad) == len(self.codes) and set(bad) == {BAD_INPUT}:
            return BAD_INPUT
        return FAILED if bad else OK


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


def check(arguments: argparse.Namespace) -> None:
    """InputError for whatever would stop every run that `arguments` ask for."""
    configs = combinations(arguments.overrides, multirun=arguments.multirun)
    if arguments.cfg or arguments.info:
        return
    missing = []
    for config in configs:
        try:
            check_package(config.engine)
        except InputError as error:
            missing.append(error)
    if len(missing) == len(configs):
        raise missing[0]
    for results in {config.results for config in configs}:
        check_writable(Path(results))


def run_one(config: Config, run_dir: Path) -> None:
    """One run, from the checks to the folder's name on the terminal."""
    check_package(config.engine)
    from harness import runner  # brings torch, which a wrong command line need not wait for

    runner.run(config, run_dir)


@hydra.main(config_path=str(CONF_DIR), config_name=CONFIG_NAME, version_base="1.3")
def job(node: DictConfig) -> None:
    """Hydra's task: runs, and notes the outcome in SESSION instead of raising, so that a sweep goes on."""
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    sweep = settings.mode == RunMode.MULTIRUN
    if sweep:
        SESSION.sweep_dir = Path(settings.sweep.dir)
    SESSION.results = Path(node.results)
    shown = os.path.relpath(run_dir)
    try:
        run_one(to_config(node), run_dir)
    except InputError as error:
        show_traceback_if_asked()
        discard_unmeasured(run_dir, SESSION.results)
        print(error, file=sys.stderr)
        SESSION.failed(BAD_INPUT, run_dir.name, str(error))
    except KeyboardInterrupt:
        kept = not discard_unmeasured(run_dir, SESSION.results)
        print(f"Stopped. What was measured: {shown}" if kept else "Stopped before anything was measured.")
        SESSION.codes.append(INTERRUPTED)
        if sweep:
            raise  # Hydra then starts no further run
    except Exception as error:
        if isinstance(error, RunFailed):
            show_traceback_if_asked()
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        print(f"The run failed; its folder: {shown}", file=sys.stderr)
        SESSION.failed(FAILED, run_dir.name, f"{type(error).__name__}: {error}")
    else:
        print(f"Results: {shown}")
        SESSION.codes.append(OK)


def show_traceback_if_asked() -> None:
    """HYDRA_FULL_ERROR=1 shows where a sentence came from."""
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        traceback.print_exc()


def main() -> int:
    """Check the command line, let Hydra run it, and say how it went; returns the exit code."""
    arguments = get_args_parser().parse_args()
    only_shows = arguments.help or arguments.hydra_help or arguments.shell_completion
    own_config = arguments.config_path or arguments.config_name or arguments.config_dir
    if not only_shows and not own_config:  # with a config of the user's own, Hydra's messages must do
        try:
            check(arguments)
        except InputError as error:
            show_traceback_if_asked()
            print(error, file=sys.stderr)
            return BAD_INPUT
        if arguments.multirun:
            excluded = [*TOLD_ANYWAY, *fixed_keys(arguments.overrides)]
            sys.argv.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]")
    try:
        job()
    except KeyboardInterrupt:
        if INTERRUPTED not in SESSION.codes:  # it came between two runs
            SESSION.codes.append(INTERRUPTED)
    if SESSION.sweep_dir is not None:
        discard_empty_sweep(SESSION.sweep_dir, SESSION.results)
        if SESSION.failures:
            print(f"{len(SESSION.failures)} of {len(SESSION.codes)} runs failed:", file=sys.stderr)
            for failure in SESSION.failures:
                print(f"  {failure}", file=sys.stderr)
    return SESSION.exit_code


if __name__ == "__main__":
    sys.exit(main())
