"""Dependent launches (programmatic dependent launch, sm_90 on): a kernel starts while the one before it still runs.

A kernel in such a chain first calls `let_next_start`, loads what nothing before it in the chain writes (weights, older
cache), then `wait_for_previous`, and only then reads or writes anything that the chain passes on. The wait returns once
the kernel before has ended; since that one waited too, all before it have ended as well. So *every* kernel of a chain
must wait, and the wait must not stand in a loop that Triton pipelines: loads would be moved above it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels._triton import HAVE_TRITON, INTERPRETED, tl, triton

if HAVE_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Allow the next kernel's programs to become resident as soon as all of this one's are."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Return when the previous kernel has ended and its writes can be seen."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def ask_into_l2(pointers, BYTES: tl.constexpr):
    """Start bringing BYTES (a multiple of 16) at each pointer into the L2; nothing waits for them. From sm_90 on."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [pointers.to(tl.int64), tl.full(pointers.shape, BYTES, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@lru_cache
def can_depend(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched so: compute capability 9.0 on, and not in the interpreter."""
    if INTERPRETED or not HAVE_TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
