"""Makes the pictures of README.md and docs/*.md anew from committed runs.

    python scripts/doc_plots.py --write     # into docs/images
    python scripts/doc_plots.py --check     # exit code 1 where one is out of date

They are the report's own plots, as SVG that follows the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import InputError
from harness.report import ablation, latency, layers, ops, serving, style
from harness.report.data import Data, Shape
from harness.report.plots import by_itself, inline
from scripts.tables import ops as op_tables
from scripts.tables import studies
from scripts.tables.comparison import COMPARISON
from scripts.tables.sources import REFERENCE, runs

IMAGES = ROOT / "docs" / "images"
ENGINES = ("vllm", "nano", "fused")
SHAPE = Shape("decode", 1, 128)
"""Of the layer view: where borders between kernels weigh most."""


def time_per_token() -> Figure:
    """The README's: TPOT over batch of engines that took turns."""
    [comparison] = Data.read(ROOT / COMPARISON).comparisons
    return latency.drawn(latency.comparison_panels(comparison))


def time_per_layer() -> Figure:
    """The layer view of one decode step, engines side by side."""
    data = Data.read(*(ROOT / REFERENCE / f"{engine}-qwen3-0.6b-latency" for engine in ENGINES))
    [setting] = data.settings
    found = {entry.engine: (entry, trace) for entry, trace in layers.traced(data, setting, SHAPE)}
    return layers.bars([found[engine] for engine in ENGINES])


def feature_costs() -> Figure:
    """What each call takes longer without each feature."""
    data = Data.read(*studies.comparisons(ROOT / REFERENCE, studies.WITHOUT))
    [family] = ablation.families(data)
    return ablation.drawn(family)


def op_study() -> Figure:
    """RMSNorm and the linear layer after it over rows, all products of the study."""
    data = Data.read(*studied())
    weights = ops.medians(data).groupby(ops.KEYS)
    of = {run["run_id"]: run for run in data.runs.runs}
    return ops.drawn(
        [
            (f"{key[1]}, W {key[-1].replace('x', ' × ')}", group.droplevel(ops.KEYS).dropna(axis=1, how="all"),
             ops.unfused(of[key[0]]))
            for key, group in weights
        ]
    )  # fmt: skip


def latency_over_rate() -> Figure:
    """Requests that arrive over time."""
    data = Data.read(*arrivals())
    [setting] = data.settings
    return serving.curves([(entry, entry.run["serving"]) for entry in setting.entries])


def studied() -> list[Path]:
    """Folders of the committed op studies of one model's shapes."""
    return [Path(run["run_dir"]) for run in op_tables.committed(REFERENCE) if not op_tables.several_models(run)]


def arrivals() -> list[Path]:
    """Folders of the committed runs in which requests arrive over time."""
    return [Path(run["run_dir"]) for run in runs(REFERENCE).runs if run.get("serving")]


PLOTS: dict[str, Callable[[], Figure]] = {"time-per-token": time_per_token, "time-per-layer": time_per_layer}
# Those of runs that may not be there yet; tables of the same runs name them.
if studies.comparisons(ROOT / REFERENCE, studies.WITHOUT):
    PLOTS["ablation"] = feature_costs
if studied():
    PLOTS["op-study"] = op_study
if arrivals():
    PLOTS["serving"] = latency_over_rate


@cache
def made(name: str) -> str:
    """The SVG of a plot, the same each time."""
    style.use()
    figure = PLOTS[name]()
    try:
        return by_itself(inline(figure, name))
    finally:
        plt.close(figure)


def stale() -> list[str]:
    """Names of plots whose file is missing or differs from what is made anew."""
    return [name for name in PLOTS if not (file := path(name)).is_file() or file.read_text() != made(name)]


def path(name: str) -> Path:
    """Where a plot lies."""
    return IMAGES / f"{name}.svg"


def main() -> int:
    """Exit code 0; 1 where --check finds a plot out of date; 2 with one sentence where one cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the plots into docs/images")
    action.add_argument("--check", action="store_true", help="name the plots that are out of date")
    asked = parser.parse_args()
    if not (asked.write or asked.check):
        parser.print_help()
        return 0
    try:
        outdated = stale()
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for name in outdated:
        if asked.write:
            IMAGES.mkdir(parents=True, exist_ok=True)
            path(name).write_text(made(name))
            print(f"written: {path(name).relative_to(ROOT)}")
        else:
            print(f"{path(name).relative_to(ROOT)} is out of date; --write makes it anew")
    return 1 if outdated and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
