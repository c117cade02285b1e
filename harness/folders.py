"""Run folders that hold no measurement, and how they go away."""

from __future__ import annotations

import shutil
from pathlib import Path


def has_measurement(run_dir: Path) -> bool:
    """Whether `run_dir` holds more than Hydra's config and log files."""
    files = (path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
    return any(path.parts[0] != ".hydra" and path.suffix != ".log" for path in files)


def discard_unmeasured(run_dir: Path, results: Path) -> bool:
    """Remove `run_dir`, and the folders under `results` that this leaves empty, if it holds no measurement.

    Whether it was removed.
    """
    if has_measurement(run_dir):
        return False
    shutil.rmtree(run_dir, ignore_errors=True)
    _remove_empty(run_dir.parent, results)
    return True


def discard_empty_sweep(sweep_dir: Path, results: Path) -> None:
    """Remove a sweep's folder in which no run is left (Hydra's multirun.yaml alone does not count)."""
    if sweep_dir.is_dir() and [path.name for path in sweep_dir.iterdir()] in ([], ["multirun.yaml"]):
        shutil.rmtree(sweep_dir)
        _remove_empty(sweep_dir.parent, results)


def _remove_empty(folder: Path, results: Path) -> None:
    """`folder` and its parents, as long as they are empty and inside `results`, which stays."""
    while folder.absolute().is_relative_to(results.absolute()) and folder.absolute() != results.absolute():
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
