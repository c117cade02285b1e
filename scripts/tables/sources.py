"""Where tables get their numbers from: committed runs and model configs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from engines.base import InputError
from harness.results import Runs, load
from harness.roofline.costs import Shapes as Model

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "results/reference/h200"
MODEL = "qwen3-0.6b"
"""Which the documents are about; of others there are comparisons, in tables of their own."""
MODELS = (MODEL, "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen2.5-1.5b", "llama-3.2-1b")
"""The published models of conf/model, in the order of the tables."""

GPU = "H200's datasheet: 4.8 TB/s, 989 TFLOP/s dense bfloat16"
BYTES_PER_S = 4.8e12
FLOP_PER_S = 989e12


def floor_us(moved_bytes: float, flop: float) -> float:
    """The least time that moving so many bytes, or so many operations, takes on the GPU that `GPU` names."""
    return max(moved_bytes / BYTES_PER_S, flop / FLOP_PER_S) * 1e6


@cache
def model(name: str) -> Model:
    """The shapes in conf/model/<name>.yaml, in bfloat16."""
    path = ROOT / "conf" / "model" / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"There is no model {name} in conf/model.")
    return Model.of(yaml.safe_load(path.read_text()))


@cache
def runs_of_all_models(folder: str) -> Runs:
    """The committed runs below `folder`, a path relative to the repository or absolute."""
    return load(ROOT / folder)


@cache
def runs(folder: str) -> Runs:
    """The committed runs of `MODEL` below `folder`; their frames hold all.

    Tables choose a run by engine and workload, which one of another model may share.
    """
    found = runs_of_all_models(folder)
    return replace(found, runs=[run for run in found.runs if run["model"] == MODEL])


def run_of(found: Runs, engine: str, workload: str = "latency") -> dict[str, Any]:
    """The one run of an engine and workload; InputError if there is none."""
    for run in found.runs:
        if (run["engine"], run["workload"]) == (engine, workload):
            return run
    raise InputError(f"There is no {workload} run of engine {engine} among these runs.")


def run_of_folder(folder: Path, engine: str) -> dict[str, Any]:
    """The first run of an engine below `folder`."""
    return next(run for run in load(folder).runs if run["engine"] == engine)


def rows_of(frame: pd.DataFrame, run: dict[str, Any]) -> pd.DataFrame:
    """The rows of `frame` that belong to `run`."""
    return frame[frame["run_id"] == run["run_id"]]
