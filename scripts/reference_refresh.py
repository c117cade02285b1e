"""Makes measured runs small enough to commit and puts them under results/reference/.

    python scripts/reference_refresh.py RUN... --to results/reference/h200 [--iterations 20]

RUN is a folder with runs and comparisons at any depth, and JSON files of scripts beside them, or one of these. Each
run goes to `<to>/<name>`, where the name is the run's engine, model and workload if `run.json` tells them, else its
folder's name; a comparison goes to `<to>/compare-<model>-<workload>-<engines>`, one of a single engine's variants to
`<to>/<its folder's name>`; a JSON file keeps its name. What stood there is replaced. What was not finished is left out,
and named.
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
from harness.results import COMPARISON_FILE, RUN_FILE, load
from harness.slim import slim, slim_comparison, slim_json

_ITERATIONS = 20
"""Kept of each shape: enough for a median within a few percent, small enough for a repository."""


def _name(run: dict[str, Any]) -> str:
    parts = [part for key in ("engine", "model", "workload") if isinstance(part := run.get(key), str)]
    return "-".join(parts) if len(parts) == 3 else Path(run["run_dir"]).name


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _told(path: Path, source: str) -> None:
    print(f"{_size_bytes(path) / 1e3:9.1f} kB  {path.name}  from {source}")


def _finished(path: Path) -> bool:
    done = json.loads(path.read_text()).get("status") not in ("running", "failed", "interrupted")
    if not done:
        print(f"left out, for it was not finished: {path.parent}", file=sys.stderr)
    return done


def sources(given: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """(comparisons, runs that belong to none, JSON files) of what was given, without what was not finished.

    InputError: a path that holds none of these.
    """
    comparisons: dict[Path, None] = {}
    runs: dict[Path, None] = {}
    files: dict[Path, None] = {}
    for path in given:
        before = len(comparisons) + len(runs) + len(files)
        if path.is_file():
            files[path] = None
            continue
        # Launches have a file of that name, too, which says nothing of settings.
        claimed = [p for p in sorted(path.rglob(COMPARISON_FILE)) if "settings" in json.loads(p.read_text())]
        comparisons |= dict.fromkeys(p.parent for p in claimed if _finished(p))
        inside = {p.parent.resolve() for p in claimed}
        found = [p for p in sorted(path.rglob(RUN_FILE)) if inside.isdisjoint(p.resolve().parents)]
        runs |= dict.fromkeys(p.parent for p in found if _finished(p))
        files |= dict.fromkeys(p for p in sorted(path.glob("*.json")) if p.name not in (COMPARISON_FILE, RUN_FILE))
        if len(comparisons) + len(runs) + len(files) == before and not (claimed or found):
            raise InputError(f"{path} holds no run, no comparison and no JSON file.")
    return list(comparisons), list(runs), list(files)


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
        comparisons, folders, files = sources([Path(path) for path in arguments.runs])
        for source in comparisons:
            settings = json.loads((source / COMPARISON_FILE).read_text())["settings"]
            engines = dict.fromkeys(label.partition(":")[0] for label in settings["engines"])
            name = ["compare", settings["model"]["name"], settings["workload"]["name"], *engines]
            # Variants of one engine, of which there may be several comparisons, are known by their folder.
            target = arguments.to / ("-".join(name) if len(engines) > 1 else source.name)
            slim_comparison(source, target, arguments.iterations)
            _told(target, source.name)
        for file in files:
            slim_json(file, arguments.to / file.name)
            _told(arguments.to / file.name, file.name)
        runs = load(*folders).runs if folders else []
        targets = {_name(run): Path(run["run_dir"]) for run in runs}
        if len(targets) < len(runs):
            raise InputError("Two of these runs would get the same name; give one run of each engine and workload.")
        for name, source in sorted(targets.items()):
            slim(source, arguments.to / name, arguments.iterations)
            _told(arguments.to / name, source.name)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{_size_bytes(arguments.to) / 1e3:9.1f} kB  {arguments.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
