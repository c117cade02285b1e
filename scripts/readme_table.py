"""Makes the README's table from the committed runs of one machine.

    python scripts/readme_table.py --write [--from results/reference/h200]     # without --write: only prints it

Numbers are the medians that each run's `run.json` holds, of all its samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.results import load

ENGINES = ("vllm", "nano", "fused")
START, END = "<!-- results -->", "<!-- /results -->"


def step_rows(runs: list[dict[str, Any]]) -> list[str]:
    """One row per shape of the latency runs: milliseconds per step of each engine."""
    times: dict[tuple[str, int, int], dict[str, str]] = {}
    for run in runs:
        for shape in run["shapes"]:
            key = (shape["phase"], shape["batch_size"], shape["tokens"])
            timed = shape.get("timed", {"status": "not reached"})
            if timed["status"] == "ok":
                low, high = timed["wall_us_low"] / 1e3, timed["wall_us_high"] / 1e3
                cell = f"{timed['wall_us'] / 1e3:.2f} ({low:.2f} to {high:.2f})"
            else:
                cell = timed["status"]
            times.setdefault(key, {})[run["engine"]] = cell
    rows = []
    for (phase, batch, tokens), cells in times.items():
        size = f"{batch} × {tokens} tokens" if phase == "prefill" else f"batch {batch}, context {tokens}"
        rows.append(f"| {phase}, {size}, ms | {' | '.join(cells.get(e, '') for e in ENGINES)} |")
    return rows


def throughput_row(runs: list[dict[str, Any]]) -> str:
    """Output tokens per second of the throughput runs."""
    cells = {run["engine"]: f"{run['throughput']['output_tok_s']:,.0f}" for run in runs}
    served = runs[0]["throughput"]
    what = f"{served['requests']} requests, {served['output_tokens']:,} output tokens, tok/s"
    return f"| {what} | {' | '.join(cells.get(e, '') for e in ENGINES)} |"


def table(folder: Path) -> str:
    """The table and the sentence that says where it comes from, as Markdown."""
    runs = load(folder).runs
    latency = [r for r in runs if r["workload"] == "latency"]
    throughput = [r for r in runs if r["workload"] == "throughput"]
    first = latency[0]
    gpu = first["provenance"]["gpu"]["name"]
    head = [f"| {first['model']}, {first['dtype']} | {' | '.join(ENGINES)} |", "|---|" + "---:|" * len(ENGINES)]
    rows = step_rows(latency) + ([throughput_row(throughput)] if throughput else [])
    versions = first["provenance"]["versions"]
    vllm = next((r["notes"]["version"] for r in latency if r["engine"] == "vllm"), "none")
    source = (
        f"One {gpu}, {first['weights']['source']} weights, torch {versions['torch']}, Triton {versions['triton']}, "
        f"vLLM {vllm}. Steps: median wall time of one engine step with its 95 % interval; vLLM's run in process, one "
        "scheduler step at a time, so that its host work is not hidden behind the GPU; its requests run in its own "
        "default way. Each engine was measured in a run of its own, not interleaved. "
        f"Runs: `{folder.as_posix()}`; "
        "table: `python scripts/readme_table.py --write`."
    )
    return "\n".join([*head, *rows, "", source])


def updated(text: str, made: str) -> str:
    """`text` with `made` between the markers."""
    before, found, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise InputError(f"README.md has no place for the table: {START} and {END}.")
    return f"{before}{START}\n{made}\n{END}{after}"


def main() -> int:
    """Exit code 0, or 2 with one sentence where there are no such runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, default=Path("results/reference/h200"))
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args()
    try:
        made = table(options.folder)
        if options.write:
            readme = ROOT / "README.md"
            readme.write_text(updated(readme.read_text(), made))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
