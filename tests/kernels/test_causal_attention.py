"""causal_attention against float64: each prompt by itself, with PyTorch's own attention."""

import sys
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import FUSIONS, INTERPRETED, causal_attention
from kernels.causal_attention import Launch, best_launch, default_launch
from kernels.choices import none_chosen

MODULE = sys.modules["kernels.causal_attention"]


class Case:
    """Prompts of `lengths` tokens, then `padding` rows."""

    def __init__(self, lengths, padding, heads, kv_heads, dim, dtype, device, randn):
        self.lengths, tokens = lengths, sum(lengths) + padding
        self.q = randn(tokens, heads, dim, dtype=dtype)
        self.k, self.v = randn(tokens, kv_heads, dim, dtype=dtype), randn(tokens, kv_heads, dim, dtype=dtype)
        positions = [*(p for length in lengths for p in range(length)), *[0] * padding]
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        self.scale = 1.5 * dim**-0.5

    def run(self, function, **options) -> Tensor:
        return function(self.q, self.k, self.v, self.positions, self.scale, **options)

    def expected(self) -> Tensor:
        """Of the prompts' rows, in float64."""
        outs, start = [], 0
        for length in self.lengths:
            rows = slice(start, start := start + length)
            mine = [x[rows].double().transpose(0, 1) for x in (self.q, self.k, self.v)]
            out = scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True, scale=self.scale)
            outs.append(out.transpose(0, 1))
        return torch.cat(outs)


# (lengths, padding, heads, kv_heads, head_dim): one prompt over several tiles, several in a tile, padding, odd heads
CASES = [
    ((1,), 0, 2, 1, 16),
    ((75,), 0, 4, 2, 32),
    ((5, 17, 1, 40), 0, 2, 2, 16),
    ((50,), 21, 3, 1, 24),
    ((20, 19), 9, 7, 1, 10),
]
LAUNCHES = [None, Launch(16, 16, 4, 2), Launch(8, 32, 4, 2)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, launch, dtype, device, randn, assert_close):
    made = Case(*case, dtype, device, randn)
    o = made.expected()
    ours = made.run(causal_attention, launch=launch)
    assert_close(ours[: len(o)], o)
    assert torch.isfinite(ours).all()  # rows of padding too: they go on through the layers
    assert_close(made.run(FUSIONS["causal_attention"].reference)[: len(o)], o)


def test_keys_of_a_joint_projection(dtype, device, randn, assert_close):
    """Tokens of k and v lie apart, with others' numbers between them."""
    made = Case((30, 12), 3, 4, 2, 16, dtype, device, randn)
    joint = torch.stack([randn(45, 4, 16, dtype=dtype), torch.cat([made.k, made.v], 1)], 1).flatten(1, 2)
    made.k, made.v = joint[:, 4:6], joint[:, 6:]
    assert not made.k.is_contiguous()
    assert_close(made.run(causal_attention, launch=Launch(16, 16, 4, 2))[:42], made.expected())


def test_far_scores(device, randn, assert_close):
    """The greatest score is a row's first key or its last one, by far more than exp can hold."""
    made = Case((40,), 0, 2, 1, 16, torch.float32, device, randn)
    made.scale = 60.0
    assert_close(made.run(causal_attention, launch=Launch(16, 16, 4, 1)), made.expected())


def test_no_rows(device, randn):
    assert Case((), 0, 2, 1, 16, torch.float32, device, randn).run(causal_attention).shape == (0, 2, 16)


def test_wrong_arguments(device, randn):
    with pytest.raises(ValueError, match="2 kv heads cannot be shared evenly by 3"):
        Case((3,), 0, 3, 2, 16, torch.float32, device, randn).run(causal_attention)
    made = Case((3,), 0, 2, 1, 16, torch.float32, device, randn)
    made.v = made.v.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2]
    with pytest.raises(ValueError, match=r"v must have shape \(3, 1, 16\), not \(3, 1, 8\)"):
        made.run(causal_attention)
    made.v = made.k[:2]
    with pytest.raises(ValueError, match=r"v must have shape \(3, 1, 16\)"):
        made.run(causal_attention)
    made = Case((3,), 0, 2, 1, 16, torch.float32, device, randn)
    made.positions = made.positions[:2]
    with pytest.raises(ValueError, match=r"positions must have shape \(3,\)"):
        made.run(causal_attention)
    made = Case((3,), 0, 2, 1, 16, torch.float32, device, randn)
    with pytest.raises(ValueError, match="scale must be a number above zero, not 1e-50"):
        causal_attention(made.q, made.k, made.k, made.positions, 1e-50)


def test_default_launch_suits_the_heads():
    """Rows enough for the instruction, and under 96 KiB of keys, values and queries."""
    for head_dim, group, size in ((128, 2, 2), (128, 8, 2), (64, 1, 2), (256, 1, 2), (128, 4, 4)):
        launch = default_launch(head_dim, group, size)
        assert launch.block_t * group >= 16
        tiles = launch.block_t * group + 2 * launch.num_stages * launch.block_n
        assert tiles * head_dim * size <= 96 * 1024


def test_unknown_gpus_have_no_choice():
    assert best_launch(16, 8, 128, 1024, 1024, torch.bfloat16, torch.device("cpu")) is None


def test_measured_choices_serve_up_to_their_size(monkeypatch):
    measured = {"16/8x128 tokens 2048 of at most 1024": {"launch": asdict(Launch(8, 16, 1, 4))}}
    monkeypatch.setattr(MODULE, "chosen", lambda kernel, key, device: measured.get(key))
    of = torch.bfloat16, torch.device("cpu")
    assert best_launch(16, 8, 128, 2048, 1024, *of) == best_launch(16, 8, 128, 1025, 513, *of) == Launch(8, 16, 1, 4)
    for heads, tokens, longest in ((16, 1024, 1024), (16, 2049, 1024), (16, 2048, 1025), (8, 2048, 1024)):
        assert best_launch(heads, 8, 128, tokens, longest, *of) is None
    assert best_launch(16, 8, 128, 2048, 1024, torch.float32, torch.device("cpu")) is None


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", [(1024,), (1000, 17, 300), (4095,)], ids=str)
def test_real_heads(lengths, device, randn, assert_close):
    with none_chosen():
        made = Case(lengths, 5, 16, 8, 128, torch.bfloat16, device, randn)
        for launch in (None, Launch(64, 128, 8, 2), Launch(32, 64, 4, 3)):
            ours = made.run(causal_attention, launch=launch)
            assert_close(ours[: sum(lengths)], made.expected())
