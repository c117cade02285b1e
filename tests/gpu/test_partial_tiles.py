"""Rows that fill no whole tile take no longer than as many as fill it: few numbers are tuned, others run too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels import decode_linear
from kernels._rows import copied_rows
from kernels._timing import time_graph_us
from kernels.decode_linear_launch import Launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = 28
HIDDEN, OUT = 1024, 4096
LAUNCHES = (
    Launch("tiled", 64, 64, 8, block_m=128, num_stages=4),
    Launch("tiled", 32, 128, 4, block_m=64, num_stages=4),
    Launch("tiled", 64, 64, 8, block_m=128, num_stages=4, described=True),
    Launch("tiled", 64, 128, 4, block_m=64, num_stages=6, described=True),
)
SLOWER = 1.1


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_surplus_rows_cost_nothing(launch: Launch) -> None:
    weights = [torch.randn(OUT, HIDDEN, device="cuda").mul_(HIDDEN**-0.5).bfloat16() for _ in range(LAYERS)]

    def time_us(rows: int) -> float:
        x = copied_rows(torch.randn(rows, HIDDEN, device="cuda").bfloat16())
        product = partial(decode_linear, x, dependent=True, launch=launch)
        return time_graph_us([partial(product, weight) for weight in weights]) / LAYERS

    few, full = time_us(launch.block_m + 16), time_us(2 * launch.block_m)
    print(f"{launch}: {few:.2f} us for {launch.block_m + 16} rows, {full:.2f} us for {2 * launch.block_m}")
    assert few < SLOWER * full
