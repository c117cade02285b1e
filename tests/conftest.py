"""Choices for the whole test process: how Triton's kernels run where there is no GPU, and which examples are tried.

Without CUDA they are made for Triton's interpreter, which must be decided before `kernels` is first imported. The
variable is taken away again at once, so that processes which tests start are not slowed by it. The interpreter is slow,
so tests run the references unless they ask otherwise: `with kernels.use("triton")` (tests/kernels does it for all of
its tests). On a GPU nothing is forced.

With pytest-xdist (`-n auto`) each worker takes its share of the cores, and so do the processes that its tests start. On
a GPU there is one worker, because tests there take memory and time as if they were alone.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import interpreter

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    import kernels
else:
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels

    del os.environ["TRITON_INTERPRET"]

if kernels.INTERPRETED:
    interpreter.round_bfloat16()

# The same examples in each run. Others: --hypothesis-profile=random, with --hypothesis-seed=N to have them again.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def references_without_gpu() -> Iterator[None]:
    """Session-wide, so that engines in fixtures of any scope get it too."""
    with kernels.use("auto" if torch.cuda.is_available() else "reference"):
        yield


def pytest_xdist_auto_num_workers() -> int | None:
    """How many `-n auto` starts; None leaves it to xdist: one for each core."""
    return 1 if torch.cuda.is_available() else None


@pytest.fixture(scope="module", autouse=True)
def garbage_of_this_module_only() -> None:
    """Engines collect garbage when they close, in 0.3 s if what torch and transformers hold is not set aside."""
    gc.collect()
    gc.freeze()
