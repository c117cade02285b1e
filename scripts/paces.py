"""Is an engine as fast beside another process's context on the GPU as it is alone?

    python scripts/paces.py --json results/reference/h200/paces-fused.json
    python scripts/paces.py --engine nano --json results/reference/h200/paces-nano.json -- model=qwen3-4b

A comparison keeps several engines on one GPU, of which one works at a time. Whoever waits takes no time, but that it is
there can decide at which of several paces another's dependent kernels run (docs/07_kernel_optimization.md). This
starts one engine and measures blocks of whole calls, as a comparison does, three times: alone; while another process
holds a context on the GPU and does nothing; and after that process has ended. What follows `--` are overrides of the
harness.

Ctrl-C ends it early; what was measured is kept. Exit codes: 0 done, 1 a block failed, 2 it cannot be done, 130 ended
early.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.errors import HydraException

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.compare.table import Row
from harness.config import compose
from harness.results import write_json
from harness.rounds import BlockFailed, Item, items
from harness.runner import Session
from kernels._timing import beside_another
from scripts.command_line import parsed

STATES = ("alone", "beside", "after")
WORK = (
    "model=qwen3-0.6b", "weights=random", "workload=tpot", "workload.prefill=[[1,128],[1,1024],[16,1024]]",
    "workload.decode=[[1,128],[8,128],[16,128],[32,128],[64,128],[128,128],[256,128]]", "verify=false",
    "limits.max_model_len=4096",
)  # fmt: skip
CACHE = "limits.kv_cache_tokens=214016"
"""On a GPU, as in a comparison of four engines."""


def record_of(session: Session, work: list[Item]) -> dict[str, Any]:
    """What the JSON file holds, as yet without a measurement. InputError: somebody else is on the GPU already."""
    kept = {key: session.record[key] for key in ("engine", "model", "device", "limits", "provenance", "gpu_before")}
    if others := (kept["gpu_before"] or {}).get("other_processes"):
        raise InputError(f"The GPU is not the engine's alone: {len(others)} other processes are on it.")
    calls = [item.key | {state: [] for state in STATES} for item in work]
    return kept | {"status": "interrupted", "failures": [], "calls": calls}


def measure(session: Session, work: list[Item], record: dict[str, Any], blocks: int) -> None:
    """Fill `record`, in which each call's samples in ms stand by state; the session is started."""
    on = session.measured.blocks(session.work.requests)
    for item in work:
        on.warm_up(item)
    for state in STATES:
        with beside_another(torch.device(session.device)) if state == "beside" else nullcontext():
            for item, call in zip(work, record["calls"], strict=True):
                for _ in range(blocks):
                    try:
                        call[state] += on.measure(item)
                    except BlockFailed as failed:
                        record["failures"] += [f"{Row(**item.key).name}, {state}: {failed}"]
    record["status"] = "ok"


def main() -> int:
    """Exit code 0, or another with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="fused", help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=4, help="of each call and state; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    if (asked := parsed(parser)) is None:
        return 0
    arguments, overrides = asked
    record: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="paces-") as folder:
            cache = [CACHE] if torch.cuda.is_available() else []
            config = compose([f"engine={arguments.engine}", *WORK, *cache, f"results={folder}", *overrides])
            session = Session(config, Path(folder) / "run")
            work = items(session.work)
            with session.started():
                record = record_of(session, work)
                measure(session, work, record, arguments.blocks)
    except (InputError, BlockFailed, HydraException, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Ended early.", file=sys.stderr)
        return 130
    finally:
        if arguments.json and record:
            write_json(arguments.json, record)
    for item, call in zip(work, record["calls"], strict=True):
        times = ", ".join(f"{state} {median(call[state]):.3f}" for state in STATES if call[state])
        print(f"{arguments.engine}, {Row(**item.key).name}: {times}", flush=True)
    print(*record["failures"], sep="\n", end="\n" if record["failures"] else "")
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
