"""One linear layer of a decode step: y = (gamma * x / rms(x)) W^T + bias, for few rows, made to stream W.

    x            [rows, K]      float32, float16 or bfloat16; all tensors share its dtype
    weight       [N, K]         W, as torch.nn.Linear keeps it; gated: the gate's N/2 rows, then up's
    norm_weight  [K]            gamma, optional: without it x goes into the product as it is
    bias         [N]            optional
    residual     [rows, N]      optional: y is added to it in place
    y            [rows, N], or [rows, N/2] with gated: silu(gate) * up

rms(x) = sqrt(mean(x^2) + eps). Sums are kept in float32; a residual sum is rounded once.

Fused: norm before, bias, SiLU * mul or the residual add after. Saved: the normalised rows' write and read
(2 * rows * K elements), gate's and up's (2 * rows * N), with a residual the product's (2 * rows * N).

W is read once and nothing else is large, so the time is W's bytes over the bandwidth if loads never pause. Launched
dependently, a program asks for its weights before it waits for the kernel before, whose tail and hand-over then cost
nothing. Two kernels:

- vector, for a row or a few: a program holds whole rows of W in registers, so that all their bytes are under way
  before the wait. What is left after it is the load of x and a short sum.
- tiled, for about 8 to 128 rows: W x^T on tensor cores, the long side of the instruction along W. The program's part of
  W is asked into the L2 before the wait and streams from there through a pipelined loop after it. Few columns
  give few programs; several may share the sum over K, the last to arrive adding the parts in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._dot import dot
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton
from kernels.choices import chosen
from kernels.rms_norm_linear import rms_norm

MAX_COUNTERS = 8192
"""Tiles whose sum over K may be shared among programs in one launch."""


@dataclass(frozen=True)
class Launch:
    """How a product is launched. Only time depends on it, and the order of sums.

    kernel: "vector" or "tiled"
    block_n, block_k: rows and columns of W that are one tile; a vector program holds all of its rows' tiles at once
    block_m: rows of x per program (tiled)
    split_k: programs that share one sum over K (tiled, without norm and gate)
    ahead: ask for the program's part of W before the wait (tiled; needs dependent launches)
    """

    kernel: str
    block_n: int
    block_k: int
    num_warps: int
    block_m: int = 1
    num_stages: int = 1
    split_k: int = 1
    ahead: bool = True


def reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The same in plain PyTorch, computed in float32."""
    value = x.float() if norm_weight is None else rms_norm(x, norm_weight, eps)
    y = F.linear(value, weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is None:
        return y.to(x.dtype)
    return residual.copy_((residual.float() + y).to(x.dtype))


@triton.jit
def ask_into_l2(pointers, BYTES: tl.constexpr):
    """Start bringing BYTES (a multiple of 16) at each pointer into the L2; nothing waits for them. From sm_90 on."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [pointers.to(tl.int64), tl.full(pointers.shape, BYTES, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _load_rows(rows, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """Whole rows of K elements from a column of pointers, as a tuple of tiles of BLOCK_K; each is read only once."""
    k = tl.arange(0, BLOCK_K)
    tiles = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if start + BLOCK_K <= K:
            tile = tl.load(rows + (start + k)[None, :], eviction_policy="evict_first")
        else:
            tile = tl.load(rows + (start + k)[None, :], mask=(start + k < K)[None, :], other=0.0,
                           eviction_policy="evict_first")  # fmt: skip
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no unpacking here
    return tiles


@triton.jit
def _load_vector(vector, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """K elements as a tuple of blocks of BLOCK_K, zeros after the last."""
    k = tl.arange(0, BLOCK_K)
    blocks = ()
    for start in tl.static_range(0, K, BLOCK_K):
        if start + BLOCK_K <= K:
            block = tl.load(vector + start + k)
        else:
            block = tl.load(vector + start + k, mask=start + k < K, other=0.0)
        blocks = blocks + (block,)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@triton.jit(do_not_specialize=["rows"])
def decode_linear_vector_kernel(
    x, norm_weight, weight, bias, y, rows, out, eps,
    K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y for all rows, one row after the other."""
    let_next_start(DEPENDENT)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # The last program's surplus rows read the last one again: cheaper than a mask on every load.
    w_column = tl.minimum(column, out - 1).to(tl.int64)
    w = _load_rows(weight + w_column[:, None] * K, BLOCK_K, K)
    if GATED:
        w_up = _load_rows(weight + (w_column + out)[:, None] * K, BLOCK_K, K)
    if norm_weight is not None:
        gamma = _load_vector(norm_weight, BLOCK_K, K)
    wait_for_previous(DEPENDENT)
    for r in tl.static_range(ROWS):
        # ROWS is the next power of two: surplus rows read the last row and are not stored.
        row = tl.minimum(r, rows - 1).to(tl.int64)
        offset = row * out + column
        stored = (column < out) & (r < rows)
        tiles = _load_vector(x + row * K, BLOCK_K, K)
        if RESIDUAL:
            before = tl.load(y + offset, mask=stored, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        total_up = total
        square = tl.zeros([BLOCK_K], tl.float32)
        for i in tl.static_range(len(tiles)):
            value = tiles[i].to(tl.float32)
            if norm_weight is not None:
                square += value * value
                value = value * gamma[i].to(tl.float32)
            total += w[i].to(tl.float32) * value[None, :]
            if GATED:
                total_up += w_up[i].to(tl.float32) * value[None, :]
        result = tl.sum(total, axis=1)
        result_up = result
        if GATED:
            result_up = tl.sum(total_up, axis=1)
        if norm_weight is not None:
            scale = tl.rsqrt(tl.sum(square, axis=0) / K + eps)
            result = result * scale
            result_up = result_up * scale
        if bias is not None:
            result += tl.load(bias + w_column).to(tl.float32)
            if GATED:
                result_up += tl.load(bias + out + w_column).to(tl.float32)
        if GATED:
            result = _silu_mul(result, result_up)
        if RESIDUAL:
            result += before
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _ask_for_tile(weight, w_column, first, K: tl.constexpr, PART: tl.constexpr, PIECES: tl.constexpr):
    """Ask for PART columns from `first` on of the rows `w_column` of W, in PIECES requests per row."""
    piece = tl.arange(0, PIECES) * (PART // PIECES)
    ask_into_l2(
        weight + w_column[:, None] * K + first + piece[None, :], PART // PIECES * weight.dtype.element_ty.itemsize
    )


@triton.jit(do_not_specialize=["rows"])
def decode_linear_tiled_kernel(
    x, norm_weight, weight, bias, y, parts, counters, rows, out, eps,
    K: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, SCALE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    PIECES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M rows and BLOCK_N columns of y, or one of SPLIT_K parts of its sum over K."""
    let_next_start(DEPENDENT)
    # Programs that run at the same time share columns of W: row blocks come first.
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    column = tile // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    w_column = tl.minimum(column, out - 1).to(tl.int64)
    row = tile % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = tl.minimum(row, rows - 1).to(tl.int64)
    PART: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = PART * SPLIT_K == K
    first = split * PART
    if PIECES > 0:
        _ask_for_tile(weight, w_column, first, K, PART, PIECES)
        if GATED:
            _ask_for_tile(weight, w_column + out, first, K, PART, PIECES)
    # Not in the loop: its loads are moved ahead of it, and some of them depend on the kernel before.
    wait_for_previous(DEPENDENT)

    k0 = first + tl.arange(0, BLOCK_K)
    x_tile = x + x_row[:, None] * K + k0[None, :]
    w_tile = weight + w_column[:, None] * K + k0[None, :]
    square = tl.zeros([BLOCK_M], tl.float32)
    scale = tl.zeros([BLOCK_M], tl.float32)
    if SCALE_FIRST:
        for start in range(0, K, BLOCK_K):
            value = tl.load(x_tile + start, mask=(k0 + start < K)[None, :], other=0.0).to(tl.float32)
            square += tl.sum(value * value, axis=1)
        scale = tl.rsqrt(square / K + eps)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = total
    for start in range(0, PART, BLOCK_K):
        if EVEN:
            w = tl.load(w_tile + start, eviction_policy="evict_first")
            a = tl.load(x_tile + start)
        else:
            inside = (k0 + start < K)[None, :]
            w = tl.load(w_tile + start, mask=inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(x_tile + start, mask=inside, other=0.0)
        if norm_weight is not None:
            value = a.to(tl.float32)
            if SCALE_FIRST:
                value = value * scale[:, None]
            else:
                square += tl.sum(value * value, axis=1)
            gamma = tl.load(norm_weight + k0 + start, mask=k0 + start < K, other=0.0).to(tl.float32)
            a = (value * gamma[None, :]).to(w.dtype)
        total = dot(w, tl.trans(a), total)
        if GATED:
            if EVEN:
                w = tl.load(w_tile + out.to(tl.int64) * K + start, eviction_policy="evict_first")
            else:
                w = tl.load(w_tile + out.to(tl.int64) * K + start, mask=inside, other=0.0)
            total_up = dot(w, tl.trans(a), total_up)

    last = True
    if SPLIT_K > 1:
        # Every program writes its part, then counts itself; the count of the one that comes last tells it that all
        # parts are written. The barrier puts this program's stores before its count, the count's acquire puts the
        # others' before the reads below, which go past the L1. The count is zero again for the next launch.
        size = tl.num_programs(0).to(tl.int64) * BLOCK_N * BLOCK_M
        place = parts + tile.to(tl.int64) * BLOCK_N * BLOCK_M
        place = place + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(place + split * size, total)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(SPLIT_K):
                total += tl.load(place + other * size, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if last:
        result = tl.trans(total)
        result_up = tl.trans(total_up)
        if norm_weight is not None and not SCALE_FIRST:
            scale = tl.rsqrt(square / K + eps)
            result = result * scale[:, None]
            result_up = result_up * scale[:, None]
        if bias is not None:
            result += tl.load(bias + w_column).to(tl.float32)[None, :]
            if GATED:
                result_up += tl.load(bias + out + w_column).to(tl.float32)[None, :]
        if GATED:
            result = _silu_mul(result, result_up)
        offset = row[:, None].to(tl.int64) * out + column[None, :]
        stored = (row < rows)[:, None] & (column < out)[None, :]
        if RESIDUAL:
            result += tl.load(y + offset, mask=stored, other=0.0).to(tl.float32)
        tl.store(y + offset, result.to(y.dtype.element_ty), mask=stored)


VECTOR_ROWS = 4
"""Up to here the default is a matrix-vector product per row; above, tensor cores serve better."""
VECTOR_BYTES = 8192
"""W's bytes in each vector program of 2 warps: 32 registers of each thread."""
TILED_SHARED_BYTES = 96 * 1024
"""The tiled kernel's default stays below this much shared memory, which every GPU from 8.0 on gives a program."""


def default_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int) -> Launch:
    """A launch that runs on any supported GPU, from the shape alone; `out` counts the output's columns."""
    reach = 16 // element_bytes * 32  # elements that one warp loads in one instruction, 16 bytes a thread
    row_bytes = k * element_bytes * (2 if gated else 1)
    if rows <= VECTOR_ROWS and row_bytes <= 8 * VECTOR_BYTES:
        num_warps = max(2, min(8, _power_of_two(row_bytes) // VECTOR_BYTES * 2))
        block_n = max(1, min(16, VECTOR_BYTES * num_warps // 2 // _power_of_two(row_bytes)))
        return Launch("vector", block_n, min(reach * num_warps, _power_of_two(k)), num_warps)
    block_m = min(128 if element_bytes == 2 else 32, max(16, _power_of_two(rows)))
    block_n = next((size for size in (64, 32) if out >= size * 96), 16)
    block_k = min(max(16, _power_of_two(k)), 128 if element_bytes == 2 and block_m <= 64 else 64)
    stage_bytes = (block_n * (2 if gated else 1) + block_m) * block_k * element_bytes
    stages = max(2, min(5, TILED_SHARED_BYTES // stage_bytes))
    return Launch("tiled", block_n, block_k, 4, block_m=block_m, num_stages=stages)


def shape_key(rows: int, out: int, k: int, gated: bool) -> str:
    """Under which a measured choice is kept: rows to the next power of two, and what W looks like."""
    return f"{'gated ' if gated else ''}{out}x{k} rows {_power_of_two(rows)}"


def best_launch(rows: int, out: int, k: int, gated: bool, element_bytes: int, device: torch.device) -> Launch | None:
    """The launch measured fastest on this GPU, else the default; None where cuBLAS and separate kernels were faster."""
    choice = chosen("decode_linear", shape_key(rows, out, k, gated), device) if element_bytes == 2 else None
    if choice is None:
        return default_launch(rows, out, k, gated, element_bytes)
    return None if choice.get("path") == "cublas" else Launch(**choice["launch"])


def _power_of_two(number: int) -> int:
    """The next power of two, the number itself if it is one."""
    return 1 << (number - 1).bit_length()


@lru_cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that shared sums count in and leave as zeros; launches that share a device must not overlap in time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode_linear with split_k must run once before it is captured in a graph.")
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def _check(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, gated: bool
) -> None:
    check_float("x", x, 2)
    rows, k = x.shape
    if k == 0:
        raise ValueError("x must have at least one column.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, not shape {tuple(weight.shape)}.")
    n = weight.shape[0]
    check_like("weight", weight, (n, k), x)
    if gated and n % 2:
        raise ValueError(f"weight must hold as many gate rows as up rows, but it has {n} rows.")
    if norm_weight is not None:
        check_like("norm_weight", norm_weight, (k,), x)
    if bias is not None:
        check_like("bias", bias, (n,), x)
    if residual is not None:
        check_like("residual", residual, (rows, n // 2 if gated else n), x)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    dependent: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """A decode step's linear layer with what stands before and after it; shapes as in this module's docstring.

    Returns y, or `residual` itself, to which the product was added. `residual` must not share memory with x.
    `dependent`: launch dependently where the GPU can (kernels/_dependent.py); results are the same. `launch` overrides
    the measured choice for this GPU and the default. ValueError if the arguments do not fit.
    """
    _check(x, weight, norm_weight, bias, residual, gated)
    if not runs_triton(x):
        return reference(x, weight, norm_weight=norm_weight, eps=eps, bias=bias, residual=residual, gated=gated)
    rows, k = x.shape
    out = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty((rows, out), dtype=x.dtype, device=x.device) if residual is None else residual
    if rows == 0 or out == 0:
        return y
    shape = (rows, out, k, gated, x.element_size())
    launch = launch or best_launch(*shape, x.device) or default_launch(*shape)
    dependent = dependent and can_depend(x.device)
    options = {"num_warps": launch.num_warps, "launch_pdl": True} if dependent else {"num_warps": launch.num_warps}
    if launch.kernel == "vector":
        decode_linear_vector_kernel[(-(-out // launch.block_n),)](
            x, norm_weight, weight, bias, y, rows, out, eps,
            K=k, GATED=gated, RESIDUAL=residual is not None, ROWS=_power_of_two(rows), BLOCK_N=launch.block_n,
            BLOCK_K=launch.block_k, DEPENDENT=dependent, **options,
        )  # fmt: skip
        return y
    split_k = launch.split_k
    tiles = -(-out // launch.block_n) * -(-rows // launch.block_m)
    if split_k > 1 and (norm_weight is not None or gated or tiles > MAX_COUNTERS):
        raise ValueError(f"split_k takes no norm, no gate and at most {MAX_COUNTERS} tiles.")
    parts = counters = None
    if split_k > 1:
        shape_of_parts = (split_k, tiles, launch.block_n, launch.block_m)
        parts = torch.empty(shape_of_parts, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    decode_linear_tiled_kernel[(tiles, split_k)](
        x, norm_weight, weight, bias, y, parts, counters, rows, out, eps,
        K=k, GATED=gated, RESIDUAL=residual is not None,
        # In float16 gamma * x may overflow before 1/rms brings it back, so the scale goes in first.
        SCALE_FIRST=norm_weight is not None and x.dtype == torch.float16,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SPLIT_K=split_k,
        PIECES=_pieces(k, launch, x.element_size()) if dependent and launch.ahead else 0, DEPENDENT=dependent,
        num_stages=launch.num_stages, **options,
    )  # fmt: skip
    return y


def _pieces(k: int, launch: Launch, element_bytes: int) -> int:
    """In how many requests a program asks for its part of one row of W; 0 if it cannot be cut into 16 bytes each."""
    part_bytes = k // launch.split_k * element_bytes
    if k % (launch.split_k * launch.block_k):
        return 0
    wanted = max(1, launch.num_warps * 32 // launch.block_n)
    return next((pieces for pieces in (wanted, 4, 2, 1) if pieces <= wanted and part_bytes % (16 * pieces) == 0), 0)


def saved_bytes(
    rows: int, k: int, out: int, element_bytes: int, norm: bool = True, gated: bool = False, residual: bool = False
) -> int:
    """Write and read of what stays in registers: the normalised rows, gate and up, the product before its addition."""
    elements = (2 * rows * k if norm else 0) + (4 * rows * out if gated else 0) + (2 * rows * out if residual else 0)
    return elements * element_bytes


FUSION = Fusion(
    "decode_linear",
    ("input_norm+qkv_proj", "o_proj+residual", "post_norm+gate_up_proj+silu_mul", "down_proj+residual"),
    decode_linear,
    reference,
    saved_bytes,
)
