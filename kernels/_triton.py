"""Triton where it is installed, and the choice between a kernel and its reference.

`import kernels` works without Triton: the kernels are then never launched and the references run. Triton's interpreter
(TRITON_INTERPRET=1) must be chosen before `kernels` is first imported, because it replaces `triton.jit` itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False
    # Enough for the kernels' decorators and annotations; their bodies are never run.
    triton = SimpleNamespace(jit=lambda *args, **_kwargs: args[0] if args else lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)

INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether this process's kernels run in Triton's interpreter: on CPU tensors too, and slowly."""
if INTERPRETED:
    with suppress(ImportError):
        # The interpreter imports this at its first launch and looks at the variable again, which may be gone by then.
        import_module("triton.experimental.gluon")

PATHS = ("auto", "reference", "triton")
_path = "auto"


@contextmanager
def use(path: str) -> Iterator[None]:
    """Choose what the public functions run, inside a `with` block and for the whole process.

    `auto`: the Triton kernel on CUDA tensors, or anywhere under TRITON_INTERPRET=1; otherwise the reference.
    `reference`: always plain PyTorch. `triton`: always the kernel; ValueError where it cannot run.
    """
    global _path
    if path not in PATHS:
        raise ValueError(f"the kernels' path must be one of {', '.join(PATHS)}, not {path!r}.")
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether a public function called with `tensor` launches its Triton kernel (else its reference runs)."""
    if _path == "reference":
        return False
    if _path == "auto":
        return HAVE_TRITON and (tensor.is_cuda or INTERPRETED)
    if not HAVE_TRITON:
        raise ValueError("the Triton kernels were asked for, but the package triton is not installed.")
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError("Triton kernels take CPU tensors only if TRITON_INTERPRET=1 was set before kernels' import.")
    return True


def power_of_two(number: int) -> int:
    """The next power of two, the number itself if it is one; 1 for 0. As Triton wants the sizes of tiles."""
    return 1 << max(0, number - 1).bit_length()
