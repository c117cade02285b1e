"""How long does an engine take from its construction until it can run, with nothing compiled before and with all of it?

    python scripts/startup.py --json results/reference/h200/startup.json
    python scripts/startup.py --engine nano --json FILE -- model=qwen3-4b

Runs `python -m harness` twice, each time a single short shape, with the caches of Triton and of torch's compiler in a
new folder: the first start finds them empty, the second finds what the first has left. What counts is `engine_start` in
their run.json: importing the engine, loading weights, sizing the cache, compiling, capturing graphs; not Python's own
start, torch's import or making random weights. Of the engine's own stages each has its seconds. What follows `--` are
overrides of the harness.

--caches keeps the caches, in `triton_cache_dir` and `torchinductor_cache_dir` of a folder that must be new: what a cold
start has compiled need not be compiled again by whatever runs next.

Exit codes: 0 done, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.results import write_json
from scripts.command_line import parsed

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
STARTS = ("cold", "warm")
GOAL_S = {"cold": 90.0, "warm": 15.0}
WORK = (
    "model=qwen3-0.6b", "weights=random", "workload=latency", "workload.prefill=[]", "workload.decode=[[1,128]]",
    "workload.cpu_prefill=[]", "workload.cpu_decode=[[1,16]]", "limits.max_num_seqs=256", "limits.max_model_len=4096",
    "instrument=steps", "instrument.max_seconds_per_shape=0.5", "verify=false",
)  # fmt: skip


def command(engine: str, overrides: Sequence[str], results: Path) -> list[str]:
    """The harness's command line."""
    return [sys.executable, "-m", "harness", f"engine={engine}", *WORK, f"results={results}", *overrides]


def start(engine: str, overrides: Sequence[str], caches_in: Path, results: Path, name: str) -> dict[str, Any]:
    """One run in a process of its own; its run.json. InputError: it failed."""
    caches = {variable: str(caches_in / variable.lower()) for variable in CACHES}
    done = subprocess.run(
        command(engine, overrides, results), cwd=ROOT, env=os.environ | caches, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"The {name} start failed:\n{(done.stdout + done.stderr)[-2000:]}")
    (found,) = results.rglob("run.json")
    return json.loads(found.read_text())


def record(engine: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the JSON file holds; `runs` by the name of their start."""
    first = runs["cold"]
    provenance = first["provenance"]
    return {
        "device": provenance["cpu"]["model"] if first["device"] == "cpu" else provenance["gpu"]["name"],
        "provenance": provenance,
        "engine": engine,
        "model": first["model"],
        "limits": first["limits"],
        "graphs": len(first["notes"].get("graph_batch_sizes", [])),
        "start_s": {name: run["phases_s"]["engine_start"] for name, run in runs.items()},
        "stages_s": {name: run["notes"].get("start_s", {}) for name, run in runs.items()},
        "goal_s": GOAL_S,
    }


def main() -> int:
    """Exit code 0, or 2 with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="fused", help="default: %(default)s")
    parser.add_argument("--caches", type=Path, metavar="FOLDER", help="keep the caches here, in a new folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    if (asked := parsed(parser)) is None:
        return 0
    arguments, overrides = asked
    runs: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            caches = (arguments.caches or Path(folder) / "caches").absolute()
            if caches.exists():
                raise InputError(f"{caches} exists; a cold start needs a new folder.")
            for name in STARTS:
                runs[name] = start(arguments.engine, overrides, caches, Path(folder) / name, name)
                seconds = runs[name]["phases_s"]["engine_start"]
                print(f"{arguments.engine}, {name}: {seconds:.1f} s (goal {GOAL_S[name]:.0f} s)", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, record(arguments.engine, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
