"""The head's product with the sampler's first pass in its end, for 8 to 256 rows of a decode step.

    x             [rows, hidden]   normalised rows; float16, bfloat16 or float32; x, weight and logits share their dtype
    weight        [vocab, hidden]  the lm_head
    temperatures  [rows] float32   0 means greedy, and counts as 1 here
    logits        [rows, vocab]    z = x W^T, rounded to the dtype
    tile_max      [rows, tiles] float32   the greatest z of each TILE vocabulary entries
    tile_sum      [rows, tiles] float32   the sum of exp((z - tile_max) / temperature) over the tile

Fused: the product and `tile_stats`. Saved: a read of the logits. The norm before it is a kernel of its own
(kernels/rms_norm.py), whose rows of x are in the L2.

W is most of a small model and is to be read once, at the memory's rate. Programs go from tile to tile (`per_sm` of the
launch), and W's next columns are on their way while a tile's end is made. All rows of a tile of W come right after one
another. How tiles are made and launched: kernels/prefill_linear.py.
"""

from __future__ import annotations

from torch import Tensor

from kernels._dependent import ask_into_l2, can_depend, let_next_start, wait_for_previous
from kernels._triton import tl, triton
from kernels.prefill_linear import Launch, can_describe, described, described_rows, halves, product_tile, programs
from kernels.sample import TILE, finite, scale_of

INSTRUCTION_ROWS = 64
"""Of a tensor core's instruction: x's rows stand along them from so many on, W's where there are fewer."""


@triton.jit
def _end(
    total, scale, logits, tile_max, tile_sum, row, column, rows, vocab, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Stores one tile's logits [BLOCK_M, TILE], from `row` and `column` on, and their maxima and sums."""
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, TILE)
    rounded = total.to(logits.dtype if DESCRIBED else logits.dtype.element_ty)
    if DESCRIBED:
        logits.store([row, column], rounded)
    else:
        mask = (i < rows)[:, None] & (j < vocab)[None, :]
        tl.store(logits + i[:, None].to(tl.int64) * vocab + j[None, :], rounded, mask=mask)
    z = tl.where((j < vocab)[None, :], rounded.to(tl.float32), float("-inf"))
    top = tl.max(z, axis=1)
    weights = tl.sum(tl.exp2((z - finite(top)[:, None]) * scale[:, None]), axis=1)
    place = i.to(tl.int64) * tl.cdiv(vocab, TILE) + column // TILE
    mask = (i < rows) & (column < vocab)  # the second half of the last tile of W may be empty
    tl.store(tile_max + place, top, mask=mask)
    tl.store(tile_sum + place, weights, mask=mask)


@triton.jit
def _head_tile(
    x, weight, temperatures, logits, tile_max, tile_sum, index, rows, vocab, K: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_FIRST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N vocabulary entries, TILE or twice as many."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = index % row_blocks * BLOCK_M
    column = index // row_blocks * BLOCK_N
    total = product_tile(x, weight, row, column, rows, vocab, K, 1, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIBED, W_FIRST)
    # Not before the product: a loop over tiles would carry it along for as many steps as are under way.
    scale = scale_of(tl.load(temperatures + tl.minimum(row + tl.arange(0, BLOCK_M), rows - 1)))
    if BLOCK_N == TILE:
        _end(total, scale, logits, tile_max, tile_sum, row, column, rows, vocab, TILE, BLOCK_M, DESCRIBED)
    else:
        left, right = halves(total, BLOCK_M, TILE)
        _end(left, scale, logits, tile_max, tile_sum, row, column, rows, vocab, TILE, BLOCK_M, DESCRIBED)
        _end(right, scale, logits, tile_max, tile_sum, row, column + TILE, rows, vocab, TILE, BLOCK_M, DESCRIBED)


@triton.jit(do_not_specialize=["rows"])
def decode_head_tiles_kernel(
    x, weight, weight_rows, temperatures, logits, tile_max, tile_sum, rows, vocab, K: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_FIRST: tl.constexpr, AHEAD: tl.constexpr,
    DESCRIBED: tl.constexpr, PERSISTENT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile, or every so-many-th; x, weight and logits are descriptors or pointers, weight_rows is W's pointer."""
    let_next_start(DEPENDENT)
    first = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    if AHEAD > 0:
        column = tl.minimum(first // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N), vocab - 1).to(tl.int64)
        ask_into_l2(weight_rows + column * K, AHEAD * weight_rows.dtype.element_ty.itemsize)
    # Not in the loop: its loads are moved ahead of it, and x depends on the kernel before.
    wait_for_previous(DEPENDENT)
    if PERSISTENT:
        for index in tl.range(first, row_blocks * tl.cdiv(vocab, BLOCK_N), tl.num_programs(0), flatten=True):
            _head_tile(
                x, weight, temperatures, logits, tile_max, tile_sum, index, rows, vocab, K, TILE, BLOCK_M, BLOCK_N,
                BLOCK_K, W_FIRST, DESCRIBED,
            )  # fmt: skip
    else:
        _head_tile(
            x, weight, temperatures, logits, tile_max, tile_sum, first, rows, vocab, K, TILE, BLOCK_M, BLOCK_N, BLOCK_K,
            W_FIRST, DESCRIBED,
        )  # fmt: skip


def run_tiles(
    x: Tensor,
    weight: Tensor,
    temperatures: Tensor,
    logits: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
    launch: Launch,
    dependent: bool = False,
) -> None:
    """Launches the kernel on checked, contiguous arguments, none of them empty: writes the last three tensors.

    `launch`: its `group_m` and `pieces` say nothing here, where all blocks of rows go through W together and a tile is
    written by TILE columns. `dependent`: start while the kernel before it in the stream still runs, where the GPU can;
    it is waited for. ValueError where `launch` cannot run.
    """
    if launch.block_n not in (TILE, 2 * TILE):
        raise ValueError(f"block_n of the head's tiles must be {TILE} or {2 * TILE}, not {launch.block_n}.")
    rows, k = x.shape
    tiles = -(-rows // launch.block_m) * -(-weight.shape[0] // launch.block_n)
    operands = (x, weight, logits)
    if describes := can_describe(*operands):
        operands = (
            described_rows(x, (launch.block_m, launch.block_k)),
            described(weight, (launch.block_n, launch.block_k), parts=1),
            described(logits, (launch.block_m, TILE)),
        )
    depends = dependent and can_depend(x.device)
    decode_head_tiles_kernel[(programs(launch, tiles, x.device),)](
        *operands[:2], weight, temperatures, operands[2], tile_max, tile_sum, rows, weight.shape[0],
        K=k, TILE=TILE, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        W_FIRST=launch.block_m < INSTRUCTION_ROWS,
        # As many columns as the loop asks for before its first product.
        AHEAD=min(k, launch.num_stages * launch.block_k) if depends and describes else 0,
        DESCRIBED=describes, PERSISTENT=launch.per_sm > 0, DEPENDENT=depends,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
        **({"launch_pdl": True} if depends else {}),
    )  # fmt: skip
