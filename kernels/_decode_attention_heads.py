"""What the ways of `decode_attention` share: loading, norm and rotation of heads, and where keys lie."""

from __future__ import annotations

from kernels._triton import tl, triton


@triton.jit
def load_head(source, mask, COUNT: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [COUNT * SLOTS, WIDTH] as [COUNT, SLOTS, WIDTH].

    Triton (3.6 and 3.7 differ) spreads the dimensions of a load over threads by its own rules; of two, as one wants it:
    16 bytes of a row for each thread, then whole rows, and rows that lie SLOTS apart in the same thread.
    """
    return tl.reshape(tl.load(source, mask=mask, other=0.0), [COUNT, SLOTS, WIDTH])


@triton.jit
def rotated(x, partner, gamma, gamma_partner, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads [n, D]; float32, rounded as the cache stores it.

    An element of one half of a head turns with its `partner` in the other; `sin` bears the sign.
    """
    turned_x = x.to(tl.float32)
    turned_y = partner.to(tl.float32)
    if gamma is not None:
        scale = tl.rsqrt(tl.sum(turned_x * turned_x, axis=1) / HEAD_DIM + eps)[:, None]
        turned_x = turned_x * scale * gamma.to(tl.float32)
        turned_y = turned_y * scale * gamma_partner.to(tl.float32)
    return (turned_x * cos + turned_y * sin).to(x.dtype).to(tl.float32)


@triton.jit
def rotated_halves(low, high, gamma_low, gamma_high, cos, sin, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads whose halves are apart, [n, SLOTS, D / 2] each; float32, not rounded."""
    x = low.to(tl.float32)
    y = high.to(tl.float32)
    if gamma_low is not None:
        scale = tl.expand_dims(tl.rsqrt(tl.sum(x * x + y * y, axis=2) / HEAD_DIM + eps), 2)
        x = x * scale * gamma_low.to(tl.float32)
        y = y * scale * gamma_high.to(tl.float32)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def places_of(table, last, start, n, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile's keys start + n lie in the cache: of its first key where one block holds them all, else of each.

    The index into the table is bounded instead of masked by the length: the first look-up need not wait for the length.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        position = start
    else:
        position = start + n
    block = tl.load(table + tl.minimum(position // BLOCK_SIZE, last))
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def pivot_of(peak):
    """What to subtract before exp2: a peak of -inf (no key seen yet) would give NaN, 0 gives weights of 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)
