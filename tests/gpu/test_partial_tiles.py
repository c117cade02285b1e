"""Rows that fill no whole tile take no longer than as many as fill it: few numbers are tuned, others run too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels import decode_linear
from kernels._timing import time_graph_us
from kernels.decode_linear import Launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = 28
HIDDEN, OUT = 1024, 4096
LAUNCHES = {
    128: Launch("tiled", 64, 64, 8, block_m=128, num_stages=4),
    64: Launch("tiled", 32, 128, 4, block_m=64, num_stages=4),
}
SLOWER = 1.1


@pytest.mark.parametrize("block_m", LAUNCHES)
def test_surplus_rows_cost_nothing(block_m: int) -> None:
    weights = [torch.randn(OUT, HIDDEN, device="cuda").mul_(HIDDEN**-0.5).bfloat16() for _ in range(LAYERS)]

    def time_us(rows: int) -> float:
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        product = partial(decode_linear, x, dependent=True, launch=LAUNCHES[block_m])
        return time_graph_us([partial(product, weight) for weight in weights]) / LAYERS

    few, full = time_us(block_m + 16), time_us(2 * block_m)
    print(f"tiles of {block_m} rows: {few:.2f} us for {block_m + 16}, {full:.2f} us for {2 * block_m}")
    assert few < SLOWER * full
