"""nano with a planted delay in one layer, to see whether a slowdown of known size is found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engines.nano import LLM as NanoLLM
from engines.nano.model_runner import ModelRunner
from engines.nano.options import Options

_CALIBRATION_CYCLES = 2_000_000
"""About a millisecond: long beside the events that time it."""


@dataclass(frozen=True)
class SlowOptions(Options):
    """nano's options, and `delays_us`: pairs of rows of a step (tokens computed in it) and microseconds."""

    delays_us: tuple[tuple[int, float], ...] = ()


class LLM(NanoLLM):
    """nano, slower by `delays_us` in each step of so many rows, in its middle layer.

    In a CUDA graph the delay is a kernel that spins (`torch.cuda._sleep`), captured with the layer. A step outside of
    graphs waits for the host, which has time to spare only on the GPU's side: there the host itself spins.
    """

    options_class = SlowOptions
    options: SlowOptions

    def prepare(self, runner: ModelRunner) -> None:
        """Put the delay before the layer's own work."""
        delays_us = {int(rows): float(us) for rows, us in self.options.delays_us}
        on_gpu = runner.device.type == "cuda"
        cycles = {rows: round(us * _cycles_per_us()) for rows, us in delays_us.items()} if on_gpu else {}

        def delay(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].shape[0]
            if rows not in delays_us:
                return
            if on_gpu and torch.cuda.is_current_stream_capturing():
                torch.cuda._sleep(cycles[rows])
                return
            end_s = time.perf_counter() + delays_us[rows] * 1e-6
            while time.perf_counter() < end_s:
                pass

        layers = runner.model.layers
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
