"""write_kv: every slot holds its token, everything else is as it was."""

import pytest
import torch

from kernels import write_kv


def test_slots_and_strided_rows(dtype, device, randn):
    """k and v are views into a wider qkv, as engines have them."""
    qkv = randn(5, 4, 24, dtype=dtype)
    k, v = qkv[:, :1], qkv[:, 2:3]
    noise = randn(2, 3, 16, 1, 24, dtype=dtype)
    k_cache, v_cache = noise.clone()
    slots = torch.tensor([40, -1, 3, 16, 0], dtype=torch.int32, device=device)
    write_kv(k, v, k_cache, v_cache, slots)
    for cache, before, value in ((k_cache, noise[0], k), (v_cache, noise[1], v)):
        expected = before.flatten(0, 1).clone()
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot] = value[token]
        assert torch.equal(cache.flatten(0, 1), expected)


def test_wrong_arguments(randn, device):
    k, cache = randn(2, 1, 16), randn(1, 16, 1, 16)
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="v_cache must have shape"):
        write_kv(k, k, cache, cache[:, :, :, :8], slots)
    with pytest.raises(ValueError, match=r"slot_mapping must have shape \(2,\)"):
        write_kv(k, k, cache, cache.clone(), slots[:1])
    with pytest.raises(ValueError, match="side by side"):
        write_kv(randn(2, 1, 32)[..., ::2], k, cache, cache.clone(), slots)
