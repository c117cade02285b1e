"""Choices for the whole test process: how Triton's kernels run where there is no GPU, and which examples are tried.

Without CUDA they are made for Triton's interpreter, which must be decided before `kernels` is first imported. The
variable is taken away again at once, so that processes which tests start are not slowed by it. The interpreter is slow,
so tests run the references unless they ask otherwise: `with kernels.use("triton")` (tests/kernels does it for all of
its tests). On a GPU nothing is forced.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    import kernels
else:
    os.environ["TRITON_INTERPRET"] = "1"
    import kernels

    del os.environ["TRITON_INTERPRET"]

# The same examples in each run. Others: --hypothesis-profile=random, with --hypothesis-seed=N to have them again.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def references_without_gpu() -> Iterator[None]:
    """Session-wide, so that engines in fixtures of any scope get it too."""
    with kernels.use("auto" if torch.cuda.is_available() else "reference"):
        yield
