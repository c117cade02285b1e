"""A run that a launcher's worker starts, in a process of its own.

A worker of joblib, submitit or Ray outlives its run this way, also one that kills its process, and the launcher does
not give up the others. Each run has a fresh process, and the GPU that it took is free when it ends.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from harness import gpus
from harness.config import Config
from harness.outcomes import FAILED, Outcome

_PR_SET_PDEATHSIG = 1


def run(run_dir: Path, sweep_dir: Path, number: int, shares_gpus: bool) -> None:
    """Run what stands in `run_dir`'s config, in a new process, to its end. It leaves an outcome in any case."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    place = [str(run_dir), str(sweep_dir)]
    command = [sys.executable, "-m", "harness.launched", *place, str(number), str(int(shares_gpus))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, env=env, preexec_fn=_end_with_parent)
    code = process.wait()
    if code:
        Outcome(number, run_dir.name, FAILED, f"its process died, exit code {code}").leave(sweep_dir)
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, logging.FileHandler)]:
        logging.root.removeHandler(handler)  # launchers log after a run, whose folder may be gone
        handler.close()


def _end_with_parent() -> None:
    """A launcher that ends its worker (a time limit, a cancelled job) ends the run with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def main(run_dir: Path, sweep_dir: Path, number: int, shares_gpus: bool) -> None:
    """The new process."""
    from harness.__main__ import attempt  # which imports this module

    node = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run_dir / ".hydra/config.yaml"))
    assert isinstance(node, DictConfig)
    if shares_gpus and node.device != "cpu":
        gpus.take_one()
    attempt(node, run_dir, number).leave(sweep_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
