"""Rows with room behind them, so that whole tiles of them may be read.

The tensor memory accelerator is slow with a box that ends outside of its tensor: by descriptors, a product of 80 rows
in tiles of 64 took longer than one of 128. So kernels leave room behind the rows that a product reads next, and its
descriptors reach into it. What lies there does not matter: a row of a product comes from one row of x, and surplus
rows are not stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import power_of_two

TILE_ROWS = 128
"""The most rows of a tile."""


def empty_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] of the dtype and on the device of `like`, not written; behind it lies the rest of its last tile,
    of whatever power of two of rows up to TILE_ROWS that is."""
    power = power_of_two(rows)
    room = power if power <= TILE_ROWS else -(-rows // TILE_ROWS) * TILE_ROWS
    return torch.empty((room, columns), dtype=like.dtype, device=like.device)[:rows]


def copied_rows(x: Tensor) -> Tensor:
    """x [rows, columns] once more, as a kernel leaves it."""
    return empty_rows(x.shape[0], x.shape[1], x).copy_(x)


def rows_in_tiles(x: Tensor, tile_rows: int) -> int:
    """The rows of contiguous x [rows, columns], to the end of the last tile if its memory reaches so far."""
    rows, columns = x.shape
    whole = -(-rows // tile_rows) * tile_rows
    numbers = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return whole if whole * columns <= numbers else rows
