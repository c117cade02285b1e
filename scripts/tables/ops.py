"""The study of one op by itself, `python -m harness.ops`: over rows, and over the shapes of all models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.ops.table import WORDS, crossovers
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, runs_of_all_models
from scripts.tables.studies import machine, picture


@table("op-study")
def op_study(folder: str = REFERENCE) -> str:
    """Medians of each variant over the number of rows, the best fused over the best unfused one, and in a sentence
    where fusing wins and where it loses; for each product of one model."""
    found = [run for run in committed(folder) if not several_models(run)]
    if not found:
        return "Not measured yet (`scripts/reference_checks.sh ops`)."
    parts = [picture("op-study", "Time of one call over its rows, each variant against the unfused one")]
    for run in found:
        here = [name for name, variant in run["variants"].items() if variant["status"] == "ok"]
        for product in run["study"]:
            head = [f"`{product['op']}`, W {product['weight_rows']} × {product['k']}: rows", *here]
            rows = [
                [f"{shape['rows']:,}", *(_time(shape["variants"].get(name)) for name in here), _best(shape)]
                for shape in product["rows"]
            ]
            parts += [markdown([*head, "best fused / best unfused"], rows), *crossovers(product["rows"])]
        what = f"{run['model']}, {run['dtype']}: median µs of one call, ratios with their 95 % interval"
        parts.append(_source(run, folder, what))
    return "\n\n".join(parts)


@table("op-shapes")
def op_shapes(folder: str = REFERENCE) -> str:
    """The best fused over the best unfused variant at each number of rows; products of several models."""
    found = [run for run in committed(folder) if several_models(run)]
    if not found:
        return "Not measured yet (`scripts/reference_checks.sh shapes`)."
    parts = []
    for run in found:
        counts = sorted({shape["rows"] for product in run["study"] for shape in product["rows"]})
        head = ["product", "W", "models", *(f"{count:,} {'row' if count == 1 else 'rows'}" for count in counts)]
        what = f"{run['dtype']}: best fused over best unfused variant with its 95 % interval, and their medians in µs"
        parts += [markdown(head, [_line(p, counts) for p in run["study"]], left=3), _source(run, folder, what)]
    return "\n\n".join(parts)


def committed(folder: str) -> list[dict[str, Any]]:
    """`run.json` of each study below `folder`."""
    return [run for run in runs_of_all_models(folder).runs if run.get("study")]


def several_models(study: Mapping[str, Any]) -> bool:
    """Whether a study is of the shapes of several models."""
    return len({model for product in study["study"] for model in product["models"]}) > 1


def _line(product: Mapping[str, Any], counts: list[int]) -> list[str]:
    op = f"`{product['op']}`" + " with bias" * product["bias"]
    of = {shape["rows"]: _ratio(shape) for shape in product["rows"]}
    shape, models = f"{product['weight_rows']} × {product['k']}", ", ".join(product["models"])
    return [op, shape, models, *(of.get(count, "–") for count in counts)]


def _source(run: Mapping[str, Any], folder: str, what: str) -> str:
    told = run["variants"].items()
    versions = [f"{name} {variant['version']}" for name, variant in told if variant.get("version")]
    absent = [f"{name} ({variant['status'].rstrip('.')})" for name, variant in told if variant["status"] != "ok"]
    parts = [
        f"{machine(run)}, {what}. Each call finds inputs and weights gone from the L2; ratios are of turns next to "
        "each other.",
        f"Packages: {', '.join(versions)}." * bool(versions),
        f"Left out: {', '.join(absent)}." * bool(absent),
        f"Failed: {len(run['failures'])}. Run: `{folder}/{Path(run['run_dir']).name}`.",
    ]
    return " ".join(filter(None, parts))


def _time(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return f"{cell['median_us']:,.2f}" if "median_us" in cell else str(cell["status"])[:40]


def _best(shape: Mapping[str, Any]) -> str:
    both = shape.get("fused_over_unfused")
    if not both:
        return "–"
    text = f"{both['fused']} / {both['unfused']} {both['ratio']:.2f}×"
    if "verdict" not in both:
        return text
    return f"{text} ({both['low']:.2f} to {both['high']:.2f}), {WORDS[both['verdict']]}"


def _ratio(shape: Mapping[str, Any]) -> str:
    both = shape.get("fused_over_unfused")
    if not both:
        return "–"
    fused, unfused = (shape["variants"][both[side]]["median_us"] for side in ("fused", "unfused"))
    interval = f" ({both['low']:.2f} to {both['high']:.2f})" if "low" in both else ""
    return f"{both['ratio']:.2f}×{interval}: {fused:,.1f} / {unfused:,.1f}"
