"""The product of two tiles, as every kernel here uses it."""

from __future__ import annotations

from kernels._triton import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total):
    """total + a b in float32; float32 tiles at full precision, not TF32.

    Triton's interpreter (3.6 to 3.9) multiplies bfloat16's bit patterns as integers, so there both become float32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
