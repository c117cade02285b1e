"""Makes measured runs small enough to commit and puts them under results/reference/.

    python scripts/reference_refresh.py RUN... --to results/reference/h200 [--iterations 20]

RUN is a run's folder, a folder with runs below it, or a comparison's folder. Each run goes to `<to>/<name>`, where the
name is the run's engine, model and workload if `run.json` tells them, else its folder's name; a comparison goes to
`<to>/compare-<model>-<workload>-<engines>`, one of a single engine's variants to `<to>/<its folder's name>`. What stood
there is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines.base import InputError
from harness.machine import machine_slug
from harness.results import COMPARISON_FILE, load
from harness.slim import slim, slim_comparison

_ITERATIONS = 20
"""Kept of each shape: enough for a median within a few percent, small enough for a repository."""


def _name(run: dict[str, Any]) -> str:
    parts = [part for key in ("engine", "model", "workload") if isinstance(part := run.get(key), str)]
    return "-".join(parts) if len(parts) == 3 else Path(run["run_dir"]).name


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> int:
    """Exit code 0, or 2 with one sentence where a run cannot be read or two would get the same name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--to", type=Path, required=True, help=f"on this machine: results/reference/{machine_slug()}")
    parser.add_argument("--iterations", type=int, default=_ITERATIONS, help="kept of each shape (default: %(default)s)")
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    arguments = parser.parse_args()
    try:
        comparisons = [Path(path) for path in arguments.runs if (Path(path) / COMPARISON_FILE).is_file()]
        for source in comparisons:
            settings = json.loads((source / COMPARISON_FILE).read_text())["settings"]
            engines = dict.fromkeys(label.partition(":")[0] for label in settings["engines"])
            name = ["compare", settings["model"]["name"], settings["workload"]["name"], *engines]
            # Variants of one engine, of which there may be several comparisons, are known by their folder.
            target = arguments.to / ("-".join(name) if len(engines) > 1 else source.name)
            slim_comparison(source, target, arguments.iterations)
            print(f"{_size_bytes(target) / 1e3:9.1f} kB  {target.name}  from {source.name}")
        rest = [path for path in arguments.runs if Path(path) not in comparisons]
        runs = load(*rest).runs if rest else []
        targets = {_name(run): Path(run["run_dir"]) for run in runs}
        if len(targets) < len(runs):
            raise InputError("Two of these runs would get the same name; give one run of each engine and workload.")
        for name, source in sorted(targets.items()):
            slim(source, arguments.to / name, arguments.iterations)
            print(f"{_size_bytes(arguments.to / name) / 1e3:9.1f} kB  {name}  from {source.name}")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{_size_bytes(arguments.to) / 1e3:9.1f} kB  {arguments.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
