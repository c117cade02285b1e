"""How much of the GPU is this process's, and how many cache blocks that leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

CONTEXT_BYTES = 512 * 2**20
"""What a CUDA context with torch's own kernels takes (H100, H200), where the driver does not tell."""
MOST_GROWTH_BYTES = 2**30
"""Modules, workspaces, communicators and graphs take no more than this outside torch's allocator: what vanishes beyond
it while an engine starts went to another process."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU: its `total`, what is `free`, what this process holds (`ours`); the rest is other processes'."""

    total: int
    free: int
    ours: int

    @classmethod
    def now(cls, untracked_at_start: int) -> Memory:
        """As it is now; `untracked_at_start` is what `untracked` was when the engine started."""
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        told = _told_by_driver()
        if told is None or told < reserved:  # a number of another process: containers count processes for themselves
            told = reserved + CONTEXT_BYTES + min(max(0, untracked() - untracked_at_start), MOST_GROWTH_BYTES)
        return cls(total, free, told)

    def cache_blocks(self, step_bytes: int, utilization: float, block_bytes: int) -> int:
        """Blocks that keep this process within `utilization` × total in a step that takes `step_bytes` more than now,
        and that fit into what others leave free."""
        room = min(int(self.total * utilization) - self.ours, self.free)
        return max(0, room - step_bytes) // block_bytes


def untracked() -> int:
    """Bytes in use on the GPU that torch's allocator in this process does not hold."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _told_by_driver() -> int | None:
    """What NVML says this process holds; None where it does not see it, as in many containers."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        held = {p.pid: p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}
    except nvml.NVMLError:
        return None
    return held.get(os.getpid())
