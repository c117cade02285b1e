"""prefill_attention against float64: each sequence by itself, with PyTorch's own attention."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import FUSIONS, prefill_attention
from kernels.prefill_attention import fits
from tests.kernels.test_qk_norm_rope_cache import EPS, angles, expected_heads

MODULE = sys.modules["kernels.prefill_attention"]
BLOCK = 16


class Case:
    """Prompts of `lengths` tokens, then `padding` rows; some slots are not written."""

    def __init__(self, lengths, padding, heads, kv_heads, dim, dtype, device, randn, norm=True):
        self.lengths, self.sizes = lengths, (heads, kv_heads, dim)
        tokens = sum(lengths) + padding
        self.qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, scale=2)
        self.gammas = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if norm else (None, None)
        self.table = angles(dim, device)
        positions = [*(p for length in lengths for p in range(length)), *[0] * padding]
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        blocks = tokens // BLOCK + 2
        slots = torch.randperm(blocks * BLOCK)[:tokens].to(torch.int32)
        slots[sum(lengths) :] = -1
        self.slots = slots.to(device)
        self.caches = [randn(blocks, BLOCK, kv_heads, dim, dtype=dtype) for _ in range(2)]

    def run(self, function):
        caches = [cache.clone() for cache in self.caches]
        scale = self.sizes[2] ** -0.5
        o = function(
            self.qkv, *self.gammas, self.table, self.positions, self.slots, *caches, *self.sizes, EPS, scale
        )  # fmt: skip
        return o, caches

    def expected(self):
        """(attention of the prompts' rows, rotated keys, values), in float64."""
        heads, kv_heads, dim = self.sizes
        q, k, v = self.qkv.view(len(self.qkv), -1, dim).split([heads, kv_heads, kv_heads], dim=1)
        rotated = [expected_heads(x, g, self.table, self.positions) for x, g in zip((q, k), self.gammas, strict=True)]
        outs, start = [], 0
        for length in self.lengths:
            rows = slice(start, start := start + length)
            mine = [x[rows].double().transpose(0, 1) for x in (*rotated, v)]
            out = scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(0, 1).flatten(1))
        return torch.cat(outs), rotated[1], v


# (lengths, padding, heads, kv_heads, head_dim)
CASES = [
    ((1,), 0, 2, 1, 16),
    ((5, 17, 1), 0, 4, 2, 16),
    ((33,), 7, 3, 1, 24),
    ((20, 19), 9, 7, 1, 10),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_values_and_cache(case, norm, dtype, device, randn, assert_close, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK_N", 32 if dtype is torch.float32 else 16)
    made = Case(*case, dtype, device, randn, norm)
    o, k, v = made.expected()
    ours, caches = made.run(prefill_attention)
    assert_close(ours[: len(o)], o)
    assert torch.isfinite(ours).all()  # rows of padding too: they go on through the layers
    theirs, their_caches = made.run(FUSIONS["prefill_attention"].reference)
    assert_close(theirs[: len(o)], o)
    written = made.slots >= 0
    flat = made.slots[written].long()
    for cache, other, before, values in zip(caches, their_caches, made.caches, (k, v), strict=True):
        slots = cache.flatten(0, 1)
        assert_close(slots[flat], values[written])
        assert_close(slots[flat], other.flatten(0, 1)[flat].double())
        untouched = torch.ones(len(slots), dtype=torch.bool, device=device)
        untouched[flat] = False
        assert torch.equal(slots[untouched], before.flatten(0, 1)[untouched])


def test_wrong_arguments(device, randn):
    made = Case((3,), 0, 3, 2, 16, torch.float32, device, randn)
    with pytest.raises(ValueError, match="cannot be shared evenly by 3"):
        made.run(prefill_attention)
    made = Case((3,), 0, 2, 1, 16, torch.float32, device, randn)
    made.slots = made.slots[:2]
    with pytest.raises(ValueError, match=r"slot_mapping must have shape \(3,\)"):
        made.run(prefill_attention)
    made = Case((), 0, 2, 1, 16, torch.float32, device, randn)
    assert made.run(prefill_attention)[0].shape == (0, 32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "taken_bytes"),
    [(16, 8, 128, 90_368), (32, 8, 128, 98_560), (12, 2, 128, 114_944), (64, 8, 128, 131_328), (8, 1, 256, 262_400)],
)
def test_programs_that_a_gpu_has_no_room_for_are_not_started(heads, kv_heads, head_dim, taken_bytes, monkeypatch):
    """`taken_bytes`: shared memory of programs compiled for sm_89 and sm_90."""
    for limit_bytes in (65_536, 101_376, 166_912, 232_448):  # of sm_75, 89, 80, 90
        monkeypatch.setattr(MODULE, "_shared_memory_bytes", lambda _device, limit_bytes=limit_bytes: limit_bytes)
        if fits(heads, kv_heads, head_dim, 2, torch.device("cuda")):
            assert taken_bytes <= limit_bytes
    assert fits(heads, kv_heads, head_dim, 2, torch.device("cuda")) == (head_dim == 128)
    assert fits(heads, kv_heads, head_dim, 4, torch.device("cpu"))
