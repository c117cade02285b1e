"""Kernels compiled by threads: in a process of its own without the interpreter, for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

pytest.importorskip("triton")

CHILD = """
import json, sys, threading
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget

target = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda _: 0
)
triton.runtime.driver.set_active(target)
import kernels, kernels.compile_ahead
kernel = sys.modules["kernels.silu_mul"].silu_mul_kernel
threads = []
triton.knobs.runtime.jit_post_compile_hook = lambda **_: threads.append(threading.current_thread().name)
x, y = torch.ones(1, 32), torch.full((1, 16), 7.0)
known = lambda: len(kernel.device_caches[0][0])
told = {"progress": []}
with kernels.compiled_ahead(lambda *of: told["progress"].append(of)):
    for block in (16, 32, 16):
        kernel[(1,)](x, y, 16, BLOCK=block, DEPENDENT=False, num_warps=1)
    kernel[(1,)](x, y, 16, BLOCK=16, DEPENDENT="nothing that it can be compiled for", num_warps=1)
    told["inside"] = known()
told["after"] = known()
told["apart"] = all(name != "MainThread" for name in threads) and len(threads)
for block in (16, 32):
    kernel.warmup(x, y, 16, BLOCK=block, DEPENDENT=False, num_warps=1, grid=(1,))
told["again"] = len(threads)
told["written"] = (y != 7).any().item()
kernel.warmup(x, y, 16, BLOCK=64, DEPENDENT=False, num_warps=1, grid=(1,))
told["as before"] = threads[-1]
# The first to be compiled is the last to be done: the others are counted meanwhile.
ahead, counted, others_are_done = sys.modules["kernels.compile_ahead"], [], threading.Event()
first = []
def compile(function, kind):
    first.append(kind)
    assert kind != first[0] or others_are_done.wait(10)
def progress(done, total):
    counted.append(done)
    if done == total - 1:
        others_are_done.set()
ahead._compile, ahead.MOST_THREADS = compile, 2
with kernels.compiled_ahead(progress):
    for block in (128, 256, 512):
        kernel[(1,)](x, y, 16, BLOCK=block, DEPENDENT=False, num_warps=1)
told["counted"] = counted
print(json.dumps(told))
"""


def test_compiled_by_threads(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=300, cwd=Path(kernels.__file__).parents[1],
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == {
        "progress": [[1, 3], [2, 3], [3, 3]], "counted": [1, 2, 3],
        "inside": 0, "after": 2, "apart": 2, "again": 2, "written": False, "as before": "MainThread",
    }  # fmt: skip


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
def test_interpreted_kernels_run() -> None:
    gate_up = torch.tensor([[1.0, 2.0]])
    with kernels.use("triton"), kernels.compiled_ahead():
        product = kernels.silu_mul(gate_up)
    assert product.item() == pytest.approx(1 / (1 + 2.718281828**-1) * 2, rel=1e-5)
