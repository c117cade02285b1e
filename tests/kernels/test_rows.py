"""Room behind rows: how much there is, that descriptors reach into it, and that what lies there changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels import decode_linear, prefill_gate_up, rms_norm
from kernels._rows import TILE_ROWS, copied_rows, empty_rows, rows_in_tiles
from kernels.decode_linear_launch import Launch
from kernels.prefill_linear import Launch as PrefillLaunch
from kernels.prefill_linear import described_rows

TILED = [Launch("tiled", 16, 32, 4, block_m=64, num_stages=2, described=True),
         Launch("tiled", 16, 64, 4, block_m=32, described=True)]  # fmt: skip


@pytest.mark.parametrize(("rows", "whole"), [(1, 1), (3, 4), (48, 64), (80, 128), (128, 128), (144, 256), (700, 768)])
def test_there_is_room_for_whole_tiles(rows, whole, randn):
    like = randn(1, 1, dtype=torch.bfloat16)
    x = empty_rows(rows, 40, like)
    assert x.shape == (rows, 40) and x.dtype == like.dtype and x.is_contiguous()
    for tile in (1, 16, 32, 64, TILE_ROWS):
        assert rows_in_tiles(x, tile) == (-(-rows // tile) * tile if -(-rows // tile) * tile <= whole else rows)


def test_of_what_has_no_room_no_more_than_its_rows_are_read(randn):
    x = randn(80, 32)
    assert rows_in_tiles(x, 64) == 80
    assert rows_in_tiles(x[:40], 64) == 64  # the rows behind are there
    assert rows_in_tiles(x[40:], 64) == 40
    assert rows_in_tiles(copied_rows(x), 64) == 128 and torch.equal(copied_rows(x), x)


@pytest.fixture
def reached(monkeypatch):
    """Rows of the descriptors that are made."""
    found = []

    def spy(x, block):
        descriptor = described_rows(x, block)
        found.append(descriptor.shape[0])
        return descriptor

    for name in ("decode_linear_tiled", "prefill_gate_up"):  # of which the package has a function, too
        monkeypatch.setattr(sys.modules[f"kernels.{name}"], "described_rows", spy)
    return found


def as_kernels_leave_it(x, behind):
    """x, and `behind` its rows."""
    whole = x.new_full((TILE_ROWS, x.shape[1]), behind)
    whole[: len(x)] = x
    return whole[: len(x)]


@pytest.mark.parametrize("behind", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("launch", TILED, ids=str)
def test_a_product_does_not_see_what_lies_behind(launch, behind, reached, randn, assert_close):
    x, weight = as_kernels_leave_it(randn(70, 64), behind), randn(40, 64)
    y = decode_linear(x, weight, launch=launch)
    assert_close(y, x.double() @ weight.double().T)
    assert reached == [128 if launch.block_m == 64 else 96]


@pytest.mark.parametrize("behind", [float("nan"), 0.0])
@pytest.mark.parametrize("per_sm", [0, 1])
def test_nor_do_gate_and_up(per_sm, behind, reached, randn, assert_close):
    x, weight = as_kernels_leave_it(randn(70, 64), behind), randn(2 * 32, 64)
    y = prefill_gate_up(x, weight, PrefillLaunch(32, 16, 32, 4, 2, per_sm=per_sm))
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    assert_close(y, torch.nn.functional.silu(gate) * up)
    assert reached == [96]


def test_kernels_leave_room(randn):
    """From the norm to the product and on to the next one."""
    x, gamma, weight = randn(70, 64), randn(64), randn(48, 64)
    normed = rms_norm(x, gamma, 1e-6)
    assert rows_in_tiles(normed, 64) == 128
    assert rows_in_tiles(decode_linear(normed, weight, launch=TILED[0]), 64) == 128
