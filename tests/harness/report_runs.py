"""Runs with chosen numbers for the tests of the report, of traces and of imports, and a reader of the page's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from harness.results import RunWriter

H200 = {"name": "NVIDIA H200", "driver": "580", "cuda": "13.0", "memory_mib": 143771}
DECODE = {"phase": "decode", "batch_size": 1, "new_tokens": 1, "context_len": 128}
SHAPE = {"phase": "decode", "batch_size": 1, "tokens": 128}


def timed(median_us: float, **changed: Any) -> dict[str, Any]:
    """What `run.json` says of a timed pass, with an interval of 2 % around the median."""
    ends = {"wall_us": median_us, "wall_us_low": 0.99 * median_us, "wall_us_high": 1.01 * median_us}
    return {"status": "ok", "arm": "default", "mode": "graph", "samples": 20, "stop": "precision", **ends, **changed}


def record(engine: str = "nano", **changed: Any) -> dict[str, Any]:
    return {
        "status": "ok", "started": "2026-01-02T03:04:05+00:00", "engine": engine, "contestant": True, "model": "toy",
        "workload": "latency", "device": "cuda", "dtype": "bfloat16", "arm": "default", "warnings": [], "failures": [],
        "config": {"engine": {"name": engine, "options": {}}, "instrument": {"precision": 0.05}},
        "verification": {"status": "passed", "positions": 256, "engine": {"kl": 1e-5, "nll_delta": 1e-3,
                         "greedy_agreement": 0.99}, "bound_kl": 1e-4, "bound_nll_delta": 1e-2},
        "provenance": {"versions": {"torch": "2"}, "gpu": H200, "cpu": {"model": "Chip", "usable_cores": 4}},
        "shapes": [], **changed,
    }  # fmt: skip


def write(
    folder: Path, run: Mapping[str, Any], layers: Sequence[Mapping] = (), steps: Sequence[Mapping] = (),
    host: Sequence[Mapping] = (), rounds: Sequence[Mapping] = (),
) -> Path:  # fmt: skip
    """A run in `folder`, whose id is the folder's last three names."""
    writer = RunWriter(folder, "-".join(folder.parts[-3:]))
    writer.add_layers(layers)
    writer.add_steps(steps)
    writer.add_host(host)
    writer.add_rounds(rounds)
    writer.flush()
    writer.write_run(run)
    return folder


def key(source: str, mode: str, iteration: int, engine: str = "nano") -> dict[str, Any]:
    return {"engine": engine, "arm": "default", **DECODE, "mode": mode, "source": source, "iteration": iteration}


def layer_row(
    who: Mapping, layer: int, block: str, op: str, start: float, us: float, kernels: str = ""
) -> dict[str, Any]:
    place = {"layer_index": layer, "block": block, "op": op, "kernels": kernels}
    return {**who, **place, "start_us": start, "latency_us": us}


def step_row(who: Mapping, wall_us: float | None, gpu_us: float | None = None, **changed: Any) -> dict[str, Any]:
    row = {**who, "wall_us": wall_us, "gpu_us": gpu_us, "host_us": None, "instrumented": True, "status": "ok"}
    return {**row, **changed}


def kernel_trace(slower: Sequence[float] = (0.0, 1.0, 2.0), engine: str = "nano") -> tuple[list[dict], list[dict]]:
    """`layers` and `steps` of a cupti trace of a model of two layers, an iteration for each of `slower` (us per op).

    Per iteration with s: embed 5; each layer input_norm 2, qkv_proj 10 + s, attention in two pieces 3 and 4,
    down_proj 20, with a gap of 1 before down_proj; lm_head 30, sample 6; a gap of 2 before the head. GPU first to last
    126 + 2 s, wall 150 + 2 s.
    """
    layers, steps = [], []
    for iteration, s in enumerate(slower):
        who, at = key("cupti", "graph", iteration, engine), 0.0

        def add(
            layer: int, block: str, op: str, us: float, gap: float = 0.0, kernel: str = "k", who: dict = who
        ) -> None:
            nonlocal at
            at += gap
            layers.append(layer_row(who, layer, block, op, at, us, kernel))
            at += us

        add(-1, "embed", "embed", 5.0)
        for layer in range(2):
            layers.append(layer_row(who, layer, "layer", "layer", at, 40.0 + s))
            add(layer, "attention", "input_norm", 2.0)
            add(layer, "attention", "qkv_proj", 10.0 + s, kernel="gemm; reduce")
            add(layer, "attention", "attention", 3.0)
            add(layer, "attention", "attention", 4.0)
            add(layer, "mlp", "down_proj", 20.0, gap=1.0)
        add(-1, "head", "lm_head", 30.0, gap=2.0)
        add(-1, "sample", "sample", 6.0)
        steps.append(step_row(who, 147.0 + 2 * s, 123.0 + 2 * s))
    return layers, steps


def in_graphs_and_eager() -> tuple[list[dict], list[dict]]:
    """`kernel_trace` as events see it: whole layers in graphs, and ops in an eager pass that takes twice as long."""
    layers, steps = kernel_trace()
    graph = [{**row, "source": "cuda_event"} for row in layers if row["op"] == "layer" or row["layer_index"] < 0]
    eager = [{**row, "source": "cuda_event", "mode": "eager", "start_us": 2 * row["start_us"],
              "latency_us": 2 * row["latency_us"]} for row in layers]  # fmt: skip
    both = [{**row, "source": "cuda_event", "mode": mode} for mode in ("graph", "eager") for row in steps]
    return graph + eager, both


@dataclass
class Table:
    """A table of the page: the headings that it stands under, and its cells' text, lines joined with " | "."""

    section: str
    heading: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def cell(self, row: str, column: str, key_column: int = 0) -> str:
        found = [cells for cells in self.rows if cells[key_column] == row]
        assert len(found) == 1, f"{len(found)} rows {row!r} in {[r[key_column] for r in self.rows]}"
        return found[0][self.header.index(column)]


class Page(HTMLParser):
    """The tables, headings and drawings of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.headings: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self._text: list[str] = []
        self._section = self._heading = ""
        self.feed(html)

    def table(self, section: str, heading: str = "") -> Table:
        found = [t for t in self.tables if t.section == section and heading in t.heading]
        assert len(found) == 1, [(t.section, t.heading) for t in self.tables]
        return found[0]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        if tag == "table":
            self.tables.append(Table(self._section, self._heading))
        elif tag == "tr" and self.tables[-1].header:
            self.tables[-1].rows.append([])
        elif tag == "br":
            self._text.append(" | ")
        if tag in ("th", "td", "h1", "h2", "h3"):
            self._text = []

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        text = "".join(self._text).strip()
        if tag == "th":
            self.tables[-1].header.append(text)
        elif tag == "td":
            self.tables[-1].rows[-1].append(text)
        elif tag in ("h2", "h3"):
            self.headings.append(text)
            self._section, self._heading = (text, "") if tag == "h2" else (self._section, text)
