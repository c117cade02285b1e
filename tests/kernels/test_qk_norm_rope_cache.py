"""qk_norm_rope_cache against float64: heads, rotation, cache slots, and what must stay untouched."""

import sys

import pytest
import torch

from kernels import FUSIONS, qk_norm_rope_cache

MODULE = sys.modules["kernels.qk_norm_rope_cache"]
EPS = 1e-6
MAX_POS = 50


def angles(head_dim: int, device: torch.device, max_pos: int = MAX_POS) -> torch.Tensor:
    frequency = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float().to(device)


def expected_heads(x, gamma, cos_sin, positions):
    """Norm, then the rotation as multiplication of complex numbers (a + ib) e^{i angle}."""
    x = x.double()
    if gamma is not None:
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * gamma.double()
    half = x.shape[-1] // 2
    table = cos_sin[positions].double()[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(table[..., :half], table[..., half:])
    return torch.cat((turned.real, turned.imag), dim=-1)


# (tokens, heads, kv_heads, head_dim, block_size)
SHAPES = [(1, 4, 2, 16, 16), (3, 6, 1, 24, 256), (5, 3, 3, 10, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("heads_per_program", [2, 8])
def test_values_and_cache(shape, norm, heads_per_program, dtype, device, randn, assert_close, monkeypatch):
    monkeypatch.setattr(MODULE, "LAUNCHES", ((1 << 62, heads_per_program, 1),))
    tokens, heads, kv_heads, head_dim, block_size = shape
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, scale=2)
    q_weight, k_weight = (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype)) if norm else (None, None)
    cos_sin = angles(head_dim, device)
    positions = torch.randint(0, MAX_POS, (tokens,), device=device)
    blocks = tokens // block_size + 3
    slots = torch.randperm(blocks * block_size)[:tokens].to(device=device, dtype=torch.int32)
    if tokens > 2:
        slots[1] = -1
    noise = randn(2, blocks, block_size, kv_heads, head_dim, dtype=dtype)
    k_cache, v_cache = noise[0].clone(), noise[1].clone()
    kept = qkv.clone()

    arguments = (cos_sin, positions, slots)
    sizes = (heads, kv_heads, head_dim, EPS)
    q, k, v = qk_norm_rope_cache(qkv, q_weight, k_weight, *arguments, k_cache, v_cache, *sizes, return_kv=True)

    parts = kept.view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    assert q.shape == (tokens, heads, head_dim) and q.is_contiguous() and k.is_contiguous()
    assert_close(q, expected_heads(parts[0], q_weight, cos_sin, positions))
    assert_close(k, expected_heads(parts[1], k_weight, cos_sin, positions))
    assert torch.equal(v, parts[2]) and torch.equal(qkv, kept)

    flat = slots[slots >= 0].long()
    for cache, before, value in ((k_cache, noise[0], k), (v_cache, noise[1], v)):
        after = before.clone().view(-1, kv_heads, head_dim)
        after[flat] = value[slots >= 0]
        assert torch.equal(cache.view(-1, kv_heads, head_dim), after)

    their_caches = noise[0].clone(), noise[1].clone()
    reference = FUSIONS["qk_norm_rope_cache"].reference
    theirs = reference(qkv, q_weight, k_weight, *arguments, *their_caches, *sizes)
    assert_close(q, theirs)
    assert_close(k_cache, their_caches[0])
    assert torch.equal(v_cache, their_caches[1])


def test_only_q_is_returned_by_default(device, randn):
    qkv, cache = randn(2, 4 * 16), torch.zeros(1, 16, 1, 16, device=device)
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    slots = torch.full((2,), -1, dtype=torch.int32, device=device)
    q = qk_norm_rope_cache(qkv, None, None, angles(16, device), positions, slots, cache, cache.clone(), 2, 1, 16, EPS)
    assert torch.equal(q.view(2, -1), qkv[:, :32])  # position 0 turns nothing
    assert not cache.any()


def test_wrong_arguments(device, randn):
    qkv, gamma, cache = randn(2, 4 * 16), randn(16), randn(1, 16, 1, 16)
    positions, slots = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    table = angles(16, device)
    good = dict(
        qkv=qkv, q_weight=gamma, k_weight=gamma, cos_sin=table, positions=positions, slot_mapping=slots,
        k_cache=cache, v_cache=cache.clone(), num_heads=2, num_kv_heads=1, head_dim=16, eps=EPS,
    )  # fmt: skip
    for change, message in (
        ({"num_heads": 3}, "columns for its heads"),
        ({"k_weight": None}, "both be given, or neither"),
        ({"cos_sin": table.bfloat16()}, "cos_sin must be torch.float32"),
        ({"slot_mapping": slots[:1]}, r"slot_mapping must have shape \(2,\)"),
        ({"positions": positions.float()}, "positions must be int32 or int64"),
        ({"v_cache": cache.transpose(0, 1)}, "v_cache must have shape"),
        ({"head_dim": 15}, "head_dim must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            qk_norm_rope_cache(**{**good, **change})
