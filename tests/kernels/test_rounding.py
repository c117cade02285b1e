"""bfloat16 as PyTorch rounds it, in kernels: what every other tolerance here takes for granted."""

import torch

from kernels import INTERPRETED
from kernels._triton import power_of_two, tl, triton


def copy_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size).to(y.dtype.element_ty), mask=at < size)


def test_float32_becomes_the_nearest_bfloat16(device, monkeypatch):
    """Ties to even, up into the next power of two, beyond the largest, subnormal: bit for bit. Then bits by chance."""
    known = {
        1 + 2**-9: 1.0, 1 + 2**-8: 1.0, 1 + 2**-8 + 2**-20: 1 + 2**-7, 1 + 3 * 2**-8: 1 + 2**-6,
        1.999: 2.0, -1.999: -2.0, 3.4e38: torch.inf, torch.inf: torch.inf, -0.0: -0.0, 2.0**-133: 2.0**-133, 1e-45: 0.0,
    }  # fmt: skip
    chance = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(list(known)), chance[~chance.isnan()], torch.tensor([torch.nan])]).to(device)
    y = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))  # read where a kernel is made
    triton.jit(copy_kernel)[(1,)](x, y, x.numel(), BLOCK=power_of_two(x.numel()))
    bits = y[:-1].view(torch.int16).tolist()
    assert bits[: len(known)] == torch.tensor(list(known.values())).bfloat16().view(torch.int16).tolist()
    assert bits == x[:-1].bfloat16().view(torch.int16).tolist()
    assert y[-1].isnan()
