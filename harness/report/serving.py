"""Whole requests: output tokens per second where all arrive at once, latency over rate where they arrive over time."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report import html, style
from harness.report.data import Data, Entry
from harness.report.html import Section
from harness.report.plots import Plots
from harness.serving import PERCENTILES

LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "end to end"}
_DRAWN = ("p50", "p99")


def throughput_section(data: Data, plots: Plots) -> Section | None:
    """Bars of output tokens per second, with the latencies of the same requests in a table."""
    parts = []
    for setting in data.settings:
        served = [(entry, entry.run["throughput"]) for entry in setting.entries if entry.run.get("throughput")]
        if not served:
            continue
        title = f"Throughput: {setting}"
        caption = "Output tokens per second of all requests together, served once: there is no interval."
        header = ["", "arm", "requests", "output tokens", "s", "output tok/s", "with prompts"]
        names = [f"{LATENCIES[m]} {p}, ms" for m in ("ttft_ms", "tpot_ms", "e2el_ms") for p in _DRAWN]
        rows: list[list[html.Cell]] = []
        for entry, record in served:
            rates = (record["wall_s"], record["output_tok_s"], record["total_tok_s"])
            latencies = [record.get(f"{m}_{p}") for m in ("ttft_ms", "tpot_ms", "e2el_ms") for p in _DRAWN]
            counts = (f"{record[name]:,}" for name in ("requests", "output_tokens"))
            times = ("–" if value is None else html.number(value) for value in latencies)
            rows.append([entry.label, str(record.get("arm", "")), *counts, *map(html.number, rates), *times])
        parts += [html.heading(str(setting)),
                  plots.add(_bars(served), f"throughput-{setting.slug}", title, caption),
                  html.table([*header, *names], rows, numbers=2)]  # fmt: skip
    return Section("Throughput", parts) if parts else None


def _bars(served: list[tuple[Entry, dict]]) -> Figure:
    figure, axes = plt.subplots(figsize=(7.4, 0.8 + 0.42 * len(served)))
    for place, (entry, record) in enumerate(served):
        axes.barh(place, record["output_tok_s"], 0.65, **style.part("layers", entry.engine))
        axes.annotate(
            html.number(record["output_tok_s"]), (record["output_tok_s"], place), (5, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(served)), [entry.label for entry, _ in served])
    axes.set_ylim(len(served) - 0.45, -0.55)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("output tokens per second")
    style.thousands(axes.xaxis)
    return figure


def section(data: Data, plots: Plots) -> Section | None:
    """Latency over the rate of arrivals, and how much of it kept the objectives."""
    parts = []
    for setting in data.settings:
        served = [(entry, entry.run["serving"]) for entry in setting.entries if entry.run.get("serving")]
        if not served:
            continue
        title = f"Latency over rate: {setting}"
        caption = (
            "Solid: median, dashed: 99th percentile, from the moment a request was due. A hollow marker: the queue "
            "still grew, and the latency says how long the pass went on. Goodput: requests per second that kept the "
            f"objectives{objectives(served)}, until the last one was done; so it is below what was offered also where "
            "all of them did (the table has their share)."
        )
        parts.append(html.heading(str(setting)))
        if any(record["rate"] for _, records in served for record in records):
            parts.append(plots.add(curves(served), f"serving-{setting.slug}", title, caption))
        parts.append(_table(served))
    return Section("Serving", parts) if parts else None


def objectives(served: list[tuple[Entry, list[dict]]]) -> str:
    """In brackets what goodput asks of a request, by each of the workloads; "" where no run tells."""
    told = []
    for entry, _ in served:
        slo = ((entry.run.get("config") or {}).get("workload") or {}).get("slo") or {}
        told.append(", ".join(f"{LATENCIES[name]} ≤ {most:g} ms" for name, most in slo.items() if most is not None))
    found = "; or ".join(dict.fromkeys(filter(None, told)))
    return f" ({found})" if found else ""


def curves(served: list[tuple[Entry, list[dict]]]) -> Figure:
    """Latencies over the rate of arrivals, and goodput."""
    figure, grid = plt.subplots(2, 2, figsize=(9.2, 6.0))
    for axes, name in zip(grid.flat, ("ttft_ms", "tpot_ms", "e2el_ms"), strict=False):
        _latency(axes, served, name)
    axes, ends = grid[1][1], []
    for entry, records in served:
        at = sorted((r["rate"], r["goodput_rate"], bool(r["still_growing"])) for r in records if r["rate"])
        if not at:
            continue
        _marked(axes, at, style.line(entry.engine, entry.variant))
        ends.append((*at[-1][:2], entry.label, style.color(entry.engine)))
    rates = sorted({r["rate"] for _, records in served for r in records if r["rate"]})
    axes.plot(rates, rates, color=style.INK, linewidth=0.8, linestyle=":")
    axes.set_title("goodput, requests/s (dotted: offered)")
    axes.set_ylim(bottom=0)
    for each in grid.flat:
        each.set_xlabel("requests/s offered")
        each.grid(axis="y")
    style.end_labels(axes, ends)
    return figure


def _latency(axes: Axes, served: list[tuple[Entry, list[dict]]], name: str) -> None:
    ends, values = [], []
    for entry, records in served:
        look = style.line(entry.engine, entry.variant)
        for percentile, stroke in zip(_DRAWN, ("-", "--"), strict=True):
            at = sorted(
                (r["rate"], r[f"{name}_{percentile}"], bool(r["still_growing"]))
                for r in records
                if r["rate"] and f"{name}_{percentile}" in r
            )
            if not at:
                continue
            _marked(axes, at, look | {"linestyle": stroke})
            values += [a[1] for a in at]
            ends.append((at[-1][0], at[-1][1], f"{entry.label} {percentile}", style.color(entry.engine)))
    axes.set_title(f"{LATENCIES[name]}, ms")
    if values:
        style.plain_log(axes, "y", values)
        style.end_labels(axes, ends)


def _marked(axes: Axes, at: list[tuple[float, float, bool]], look: dict[str, Any]) -> None:
    """A line through (rate, value, whether the queue grew), hollow where it did."""
    axes.plot([a[0] for a in at], [a[1] for a in at], **(look | {"marker": ""}))
    for rate, value, growing in at:
        filling = style.PAGE if growing else look["color"]
        axes.plot(rate, value, **(look | {"linestyle": "", "markerfacecolor": filling}))


def _table(served: list[tuple[Entry, list[dict]]]) -> str:
    header = ["", "latency", "rate /s", "achieved /s", "output tok/s", "goodput /s", "kept objectives", "queue"]
    rows: list[list[html.Cell]] = []
    for entry, records in served:
        for r in records:
            queue = {True: "grows", False: "steady", None: "–"}[r["still_growing"]]
            rates = (html.number(r[name]) for name in ("achieved_rate", "output_tok_s", "goodput_rate"))
            rate = "at once" if r["rate"] is None else f"{r['rate']:g}"
            of_rate = [rate, *rates, f"{r['goodput_share']:.1%}", queue]
            for name, label in LATENCIES.items():
                found = [r.get(f"{name}_p{p}") for p in PERCENTILES]
                cells = ("–" if value is None else html.number(value) for value in found)
                rows.append([entry.label, label, *of_rate, *cells])
                of_rate = [""] * len(of_rate)
    return html.table([*header, *(f"p{p}, ms" for p in PERCENTILES)], rows, numbers=2)
