"""nano and fused with a planted delay in one layer, to see whether a slowdown of known size is found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engines.fused import LLM as FusedLLM
from engines.fused.features import FusedOptions
from engines.fused.runner import FusedRunner
from engines.nano import LLM as NanoLLM
from engines.nano.model_runner import ModelRunner
from engines.nano.options import Options

_CALIBRATION_CYCLES = 2_000_000
"""About a millisecond: long beside the events that time it."""

Delays = tuple[tuple[int, float], ...]
"""Pairs of rows of a step (tokens computed in it, in a graph those that it was captured for) and microseconds."""


@dataclass(frozen=True)
class SlowOptions(Options):
    """nano's options, and `delays_us`."""

    delays_us: Delays = ()


@dataclass(frozen=True)
class SlowFusedOptions(FusedOptions):
    """fused's options, and `delays_us`."""

    delays_us: Delays = ()


class Nano(NanoLLM):
    """nano, slower by `delays_us` in each step of so many rows, in its middle layer."""

    options_class = SlowOptions
    options: SlowOptions

    def prepare(self, runner: ModelRunner) -> None:
        plant(runner.model.layers, runner.device, self.options.delays_us)


class Fused(FusedLLM):
    """fused, slower by `delays_us` in each step of so many rows, in its middle layer."""

    options_class = SlowFusedOptions
    options: SlowFusedOptions

    def _start_runner(self) -> FusedRunner:
        return _Runner(self.config, self.options)


class _Runner(FusedRunner):
    options: SlowFusedOptions

    def _fuse(self) -> None:
        super()._fuse()
        plant(self.model.layers, self.device, self.options.delays_us)


def plant(layers: Sequence[nn.Module] | nn.ModuleList, device: torch.device, delays: Delays) -> None:
    """Put `delays` before the own work of the middle one of `layers`.

    In a CUDA graph a delay is a kernel that spins (`torch.cuda._sleep`), captured with the layer; steps without a delay
    get one that spins for no cycle. It is launched as kernels usually are: it starts when the one before it has ended,
    and lets none start before it has. Between kernels that may overlap that costs a little by itself, so an engine to
    compare with needs the kernel, too. A step outside of graphs waits for the host, which has time to spare only on the
    GPU's side: there the host itself spins.
    """
    delays_us = {int(rows): float(us) for rows, us in delays}
    cycles_per_us = _cycles_per_us() if device.type == "cuda" and delays_us else 0.0

    def delay(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        us = delays_us.get(inputs[0].shape[0], 0.0)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            torch.cuda._sleep(round(us * cycles_per_us))
        elif us:
            end_s = time.perf_counter() + us * 1e-6
            while time.perf_counter() < end_s:
                pass

    layers[len(layers) // 2].register_forward_pre_hook(delay)


def _cycles_per_us() -> float:
    """How fast the GPU's clock runs under load, by a kernel that spins for so many of its cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # wakes the clock
    start.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return _CALIBRATION_CYCLES / (start.elapsed_time(end) * 1e3)
