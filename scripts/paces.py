"""Does an engine decode as fast beside another process's context on the GPU as it does alone?

    python scripts/paces.py --json results/reference/h200/paces.json
    python scripts/paces.py --engine nano --json FILE -- model=qwen3-4b

A comparison keeps several engines on one GPU, of which one works at a time. Whoever waits takes no time, but that it is
there can decide at which of several paces another's dependent kernels run (docs/07_kernel_optimization.md). This
starts one engine and measures blocks of TPOT, as a comparison does, three times: alone; while another process holds a
context on the GPU and does nothing; and after that process has ended. What follows `--` are overrides of the harness.

Exit codes: 0 done, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.errors import HydraException

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.config import compose
from harness.results import write_json
from harness.rounds import BlockFailed, items
from harness.runner import Session
from kernels._timing import beside_another

STATES = ("alone", "beside", "after")
WORK = (
    "model=qwen3-0.6b", "weights=random", "workload=tpot", "workload.prefill=[]", "workload.cpu_prefill=[]",
    "workload.decode=[[1,128],[8,128],[16,128],[32,128],[64,128],[128,128],[256,128]]", "verify=false",
    "limits.kv_cache_tokens=214016",
)  # fmt: skip


def measured(session: Session, blocks: int) -> list[dict[str, Any]]:
    """TPOT in ms of each block, by batch size and state; the session is started."""
    work = items(session.work)
    on = session.measured.blocks(session.work.requests)
    for item in work:
        on.warm_up(item)
    rows: list[dict[str, Any]] = [{"batch_size": item.batch_size} for item in work]
    for state in STATES:
        device = torch.device(session.device)
        with beside_another(device) if state == "beside" else nullcontext():
            for item, row in zip(work, rows, strict=True):
                row[state] = [on.measure(item)[0] for _ in range(blocks)]
    return rows


def record(session: Session, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON file holds."""
    kept = ("engine", "model", "device", "limits", "provenance")
    return {key: session.record[key] for key in kept} | {"notes": session.record.get("notes"), "tpot_ms": list(rows)}


def main() -> int:
    """Exit code 0, or 2 with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="fused", help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=5, help="of each batch size and state; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, overrides = sys.argv[1:cut], sys.argv[cut + 1 :]
    arguments = parser.parse_args(own)
    try:
        with tempfile.TemporaryDirectory(prefix="paces-") as folder:
            config = compose([f"engine={arguments.engine}", *WORK, f"results={folder}", *overrides])
            session = Session(config, Path(folder) / "run")
            with session.started():
                rows = measured(session, arguments.blocks)
    except (InputError, BlockFailed, HydraException) as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        times = ", ".join(f"{state} {median(row[state]):.3f}" for state in STATES)
        print(f"{arguments.engine}, batch {row['batch_size']}, TPOT ms: {times}", flush=True)
    if arguments.json:
        write_json(arguments.json, record(session, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
