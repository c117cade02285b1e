"""Exact categorical sampling on the device, in two launches that a captured decode step can hold.

    logits        [rows, vocab]           float32, float16 or bfloat16; -inf is never drawn (top-k, top-p)
    temperatures  [rows] float32          0 is greedy
    tile_max      [rows, tiles] float32   the greatest logit of each TILE vocabulary entries
    tile_sum      [rows, tiles] float32   sum of exp((logit - tile_max) / T) of the tile; T = 1 in greedy rows
    seeds         [rows] int64            each request's own
    positions     [rows] int32            where the input token stands; -1: a padding row, whose token is 0
    table         [vocab, hidden]         the embedding table: float32, float16 or bfloat16
    stream        [rows, hidden]          its dtype: the residual stream that the next step starts from

The token at `positions + 1` is the first whose running sum of exp(logit / T) over the vocabulary exceeds u times the
whole sum, with u in (0, 1) from Philox4x32-10: key = seed, counter = position of the drawn token. `tile_stats` reads
the logits once; `choose_token` finds the tile by the tiles' weights and reads only that tile again. A token depends on
seed, position and logits alone, not on its row or its batch. Greedy rows take the first of the greatest logits.

Running sums are float64, and u has 52 bits: in float32 they would cut off tokens less likely than 1e-7, and move
the borders of the others by as much. The weights themselves are float32, right to about 1e-6 of each.

Fused: scaling, softmax, noise and search, and then the update of the decode state (tokens, positions, read-back) and
the embedding of the drawn token. Saved: probabilities (or noise) are neither written nor read; and a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._checks import check_float, check_integers, check_like
from kernels._dependent import can_depend, let_next_start, wait_for_previous
from kernels._fusion import Fusion
from kernels._triton import runs_triton, tl, triton

TILE = 128
"""Vocabulary entries that share one maximum and one sum."""
GROUP = 128
"""Tiles whose weights `choose_token` sums before it looks for one of them."""
CHOOSE_WARPS = 4
"""Of `choose_token`: 16 of 2,048 tiles per thread, and few warps to wait for one another."""
COLDEST = tl.constexpr(1e-30)
"""Colder is the same: any difference of two logits is then infinite, and 1 / T is still finite."""
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Launch:
    """Launch shape of `tile_stats`: `tiles` (a power of two) per program."""

    tiles: int
    num_warps: int


def default_launch(rows: int) -> Launch:
    """Two 16-byte loads per thread of 16-bit logits; one, and more programs, where few rows would leave some idle."""
    return Launch(4, 2) if rows <= 4 else Launch(16, 4)


def tile_stats_reference(logits: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_stats` in plain PyTorch, computed in float32."""
    rows, vocab = logits.shape
    padded = F.pad(logits.float(), (0, -vocab % TILE), value=-torch.inf).view(rows, -1, TILE)
    tile_max = padded.amax(-1)
    top = tile_max.masked_fill(tile_max == -torch.inf, 0.0)
    scaled = (padded - top.unsqueeze(-1)) / _divisor(temperatures).view(-1, 1, 1)
    return tile_max, scaled.exp().sum(-1)


def choose_token_reference(
    logits: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
    ring: Tensor,
    steps: Tensor,
    embedding: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`choose_token` in plain PyTorch and float64, from the logits alone: no tiles, one running sum."""
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    weights = ((z - top) / _divisor(temperatures).double().unsqueeze(1)).exp().nan_to_num(0.0)
    running = weights.cumsum(-1)
    target = uniform_reference(seeds, positions + 1).unsqueeze(1) * running[:, -1:]
    at = torch.arange(z.shape[1], device=z.device)
    last = torch.where(weights > 0, at, 0).amax(-1)
    drawn = torch.minimum(torch.searchsorted(running, target, right=True).squeeze(1), last)
    chosen = torch.where(temperatures == 0, z.argmax(-1), drawn)
    chosen = torch.where(positions >= 0, chosen, 0).int()
    rows = torch.arange(len(tokens), device=ring.device)
    tokens.copy_(chosen)
    ring[(steps % ring.shape[0]).to(ring.device), rows] = chosen.to(ring.device)
    positions += positions >= 0
    steps += 1
    if embedding is not None:
        table, stream = embedding
        stream.copy_(table[chosen.long()])


def uniform_reference(seeds: Tensor, positions: Tensor) -> Tensor:
    """The random numbers of (seeds, positions), float64 in (0, 1)."""
    zero = torch.zeros_like(seeds)
    high, low, _, _ = philox_reference((positions, zero, zero, zero), (seeds, seeds >> 32))
    return (high.double() * 2.0**20 + (low >> 12).double() + 0.5) * 2.0**-52


def philox_reference(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four words of 32 bits, in int64, from four of counter and two of key."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = (c.long() & word for c in counter)
    k0, k1 = (k & word for k in key)
    for _ in range(10):
        # Products wrap around at 64 bits; the mask takes off the sign that the shift brings in.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & word) ^ c1 ^ k0, b & word, (a >> 32 & word) ^ c3 ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c0, c1, c2, c3


def _divisor(temperatures: Tensor) -> Tensor:
    return torch.where(temperatures == 0, 1.0, temperatures.clamp_min(1e-30))


@triton.jit
def scale_of(temperature):
    """log2(e) / T, so that exp(z / T) = exp2(z * scale); T = 1 in greedy rows."""
    return LOG2_E / tl.where(temperature == 0.0, 1.0, tl.maximum(temperature, COLDEST))


@triton.jit
def finite(top):
    """A maximum, or 0 where all was -inf: z - top is then never NaN for z = -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def tile_stats_kernel(
    logits, temperatures, tile_max, tile_sum, vocab, tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of TILES tiles of one row."""
    let_next_start(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    scale = scale_of(tl.load(temperatures + row))
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    column = tile * TILE + tl.arange(0, TILE)[None, :]
    wait_for_previous(DEPENDENT)
    z = tl.load(logits + row * vocab + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(z, axis=1, keep_dims=True)
    total = tl.sum(tl.exp2((z - finite(top)) * scale), axis=1, keep_dims=True)
    tl.store(tile_max + row * tiles + tile, top, mask=tile < tiles)
    tl.store(tile_sum + row * tiles + tile, total, mask=tile < tiles)


@triton.jit
def uniform(seed, position):
    """52 random bits as float64, the same distance from 0 and from 1."""
    high, low, _, _ = tl.philox(seed, position, 0, 0, 0)
    return (high.to(tl.float64) * 1048576.0 + (low >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2**20, 2**-52


@triton.jit
def _relative_weights(z, top, scale, greedy):
    """exp((z - top) / T) in float32; in greedy rows 1 for what equals `top` and 0 for the others."""
    return tl.where(greedy, (z == top).to(tl.float32), tl.exp2((z - top) * scale))


@triton.jit
def _first_beyond(weights, target, SIZE: tl.constexpr):
    """(the first index that has weight and whose running sum exceeds `target`, target less the sum before it).

    Sums of different order round differently: entries without weight are left out by name, and where no sum reaches
    beyond the target it is the last index that has weight.
    """
    at = tl.arange(0, SIZE)
    beyond = (weights > 0) & (tl.cumsum(weights, axis=0) > target)
    last = tl.max(tl.where(weights > 0, at, 0), axis=0)
    index = tl.minimum(tl.min(tl.where(beyond, at, SIZE), axis=0), last)
    return index, target - tl.sum(tl.where(at < index, weights, 0.0), axis=0)


def _choose_token_name(specialization: Any) -> str:
    """Of the kernel as profilers show it: whether it embeds too."""
    return "choose_token_embed_kernel" if specialization.constants["HIDDEN"] else "choose_token_kernel"


@triton.jit(repr=_choose_token_name, do_not_specialize=["slots", "max_rows"])
def choose_token_kernel(
    logits, tile_max, tile_sum, temperatures, seeds, positions, tokens, ring, steps, table, stream, vocab, tiles, slots,
    max_rows, TILE: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: which group of tiles, which of its tiles, which of its entries; and what the next step must know.

    HIDDEN 0: nothing is embedded. COLUMNS is the power of two that holds them.
    """
    let_next_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    # The state was last written before this chain's first kernel started, so it need not be waited for.
    temperature = tl.load(temperatures + row)
    position = tl.load(positions + row)
    step = tl.load(steps + row)
    slot = (step % slots).to(tl.int64)
    greedy = temperature == 0.0
    scale = scale_of(temperature)
    # A greedy row draws among its equal maxima, at the lower end: the first of them.
    u = tl.where(greedy, 0.0, uniform(tl.load(seeds + row), position + 1))
    wait_for_previous(DEPENDENT)

    # Sums over groups first: a running sum over all tiles would take several times as many instructions.
    group_at = tl.arange(0, GROUPS)[:, None]
    at = tl.arange(0, GROUP)
    tile_at = group_at * GROUP + at[None, :]
    maxima = tl.load(tile_max + row * tiles + tile_at, mask=tile_at < tiles, other=float("-inf"))
    sums = tl.load(tile_sum + row * tiles + tile_at, mask=tile_at < tiles, other=0.0)
    top = finite(tl.max(maxima))
    weights = (_relative_weights(maxima, top, scale, greedy) * sums).to(tl.float64)
    by_group = tl.sum(weights, axis=1)
    group, rest = _first_beyond(by_group, u * tl.sum(by_group, axis=0), GROUPS)
    weights = tl.sum(tl.where(group_at == group, weights, 0.0), axis=0)
    tile, rest = _first_beyond(weights, rest, GROUP)
    share = rest / tl.sum(tl.where(at == tile, weights, 0.0), axis=0)

    first = (group * GROUP + tile) * TILE
    column = first + tl.arange(0, TILE)
    z = tl.load(logits + row * vocab + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    weights = _relative_weights(z, finite(tl.max(z, axis=0)), scale, greedy).to(tl.float64)
    entry, _ = _first_beyond(weights, share * tl.sum(weights, axis=0), TILE)

    token = tl.where(position >= 0, first + entry, 0)
    if HIDDEN > 0:  # asked for first: it comes while the others are stored
        hidden_at = tl.arange(0, COLUMNS)
        embedded = tl.load(table + token.to(tl.int64) * HIDDEN + hidden_at, mask=hidden_at < HIDDEN)
    tl.store(tokens + row, token)
    tl.store(ring + slot * max_rows + row, token)
    tl.store(positions + row, tl.where(position >= 0, position + 1, position))
    tl.store(steps + row, step + 1)
    if HIDDEN > 0:
        tl.store(stream + row * HIDDEN + hidden_at, embedded, mask=hidden_at < HIDDEN)


def tile_stats(
    logits: Tensor, temperatures: Tensor, *, dependent: bool = False, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """(tile_max, tile_sum) of `logits`; shapes as in this module's docstring. A tile that is all -inf has sum 0.

    ValueError if the arguments do not fit.
    """
    rows, vocab = _check_logits(logits)
    check_like("temperatures", temperatures, (rows,), logits, torch.float32)
    if not runs_triton(logits):
        return tile_stats_reference(logits, temperatures)
    launch = launch or default_launch(rows)
    depends = dependent and can_depend(logits.device)
    tiles = -(-vocab // TILE)
    tile_max = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    tile_sum = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    if tile_max.numel() > 0:
        tile_stats_kernel[(-(-tiles // launch.tiles), rows)](
            logits, temperatures, tile_max, tile_sum, vocab, tiles,
            TILE=TILE, TILES=launch.tiles, DEPENDENT=depends,
            num_warps=launch.num_warps, **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip
    return tile_max, tile_sum


def choose_token(
    logits: Tensor,
    tile_max: Tensor,
    tile_sum: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
    ring: Tensor,
    steps: Tensor,
    embedding: tuple[Tensor, Tensor] | None = None,
    *,
    dependent: bool = False,
) -> None:
    """Draw each row's next token and advance the decode state in place; shapes as in this module's docstring, and

    tokens [rows] int32               := the drawn token (0 in padding rows)
    positions                         += 1, but in padding rows
    ring [slots, max_rows] int32      ring[steps % slots, row] := the drawn token; pinned host memory, or the device's
    steps [rows] int32 or int64       += 1 in every row: each row counts its own launches, so that no two programs
                                      share a counter; whoever reads the ring counts along
    embedding (table, stream)         stream[row] := table[the drawn token]; None: nothing is embedded

    With dependent launches no kernel of the chain but this one may write temperatures, seeds, positions or steps.
    ValueError if the arguments do not fit.
    """
    rows, vocab = _check_logits(logits)
    tiles = -(-vocab // TILE)
    check_like("tile_max", tile_max, (rows, tiles), logits, torch.float32)
    check_like("tile_sum", tile_sum, (rows, tiles), logits, torch.float32)
    check_like("temperatures", temperatures, (rows,), logits, torch.float32)
    check_like("seeds", seeds, (rows,), logits, torch.int64)
    check_like("positions", positions, (rows,), logits, torch.int32)
    check_like("tokens", tokens, (rows,), logits, torch.int32)
    check_integers("steps", steps, (rows,), logits)
    _check_ring(ring, logits)
    table, stream = embedding or (None, None)
    if table is not None and stream is not None:
        _check_embedding(table, stream, logits)
    if not runs_triton(logits):
        choose_token_reference(
            logits, tile_max, tile_sum, temperatures, seeds, positions, tokens, ring, steps, embedding
        )
        return
    depends = dependent and can_depend(logits.device)
    hidden = 0 if table is None else table.shape[1]
    if rows > 0:
        choose_token_kernel[(rows,)](
            logits, tile_max, tile_sum, temperatures, seeds, positions, tokens, ring, steps, table, stream,
            vocab, tiles, *ring.shape,
            TILE=TILE, GROUPS=max(2, triton.next_power_of_2(-(-tiles // GROUP))), GROUP=GROUP, HIDDEN=hidden,
            COLUMNS=triton.next_power_of_2(max(1, hidden)), DEPENDENT=depends, num_warps=CHOOSE_WARPS,
            **({"launch_pdl": True} if depends else {}),
        )  # fmt: skip


def _check_logits(logits: Tensor) -> tuple[int, int]:
    check_float("logits", logits, 2)
    rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("logits must have at least one column.")
    return rows, vocab


def _check_ring(ring: Tensor, logits: Tensor) -> None:
    if ring.dim() != 2 or ring.shape[0] == 0 or ring.shape[1] < len(logits):
        raise ValueError(f"ring must have shape (slots, at least {len(logits)}), not {tuple(ring.shape)}.")
    if ring.dtype != torch.int32 or not ring.is_contiguous():
        raise ValueError(f"ring must be contiguous int32, not {ring.dtype} of strides {ring.stride()}.")
    if ring.device != logits.device and not ring.is_pinned():
        raise ValueError(f"ring must lie in pinned host memory or on {logits.device}.")


def _check_embedding(table: Tensor, stream: Tensor, logits: Tensor) -> None:
    check_float("table", table, 2)
    rows, vocab = logits.shape
    if table.shape[0] < vocab or table.device != logits.device:
        raise ValueError(f"table must have a row for each of {vocab} tokens on {logits.device}, not {table.shape[0]}.")
    check_like("stream", stream, (rows, table.shape[1]), table)


def tile_stats_saved_bytes(rows: int, vocab: int, element_bytes: int) -> int:
    """The second read of the logits, for the sum once the maximum is known."""
    return rows * vocab * element_bytes


def choose_token_saved_bytes(rows: int, vocab: int) -> int:
    """The write and read of float32 probabilities, or of the noise that an exponential race draws."""
    return 2 * rows * vocab * 4


TILE_STATS = Fusion("tile_stats", ("sample",), tile_stats, tile_stats_reference, tile_stats_saved_bytes)
CHOOSE_TOKEN = Fusion(
    "choose_token", ("sample", "sample+embed"), choose_token, choose_token_reference, choose_token_saved_bytes
)
