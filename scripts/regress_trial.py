"""How often does harness.regress call the same slower, and how often does it find what is slower? On this machine.

    python scripts/regress_trial.py results/regress-trial --json results/reference/h200/regress-trial.json
    python scripts/regress_trial.py results/trial --engine nano --launches 6 --seconds 1 -- model=tiny

Starts ENGINE LAUNCHES times, and half as often with a delay of a share of each step planted into one layer
(scripts/slow_engine.py; the others have a delay of nothing there), spread evenly among them, each a run of the harness
in a process of its own. How long a step's delay is follows from the first launch. The first of either kind is
verified; the others run the same code on the same weights. Then it takes the launches apart: COMPARISONS times half of
the plain ones against the other half, and COMPARISONS times as many plain against slow ones, drawn at random, each
judged by harness.regress at its default preset. Launches that are there already are not run again; what follows `--`
are overrides of the harness.

fused is bound by the GPU, whose launches differ by little; how nano's differ says more of the host than of the engine.

Random halves of one set of launches are not independent comparisons: counts over them say how such launches are judged,
with less certainty than as many comparisons of fresh launches would.

Exit codes: 0 done, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.regress.sides import Cell, Key, Side, read
from harness.regress.thresholds import PRESETS, Thresholds
from harness.regress.verdicts import Verdict, judge
from harness.results import load, write_json
from scripts.command_line import parsed

NORMAL, SLOW = "normal", "slow"
SAME_SAME, SAME_SLOW = "same_with_same", "same_with_slow"
WORK = (
    "workload=latency", "workload.prefill=[[1,512]]", "workload.decode=[[1,128],[32,128]]",
    "workload.cpu_prefill=[[1,64]]", "workload.cpu_decode=[[1,32],[8,32]]", "instrument=steps",
    "instrument.precision=0.001", "instrument.max_iterations=1000", "weights=random",
    # A small cache of known size, few graphs: a launch starts in half the time.
    "limits.max_num_seqs=32", "limits.max_num_batched_tokens=4096", "limits.kv_cache_tokens=65536",
)  # fmt: skip
ENGINES = {
    # Its own kernels do nearly everything, and torch's compiler takes seconds to be imported for the rest.
    "fused": ("engine=fused", "engine.target=scripts.slow_engine.Fused", "+engine.options.compile=false"),
    "nano": ("engine=nano", "engine.target=scripts.slow_engine.Nano"),
}
LAUNCH = """
import json, sys
from pathlib import Path
import engines.hf, scripts.slow_engine
from harness.config import compose
from harness.runner import run
overrides, folder = json.loads(sys.stdin.readline())
run(compose(overrides), Path(folder))
"""
"""A process that has imported everything, and runs the harness when it is told the overrides and the run's folder.
(The harness's command line would compose the same config four times.)"""
NOTE = (
    "Every comparison draws its launches from one set of them, the slow side often the same ones, so the comparisons "
    "are not independent; the counts say "
    "how launches like these are judged, not how often in the long run."
)


@dataclass(frozen=True)
class Launches:
    """One row: the median step of each launch in ms, plain and slow."""

    key: Key
    normal_ms: tuple[float, ...]
    slow_ms: tuple[float, ...]


def order(launches: int) -> list[tuple[str, int]]:
    """(side, number) of all launches, as many slow ones as a comparison takes: A B A  A B A  A B A ..."""
    return [
        (side, number)
        for n in range(launches)
        for side, number in ([(NORMAL, n), (SLOW, n // 2)] if n % 2 == 0 and n + 1 < launches else [(NORMAL, n)])
    ]


def delays_us(folder: Path, share: float) -> list[list[float]]:
    """`delays_us` of the slow engine: `share` of each step of the launch in `folder`."""
    found = []
    for shape in load(folder).runs[0]["shapes"]:
        rows = shape["batch_size"] * (shape["tokens"] if shape["phase"] == "prefill" else 1)
        found.append([rows, round(share * shape["timed"]["wall_us"], 1)])
    return found


def launched(folder: Path) -> bool:
    """Whether a finished run lies below `folder`."""
    return folder.is_dir() and any(json.loads(p.read_text()).get("status") == "ok" for p in folder.rglob("run.json"))


def run_launches(
    into: Path, engine: str, launches: int, seconds: float, share: float, overrides: Sequence[str]
) -> None:
    """All launches that are not there yet. InputError: one failed."""
    missing = [(side, n) for side, n in order(launches) if not launched(into / side / f"{n:02}")]
    # While an engine starts on a GPU the processor is free to import for the next one; without one that would disturb.
    ahead = torch.cuda.is_available()
    waiting: list[subprocess.Popen[str]] = []
    try:
        for place, (side, number) in enumerate(missing):
            folder, begun_s = into / side / f"{number:02}", time.perf_counter()
            arguments = [*ENGINES[engine], *WORK, f"instrument.max_seconds_per_shape={seconds:g}"]
            if side == SLOW:
                delays = json.dumps(delays_us(into / NORMAL / "00", share), separators=(",", ":"))
                arguments.append(f"+engine.options.delays_us={delays}")
            arguments += [f"verify={json.dumps(number == 0)}", *overrides]
            process = waiting.pop() if waiting else _process()
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, and will say why
                process.stdin.write(json.dumps([arguments, str(folder)]) + "\n")
                process.stdin.flush()
            if ahead and place + 1 < len(missing):
                waiting.append(_process())
            said, _ = process.communicate()
            if process.returncode:
                raise InputError(f"Launch {number} ({side}) failed:\n{said[-2000:]}")
            print(f"{place + 1} of {len(missing)}: {side} {number}, {time.perf_counter() - begun_s:.1f} s", flush=True)
    finally:
        for process in waiting:
            process.kill()
            process.wait()


def _process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=ROOT,
    )  # fmt: skip


def read_launches(into: Path) -> list[Launches]:
    """The rows of all launches. InputError: launches are missing in some rows, or no launch of a side was verified."""
    read(into / NORMAL / "00", into / SLOW / "00")  # refuses what was not verified
    normal, slow = read(into / NORMAL, into / SLOW, verified=False)
    rows = [
        Launches(
            key, tuple(map(float, np.exp(cell.log_medians))), tuple(map(float, np.exp(slow.rows[key].log_medians)))
        )
        for key, cell in normal.rows.items()
        if key in slow.rows
    ]
    if len({(len(row.normal_ms), len(row.slow_ms)) for row in rows}) != 1:
        raise InputError("Some launches lack some rows; look for failures in their run.json.")
    return rows


def verdicts_of(
    rows: Sequence[Launches], comparisons: int, thresholds: Thresholds, seed: int = 0
) -> dict[str, list[dict[Key, Verdict]]]:
    """Verdicts per comparison: of halves of the plain launches with each other, and of as many plain with slow ones."""
    rng = np.random.default_rng(seed)
    plain, slow = len(rows[0].normal_ms), len(rows[0].slow_ms)
    side = min(plain // 2, slow)
    if side < thresholds.min_launches:
        raise InputError(f"{plain} launches give sides of {side}; {2 * thresholds.min_launches} are needed.")
    found: dict[str, list[dict[Key, Verdict]]] = {SAME_SAME: [], SAME_SLOW: []}
    for _ in range(comparisons):
        drawn = rng.permutation(plain)
        first, second = drawn[:side], drawn[side : 2 * side]
        others = rng.permutation(slow)[:side]
        base = _side((row.key, np.take(row.normal_ms, first)) for row in rows)
        found[SAME_SAME].append(
            _judged(base, _side((row.key, np.take(row.normal_ms, second)) for row in rows), thresholds)
        )
        found[SAME_SLOW].append(
            _judged(base, _side((row.key, np.take(row.slow_ms, others)) for row in rows), thresholds)
        )
    return found


def _side(medians: Any) -> Side:
    return Side({key: Cell([np.array([value]) for value in values]) for key, values in medians}, [])


def _judged(baseline: Side, candidate: Side, thresholds: Thresholds) -> dict[Key, Verdict]:
    return {row.key: row.verdict for row in judge(baseline, candidate, thresholds).rows}


def record(rows: Sequence[Launches], comparisons: int, share: float, run: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON file holds; `run` is the record of one of the launches."""
    thresholds = PRESETS["default"]
    found = verdicts_of(rows, comparisons, thresholds)
    provenance = run["provenance"]
    told = []
    for row in rows:
        logs = np.log(row.normal_ms), np.log(row.slow_ms)
        told.append(
            {
                "key": asdict(row.key),
                "name": row.key.name,
                "normal_ms": list(row.normal_ms),
                "slow_ms": list(row.slow_ms),
                "launch_noise": float(logs[0].std(ddof=1)),
                "slower_by": float(np.expm1(logs[1].mean() - logs[0].mean())),
                **{
                    kind: {v.value: sum(verdicts[row.key] is v for verdicts in all_verdicts) for v in Verdict}
                    for kind, all_verdicts in found.items()
                },
            }
        )
    return {
        "device": provenance["cpu"]["model"] if run["device"] == "cpu" else provenance["gpu"]["name"],
        "engine": run["engine"],
        "model": run["model"],
        "versions": provenance["versions"],
        "launches": {NORMAL: len(rows[0].normal_ms), SLOW: len(rows[0].slow_ms)},
        "planted": share,
        "comparisons": comparisons,
        "launches_a_side": min(len(rows[0].normal_ms) // 2, len(rows[0].slow_ms)),
        "thresholds": thresholds.record(),
        "comparisons_with_slower": {
            kind: sum(Verdict.SLOWER in verdicts.values() for verdicts in all_verdicts)
            for kind, all_verdicts in found.items()
        },
        "rows": told,
        "note": NOTE,
    }


def show(made: Mapping[str, Any]) -> None:
    """A line per row and kind of comparison."""
    for row in made["rows"]:
        print(f"{row['name']}: launch noise {row['launch_noise']:.2%}, slow launches slower by {row['slower_by']:.2%}")
        for kind in (SAME_SAME, SAME_SLOW):
            said = Counter(row[kind])
            print(f"  {kind.replace('_', ' ')}: {', '.join(f'{n} {verdict}' for verdict, n in said.items() if n)}")
    for kind, number in made["comparisons_with_slower"].items():
        print(f"{kind.replace('_', ' ')}: something SLOWER in {number} of {made['comparisons']} comparisons")
    print(made["note"])


def main() -> int:
    """Exit code 0, or 2 with the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, metavar="FOLDER", help="where the launches' runs go")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="fused", help="default: %(default)s")
    parser.add_argument("--launches", type=int, default=12, help="plain ones, half as many slow (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a shape (default: %(default)s)")
    parser.add_argument("--slowdown", type=float, default=0.03, help="share of a step planted (default: %(default)s)")
    parser.add_argument("--comparisons", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    if (asked := parsed(parser)) is None:
        return 0
    arguments, overrides = asked
    into = arguments.into.absolute()
    try:
        run_launches(into, arguments.engine, arguments.launches, arguments.seconds, arguments.slowdown, overrides)
        run = load(into / NORMAL).runs[0]
        made = record(read_launches(into), arguments.comparisons, arguments.slowdown, run)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    show(made)
    if arguments.json:
        write_json(arguments.json, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
