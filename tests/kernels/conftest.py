"""Kernels run for real here: on the GPU if there is one, else in Triton's interpreter."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import _rows, choices
from kernels._rows import empty_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)


@pytest.fixture(autouse=True)
def triton_path() -> Iterator[None]:
    if not kernels.HAVE_TRITON:
        pytest.skip("triton is not installed")
    with kernels.use("triton"):
        yield


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a kernel forgets to write stays NaN, and writes past the end of its outputs are found."""
    allocate = torch.empty
    guards: list[Tensor] = []

    def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        elements = torch.Size(size).numel()
        memory = allocate(elements + 64, dtype=dtype, device=device).fill_(float("nan"))
        guards.append(memory[elements:])
        return memory[:elements].view(size)

    def rows(*shape: Any) -> Tensor:
        found = empty_rows(*shape)
        base = found._base
        assert base is not None
        guards.append(base.flatten()[found.numel() :])  # the room behind is for reading
        return found

    monkeypatch.setattr(torch, "empty", empty)
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and hasattr(module, "empty_rows") and module is not _rows:
            monkeypatch.setattr(module, "empty_rows", rows)
    monkeypatch.setattr(torch, "empty_like", lambda like: empty(like.shape, like.dtype, like.device))
    yield
    assert all(guard.isnan().all() for guard in guards), "a kernel wrote past the end of its output"


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> torch.device:
    """A device that counts as a GPU of its own kind, with an empty folder of choices."""
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    monkeypatch.setattr(choices, "gpu_slug", lambda device: "some-gpu")
    choices._table.cache_clear()
    yield torch.device("cuda", 0)
    choices._table.cache_clear()


@pytest.fixture
def randn(device: torch.device) -> Callable[..., Tensor]:
    """Fresh random numbers in each run; the seed is printed where a test fails."""
    seed = int(torch.seed()) & 0xFFFFFFFF
    print(f"torch.manual_seed({seed})")
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

    return make


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Norm of the error over norm of the reference, under the dtype's tolerance; NaN and infinity never pass."""

    def check(out: Tensor, expected: Tensor) -> None:
        assert out.shape == expected.shape
        assert torch.isfinite(out).all(), "the output holds NaN or infinity"
        error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        assert error < TOLERANCE[out.dtype], f"relative error {error:.3g}"

    return check
