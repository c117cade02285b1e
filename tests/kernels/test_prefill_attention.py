"""prefill_attention against float64: each sequence by itself, with PyTorch's own attention."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import FUSIONS, prefill_attention
from kernels.prefill_attention import Launch, default_launch, fits
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
        self.table = angles(dim, device, max([1, *lengths]))
        positions = [*(p for length in lengths for p in range(length)), *[0] * padding]
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        blocks = tokens // BLOCK + 2
        slots = torch.randperm(blocks * BLOCK)[:tokens].to(torch.int32)
        slots[sum(lengths) :] = -1
        self.slots = slots.to(device)
        self.caches = [randn(blocks, BLOCK, kv_heads, dim, dtype=dtype) for _ in range(2)]

    def run(self, function, **how):
        caches = [cache.clone() for cache in self.caches]
        scale = self.sizes[2] ** -0.5
        o = function(
            self.qkv, *self.gammas, self.table, self.positions, self.slots, *caches, *self.sizes, EPS, scale,
            **how,
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
@pytest.mark.parametrize("tiles", ["one", "several"])
def test_values_and_cache(case, norm, tiles, dtype, device, randn, assert_close):
    made = Case(*case, dtype, device, randn, norm)
    several = Launch(block_t=16, block_n=32 if dtype is torch.float32 else 16, num_warps=4)
    check(made, assert_close, launch=several if tiles == "several" else None)


def check(made, assert_close, **how):
    o, k, v = made.expected()
    ours, caches = made.run(prefill_attention, **how)
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
        untouched = torch.ones(len(slots), dtype=torch.bool, device=slots.device)
        untouched[flat] = False
        assert torch.equal(slots[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize(
    "lengths", [(127,), (128,), (129,), (64, 64), (100, 40), (3, 130)], ids=lambda lengths: "+".join(map(str, lengths))
)
def test_steps_about_as_long_as_a_tile(lengths, device, randn, assert_close):
    """Prompts that end in the first tile, with it, or behind it, and begin in the midst of one."""
    check(Case(lengths, 3, 8, 1, 16, torch.float16, device, randn), assert_close)


def test_a_slot_that_is_not_to_be_written(device, randn, assert_close):
    """Of a row in the midst of a prompt: it is a key of later rows all the same."""
    made = Case((40,), 0, 2, 1, 16, torch.float16, device, randn)
    made.slots[7] = -1
    check(made, assert_close)


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 8), (32, 8), (14, 2), (64, 8), (2, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 16, 100, 128, 256])
def test_programs_of_the_default_launch_fit_the_gpu_at_once_where_they_can(heads, kv_heads, tokens):
    launch = default_launch(tokens, heads, kv_heads, 128, 2)
    rows = launch.block_t * (1 << (heads // kv_heads - 1).bit_length())
    assert 16 <= rows <= MODULE.MOST_ROWS  # a tensor core's tile, and what a program can hold
    assert -(-tokens // launch.block_t) * kv_heads <= MODULE.PROGRAMS or rows == MODULE.MOST_ROWS


def test_wrong_arguments(device, randn):
    with pytest.raises(ValueError, match="block_n must be a power of two, not 24"):
        Launch(16, 24, 4)
    with pytest.raises(ValueError, match="8 tokens of a group of heads are less than 16 rows"):
        Case((3,), 0, 2, 2, 16, torch.float32, device, randn).run(prefill_attention, launch=Launch(8, 16, 4))
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
    [(16, 8, 128, 73_728), (32, 8, 128, 81_920), (12, 2, 128, 73_728), (64, 8, 128, 81_920), (8, 1, 256, 75_776)],
)
def test_programs_that_a_gpu_has_no_room_for_are_not_started(heads, kv_heads, head_dim, taken_bytes, monkeypatch):
    """`taken_bytes`: shared memory of the largest programs compiled for sm_90."""
    for limit_bytes in (65_536, 101_376, 166_912, 232_448):  # of sm_75, 89, 80, 90
        monkeypatch.setattr(MODULE, "_shared_memory_bytes", lambda _device, limit_bytes=limit_bytes: limit_bytes)
        if fits(heads, kv_heads, head_dim, 2, torch.device("cuda")):
            assert taken_bytes <= limit_bytes
        too_small_bytes = 65_536 if head_dim == 128 else 101_376
        assert fits(heads, kv_heads, head_dim, 2, torch.device("cuda")) == (limit_bytes > too_small_bytes)
    assert fits(heads, kv_heads, head_dim, 4, torch.device("cpu"))
