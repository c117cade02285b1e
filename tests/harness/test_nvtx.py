"""NVTX ranges as a tool sees them: a small C tool (nvtx_log.c) is loaded into a real process and logs every call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

from engines.base import NO_LAYER, WHOLE_LAYER, Site, hook
from harness.instruments.nvtx import NvtxProbe, Ranges, step_label

HERE = Path(__file__).parent
NO_TOOL_LIMIT_US = 5.0
"""Push and pop together without a tool, as an upper bound for a busy machine; about 0.3 us when it is idle."""

PROGRAM = """
import torch
from torch import nn
from engines.base import NO_LAYER, WHOLE_LAYER, Site, hook
from harness.instruments.nvtx import NvtxProbe, Ranges, step_label


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4)

    def forward(self, x):
        if x.shape[0] == 3:
            raise MemoryError
        return self.qkv(x)


layers, norm = nn.ModuleList([Layer(), Layer()]), nn.LayerNorm(4)
sites = [(Site(i, WHOLE_LAYER, WHOLE_LAYER), layer) for i, layer in enumerate(layers)]
sites += [(Site(i, "attention", "input_norm+qkv_proj"), layer.qkv) for i, layer in enumerate(layers)]
sites += [(Site(NO_LAYER, "head", "final_norm"), norm)]
ranges = Ranges(enabled=True)
remove = hook(sites, NvtxProbe())


def step(kind, rows):
    with ranges.step(step_label(kind, rows, rows, 7), tokens=rows):
        x = torch.ones(rows, 4)
        for layer in layers:
            x = layer(x)
        norm(x)


with ranges.run("tiny fused smoke"):
    step("prefill", 2)
    try:
        step("decode", 3)
    except MemoryError:
        pass
    remove()
    step("decode", 1)
Ranges(enabled=False).run("unseen").__enter__()
"""


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What PROGRAM emitted, one list of fields per call."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvtx")
    tool, log = folder / "nvtx_log.so", folder / "log.tsv"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", tool, HERE / "nvtx_log.c"], check=True)
    environment = {
        **os.environ,
        "NVTX_INJECTION64_PATH": str(tool),
        "NVTX_LOG": str(log),
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment, timeout=120)
    return [line.split("\t") for line in log.read_text().splitlines()]


def _ours(events: list[list[str]]) -> list[list[str]]:
    """Pushes as [category, message, payload] and pops as ["pop"], of our domain, with categories by name."""
    names = {number: name for kind, domain, *rest in events if (kind, domain) == ("category", "harness")
             for number, name in [rest]}  # fmt: skip
    found = []
    for kind, domain, *rest in events:
        if domain == "harness" and kind in ("push", "pop"):
            found.append([names[rest[0]], *rest[1:]] if kind == "push" else ["pop"])
    return found


def test_domain_and_categories_have_names(events: list[list[str]]) -> None:
    assert events.count(["domain", "harness"]) == 1
    categories = [event[3] for event in events if event[:2] == ["category", "harness"]]
    assert sorted(categories) == ["layer", "op", "run", "step"]


def test_ranges_nest_run_step_layer_op(events: list[list[str]]) -> None:
    """The exact sequence: a prefill, a decode that dies inside layer 0, and a decode after the hooks came off."""
    op = [["op", "input_norm+qkv_proj", ""], ["pop"]]
    assert _ours(events) == [
        ["run", "tiny fused smoke", ""],
        ["step", "prefill b=2 t=2 c=7", "2"],
        *(["layer", "layer 0", "0"], *op, ["pop"]),
        *(["layer", "layer 1", "1"], *op, ["pop"]),
        *(["op", "final_norm", ""], ["pop"]),
        ["pop"],
        ["step", "decode b=3 t=3 c=7", "3"],
        *(["layer", "layer 0", "0"], ["pop"]),  # closed with its step
        ["pop"],
        ["step", "decode b=1 t=1 c=7", "1"],
        ["pop"],
        ["pop"],
    ]


def test_switched_off_leaves_no_hooks_and_shares_one_empty_context() -> None:
    ranges = Ranges(enabled=False)
    with ranges.run("run"), ranges.step(step_label("decode", 1, 1, 128), tokens=1):
        pass
    module = nn.Linear(2, 2)
    hook([(Site(0, "mlp", "down_proj"), module)], NvtxProbe())()
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_range_without_a_tool_costs_little() -> None:
    probe, site = NvtxProbe(), Site(NO_LAYER, "head", "lm_head")
    assert probe.wants(site) and probe.wants(Site(0, WHOLE_LAYER, WHOLE_LAYER))
    best_us, pairs = float("inf"), 2000
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(pairs):
            probe.begin(site, 1)
            probe.end(site)
        best_us = min(best_us, (time.perf_counter() - start) / pairs * 1e6)
    print(f"NVTX push and pop without a tool: {best_us:.3f} us")
    assert best_us < NO_TOOL_LIMIT_US
