"""The short table at the end of a run; `python -m harness.summary RUN` prints it again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engines.base import NO_LAYER, WHOLE_LAYER, InputError
from harness.ops.table import print_study
from harness.results import load
from harness.serving import PERCENTILES

SLOWEST_OPS = 3
_PLAIN_WIDTH = 160
"""Columns of the table where there is no terminal to ask."""


def print_summary(run_dir: Path | str, console: Console | None = None) -> None:
    """Print the run's steps, throughput, verification and warnings. InputError: it is no readable run."""
    runs = load(run_dir)
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_PLAIN_WIDTH)
    for run in runs.runs:
        layers = runs.layers[runs.layers["run_id"] == run["run_id"]]
        _print_run(run, layers, console)


def _print_run(run: dict[str, Any], layers: pd.DataFrame, console: Console) -> None:
    engine = f"{run.get('engine')} ({run.get('arm')})"
    title = f"{engine}, {run.get('model')}, {run.get('workload')}, {run.get('dtype')} on {run.get('device')}"
    if run.get("shapes"):
        console.print(steps_table(run, layers, title))
    if run.get("rounds"):
        console.print(rounds_table(run["rounds"], title))
    if run.get("serving"):
        console.print(serving_table(run["serving"], title))
    if run.get("study"):
        print_study(run, console)
    if run.get("status") != "ok":
        console.print(f"This run is {run.get('status')}. {run.get('error', '')}", markup=False, soft_wrap=True)
    if served := run.get("throughput"):
        console.print(throughput_line(served), markup=False, soft_wrap=True)
    for failure in run.get("failures", []):
        console.print(f"Failed: {failure}", markup=False, soft_wrap=True)
    for warning in run.get("warnings", []):
        console.print(f"Note: {warning}", markup=False, soft_wrap=True)


def steps_table(run: dict[str, Any], layers: pd.DataFrame, title: str) -> Table:
    """One row per shape: its untraced step time, and where the time goes in its kernel trace, else its eager one."""
    table = Table(title=title, title_justify="left")
    for name in ("phase", "batch", "tokens", "step ms", "95 % interval", "mode"):
        table.add_column(name, justify="left" if name in ("phase", "mode") else "right")
    table.add_column("slowest ops (share of the traced step)")
    for shape in run["shapes"]:
        timed = shape.get("timed", {"status": "not reached"})
        who = (shape["phase"], str(shape["batch_size"]), str(shape["tokens"]))
        if timed["status"] != "ok":
            table.add_row(*who, "-", "-", "-", timed["status"])
            continue
        interval = _interval(timed["wall_us_low"] / 1e3, timed["wall_us_high"] / 1e3, timed["samples"])
        ops = ", ".join(f"{op} {share:.0%}" for op, share in slowest_ops(layers, shape))
        table.add_row(*who, f"{timed['wall_us'] / 1e3:.3f}", interval, timed["mode"], ops)
    return table


def _interval(low: float, high: float, samples: int) -> str:
    """One sample has no interval; its ends would both be the sample."""
    return f"{low:.3f} - {high:.3f}" if samples > 1 else "(once)"


def _reason(status: str) -> str:
    """The first line of what went wrong; rich would take brackets for markup."""
    return escape(status.partition("\n")[0])


def rounds_table(records: list[dict[str, Any]], title: str) -> Table:
    """One row per item of a `generate` workload."""
    table = Table(title=title, title_justify="left")
    for name in ("phase", "batch", "prompt", "new tokens", "metric", "median", "95 % interval", "calls"):
        table.add_column(name, justify="left" if name in ("phase", "metric") else "right")
    for r in records:
        size = (str(r["batch_size"]), str(r["tokens"]), str(r["output_len"]))
        if "median" not in r:
            table.add_row(r["phase"], *size, r["metric"], "-", _reason(r["status"]), "0")
            continue
        interval = _interval(r["low"], r["high"], r["samples"])
        if r["status"] != "ok":
            interval += f", then: {_reason(r['status'])}"
        table.add_row(r["phase"], *size, r["metric"], f"{r['median']:.3f}", interval, str(r["samples"]))
    return table


def serving_table(records: list[dict[str, Any]], title: str) -> Table:
    """A `serving` workload: of each rate what came of it, and a line for each latency, in ms."""
    table = Table(title=title, title_justify="left")
    for name in ("rate /s", "offered", "achieved", "tok/s", "goodput", "queue", "latency, ms"):
        table.add_column(name, justify="left" if name == "latency, ms" else "right")
    for p in PERCENTILES:
        table.add_column(f"p{p}", justify="right")
    for r in records:
        rates = ["at once" if r[name] is None else f"{r[name]:.3g}" for name in ("rate", "offered_rate")]
        good = f"{r['goodput_share']:.0%}, {r['goodput_rate']:.3g} /s"
        queue = "grows" if r["still_growing"] else "-" if r["still_growing"] is None else "steady"
        first = [*rates, f"{r['achieved_rate']:.3g}", f"{r['output_tok_s']:.0f}", good, queue]
        for metric, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2el_ms", "end to end")):
            found = [r.get(f"{metric}_p{p}") for p in PERCENTILES]
            table.add_row(*first, label, *("-" if value is None else f"{value:.2f}" for value in found))
            first = [""] * len(first)
        table.add_section()
    return table


def slowest_ops(layers: pd.DataFrame, shape: dict[str, Any]) -> list[tuple[str, float]]:
    """Ops of a shape of `run.json` that take most of its traced steps, over all layers, with their shares.

    Kernels say it of the step as it is timed; without them the eager trace stands in.
    """
    context = 0 if shape["phase"] == "prefill" else shape["tokens"]
    new_tokens = shape["batch_size"] * (shape["tokens"] if shape["phase"] == "prefill" else 1)
    rows = layers[
        (layers["phase"] == shape["phase"])
        & (layers["batch_size"] == shape["batch_size"])
        & (layers["new_tokens"] == new_tokens)
        & (layers["context_len"] == context)
    ]
    from_kernels = rows["source"] == "cupti"
    rows = rows[from_kernels if from_kernels.any() else rows["mode"] == "eager"]
    is_layer = rows["op"] == WHOLE_LAYER
    whole = rows.loc[is_layer | (rows["layer_index"] == NO_LAYER), "latency_us"].sum()
    ops = rows[~is_layer].groupby("op")["latency_us"].sum().nlargest(SLOWEST_OPS)
    return [(str(op), float(time / whole)) for op, time in ops.items()] if whole else []


def throughput_line(served: dict[str, Any]) -> str:
    """One line on a served workload."""
    return (
        f"{served['requests']} requests, {served['output_tokens']} output tokens in {served['wall_s']:.2f} s: "
        f"{served['output_tok_s']:.0f} output tok/s ({served['total_tok_s']:.0f} with prompts), "
        f"TTFT p50 {served.get('ttft_ms_p50', 0):.1f} ms, p99 {served.get('ttft_ms_p99', 0):.1f} ms, "
        f"TPOT p50 {served.get('tpot_ms_p50', 0):.2f} ms, p99 {served.get('tpot_ms_p99', 0):.2f} ms"
    )


def main(arguments: list[str]) -> int:
    """Print the summaries of the folders in `arguments`; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m harness.summary RUN_FOLDER...", file=sys.stderr)
        return 2
    try:
        for folder in arguments:
            print_summary(folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
