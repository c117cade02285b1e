"""Triton's interpreter, made to round as a GPU does."""

import numpy as np
import torch


def round_bfloat16() -> None:
    """float32 becomes bfloat16 by rounding to the nearest, ties to even: the interpreter (3.7) cuts the bits off.

    Cut-off values all lean towards zero, with twice the error. Kernels that round on their way (the residual stream)
    would then be compared with references that round otherwise, and a few outputs that nearly cancel could miss any
    fair tolerance by luck.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (float32, bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)

    InterpreterBuilder.cast_impl = cast
