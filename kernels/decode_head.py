"""The end of a decode step: final norm, lm_head, and what a sampler needs to know of each tile of the vocabulary.

    x             [rows, hidden]   float32, float16 or bfloat16; all tensors but the temperatures share its dtype
    norm_weight   [hidden]         gamma
    weight        [vocab, hidden]  the lm_head
    temperatures  [rows] float32   0 means greedy, and counts as 1 here
    logits        [rows, vocab]    z = (gamma * x / rms(x)) W^T, rounded to the dtype
    tile_max      [rows, tiles] float32   the greatest z of each TILE vocabulary entries
    tile_sum      [rows, tiles] float32   the sum of exp((z - tile_max) / temperature) over the tile

Fused: norm, linear and the sampler's first pass. Saved: the normalised rows' write and read (2 * rows * hidden
elements), and a read of the logits (rows * vocab).

Three ways. Two are for few rows (up to 16 or so). In one kernel, a program makes one tile: W x^T on tensor cores, all
rows at once; W, which is most of a small model, streams through a pipelined loop, and its first columns are asked into
the L2 before the wait. Or as a layer's product (`Launch.product`), whose programs hold W in registers and come nearer
to the memory's rate, with `tile_stats` after it. For more rows, the norm in a kernel and all the rest in another
(`Launch.tiles`, kernels/decode_head_tiles.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import ask_into_l2, can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import power_of_two, runs_triton, tl, triton
from kernels.choices import chosen_for, launch_of, rows_measured
from kernels.decode_head_tiles import run_tiles
from kernels.decode_linear import decode_linear
from kernels.decode_linear_launch import Launch as LinearLaunch
from kernels.prefill_linear import Launch as TilesLaunch
from kernels.rms_norm import rms_norm as rms_norm_alone
from kernels.rms_norm_linear import rms_norm
from kernels.sample import TILE, tile_stats


@dataclass(frozen=True)
class Launch:
    """How the head is launched.

    In one kernel: columns of W per step, steps under way, and how many steps are asked for early.
    product: instead, how `decode_linear` makes the logits
    tiles: instead, how the kernel behind a norm of its own makes them and the statistics
    """

    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    ahead: int = 1
    product: LinearLaunch | None = None
    tiles: TilesLaunch | None = None


def reference(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, temperatures: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, computed in float32 from the rounded logits on."""
    logits = F.linear(rms_norm(x, norm_weight, eps), weight.float()).to(x.dtype)
    rows, vocab = logits.shape
    z = F.pad(logits.float(), (0, -vocab % TILE), value=float("-inf")).view(rows, -1, TILE)
    tile_max = z.amax(-1)
    divisor = torch.where(temperatures == 0, 1.0, temperatures)[:, None, None]
    return logits, tile_max, ((z - tile_max[..., None]) / divisor).exp().sum(-1)


@triton.jit(do_not_specialize=["rows"])
def decode_head_kernel(
    x, norm_weight, weight, temperatures, logits, tile_max, tile_sum, rows, vocab, eps,
    K: tl.constexpr, SCALE_FIRST: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of the vocabulary for BLOCK_M rows."""
    let_next_start(DEPENDENT)
    tile = tl.program_id(0)
    column = tile * TILE + tl.arange(0, TILE)
    w_column = tl.minimum(column, vocab - 1).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = tl.minimum(row, rows - 1).to(tl.int64)
    k0 = tl.arange(0, BLOCK_K)
    x_tile = x + x_row[:, None] * K + k0[None, :]
    w_tile = weight + w_column[:, None] * K + k0[None, :]
    if AHEAD > 0:
        ask_into_l2(weight + w_column * K, AHEAD * BLOCK_K * weight.dtype.element_ty.itemsize)
    # Not in the loop: its loads are moved ahead of it, and x depends on the kernel before.
    wait_for_previous(DEPENDENT)

    square = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.zeros([BLOCK_M], tl.float32)
    if SCALE_FIRST:
        for start in range(0, K, BLOCK_K):
            value = tl.load(x_tile + start, mask=(k0 + start < K)[None, :], other=0.0).to(tl.float32)
            square += tl.sum(value * value, axis=1)
        scale = tl.rsqrt(square / K + eps)
    total = tl.zeros([TILE, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            w = tl.load(w_tile + start, eviction_policy="evict_first")
            value = tl.load(x_tile + start).to(tl.float32)
            gamma = tl.load(norm_weight + k0 + start).to(tl.float32)
        else:
            inside = k0 + start < K
            w = tl.load(w_tile + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            value = tl.load(x_tile + start, mask=inside[None, :], other=0.0).to(tl.float32)
            gamma = tl.load(norm_weight + k0 + start, mask=inside, other=0.0).to(tl.float32)
        if SCALE_FIRST:
            value = value * scale[:, None]
        else:
            square += tl.sum(value * value, axis=1)
        total = dot(w, tl.trans((value * gamma[None, :]).to(w.dtype)), total)
    if not SCALE_FIRST:
        scale = tl.rsqrt(square / K + eps)
        total = total * scale[None, :]

    rounded = total.to(logits.dtype.element_ty)
    in_rows = row < rows
    in_vocab = column < vocab
    offset = row[None, :].to(tl.int64) * vocab + column[:, None]
    tl.store(logits + offset, rounded, mask=in_vocab[:, None] & in_rows[None, :])
    z = tl.where(in_vocab[:, None], rounded.to(tl.float32), float("-inf"))
    greatest = tl.max(z, axis=0)
    temperature = tl.load(temperatures + x_row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    weights = tl.sum(tl.exp((z - greatest[None, :]) / temperature[None, :]), axis=0)
    place = row.to(tl.int64) * tl.num_programs(0) + tile
    tl.store(tile_max + place, greatest, mask=in_rows)
    tl.store(tile_sum + place, weights, mask=in_rows)


def default_launch(k: int, element_bytes: int) -> Launch:
    """A launch that runs on any supported GPU: under 96 KiB of shared memory."""
    block_k = min(64 if element_bytes == 2 else 32, max(16, power_of_two(k)))
    return Launch(block_k, 4, 4)


def shape_key(rows: int, vocab: int, k: int) -> str:
    """Under which a choice measured for so many rows is kept: the next number that is measured."""
    return f"{vocab}x{k} rows {rows_measured(rows)[0]}"


def best_launch(rows: int, vocab: int, k: int, element_bytes: int, device: torch.device) -> Launch | None:
    """The launch measured fastest on this GPU, else the default; None where cuBLAS and separate kernels were faster."""
    choice = None
    if element_bytes == 2:
        choice = chosen_for("decode_head", rows, lambda count: shape_key(count, vocab, k), device)
    if choice is None:
        return default_launch(k, element_bytes)
    if choice.get("path") == "cublas":
        return None
    launch = choice["launch"]
    if "product" in launch:
        return Launch(product=launch_of(LinearLaunch, launch["product"], device))
    if "tiles" in launch:
        return Launch(tiles=launch_of(TilesLaunch, launch["tiles"], device))
    return launch_of(Launch, launch, device)


def decode_head(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    temperatures: Tensor,
    *,
    out: Tensor | None = None,
    dependent: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, tile_max, tile_sum) of the last layer's output; shapes as in this module's docstring.

    `out`: where the logits go, contiguous; else to memory of their own. `dependent`: launch dependently where the GPU
    can; results are the same. `launch` overrides the measured choice for this GPU and the default. ValueError if the
    arguments do not fit.
    """
    check_float("x", x, 2)
    rows, k = x.shape
    if k == 0:
        raise ValueError("x must have at least one column.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    vocab = weight.shape[0]
    check_like("norm_weight", norm_weight, (k,), x)
    check_like("weight", weight, (vocab, k), x)
    check_like("temperatures", temperatures, (rows,), x, torch.float32)
    if out is not None:
        check_like("out", out, (rows, vocab), x)
    if not runs_triton(x):
        logits, *sums = reference(x, norm_weight, weight, eps, temperatures)
        return logits if out is None else out.copy_(logits), sums[0], sums[1]
    shape = (k, x.element_size())
    launch = launch or best_launch(rows, vocab, *shape, x.device) or default_launch(*shape)
    if launch.product is not None and rows > 0 and vocab > 0:
        logits = decode_linear(x, weight, norm_weight=norm_weight, eps=eps, dependent=dependent, launch=launch.product)
        logits = logits if out is None else out.copy_(logits)
        # A copy starts no kernel early.
        return logits, *tile_stats(logits, temperatures, dependent=dependent and out is None)
    tiles = -(-vocab // TILE)
    logits = torch.empty((rows, vocab), dtype=x.dtype, device=x.device) if out is None else out
    tile_max = torch.empty((rows, tiles), dtype=torch.float32, device=x.device)
    tile_sum = torch.empty((rows, tiles), dtype=torch.float32, device=x.device)
    if rows == 0 or vocab == 0:
        return logits, tile_max, tile_sum
    if launch.tiles is not None:
        normalised = rms_norm_alone(x, norm_weight, eps, dependent=dependent)
        run_tiles(normalised, weight, temperatures, logits, tile_max, tile_sum, launch.tiles, dependent=dependent)
        return logits, tile_max, tile_sum
    dependent = dependent and can_depend(x.device)
    options = {"launch_pdl": True} if dependent else {}
    block_m = min(64, max(16, power_of_two(rows)))
    decode_head_kernel[(tiles, -(-rows // block_m))](
        x, norm_weight, weight, temperatures, logits, tile_max, tile_sum, rows, vocab, eps,
        K=k,
        # In float16 gamma * x may overflow before 1/rms brings it back, so the scale goes in first.
        SCALE_FIRST=x.dtype == torch.float16,
        TILE=TILE, BLOCK_M=block_m, BLOCK_K=launch.block_k,
        AHEAD=launch.ahead if dependent and k % 16 == 0 and k >= launch.ahead * launch.block_k else 0,
        DEPENDENT=dependent, num_warps=launch.num_warps, num_stages=launch.num_stages, **options,
    )  # fmt: skip
    return logits, tile_max, tile_sum


def saved_bytes(rows: int, hidden: int, vocab: int, element_bytes: int) -> int:
    """The normalised rows' write and read, and the sampler's first read of the logits."""
    return rows * (2 * hidden + vocab) * element_bytes


FUSION = Fusion("decode_head", ("final_norm+lm_head",), decode_head, reference, saved_bytes)
