"""Which path runs, what is fused, and that the package does without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_use_is_undone_and_nests():
    x = torch.zeros(1, 2)
    with kernels.use("reference"):
        assert not kernels.runs_triton(x)
        with pytest.raises(RuntimeError), kernels.use("auto"):
            assert kernels.runs_triton(x) == kernels.INTERPRETED
            raise RuntimeError
        assert not kernels.runs_triton(x)
    with pytest.raises(ValueError, match="auto, reference, triton, not 'fast'"), kernels.use("fast"):
        pass


def test_cpu_tensors_run_the_reference_without_the_interpreter():
    code = """
import torch, kernels
print(kernels.INTERPRETED, kernels.silu_mul(torch.ones(1, 2)).item())
try:
    with kernels.use("triton"):
        kernels.silu_mul(torch.ones(1, 2))
except ValueError as error:
    print(error)
"""
    values, error = python(code).splitlines()
    assert values.startswith("False 0.731")
    assert error == "Triton kernels take CPU tensors only if TRITON_INTERPRET=1 was set before kernels' import."


def test_without_triton_the_references_run():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
print(kernels.HAVE_TRITON, kernels.silu_mul(torch.ones(1, 2)).item())
try:
    with kernels.use("triton"):
        kernels.silu_mul(torch.ones(1, 2))
except ValueError as error:
    print(error)
"""
    values, error = python(code).splitlines()
    assert values.startswith("False 0.731")
    assert "not installed" in error


def test_saved_bytes():
    """Qwen3-0.6B's shapes in bfloat16, one decoded token."""
    saved = {name: fusion.saved_bytes for name, fusion in kernels.FUSIONS.items()}
    assert saved["rms_norm_linear"](rows=1, hidden=1024, element_bytes=2) == 4096
    assert saved["rms_norm_linear"](rows=1, hidden=1024, element_bytes=2, residual=True) == 6144
    assert saved["rms_norm_gate_up_silu"](rows=2, hidden=1024, inter=3072, element_bytes=2) == 2 * (4096 + 24576)
    assert saved["silu_mul"](rows=3, inter=3072, element_bytes=2) == 3 * 12288
    heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "element_bytes": 2}
    assert saved["qk_norm_rope_cache"](tokens=1, **heads) == 2 * (24 + 8) * 256
    assert saved["qk_norm_rope_cache"](tokens=1, norm=False, **heads) == 2 * 8 * 256
    assert saved["prefill_gate_up"](rows=5, inter=3072, element_bytes=2) == 5 * 4 * 6144
    assert saved["prefill_qkv_rope"](rows=1, **heads) == 2 * 32 * 256 + 2 * (24 + 8) * 256
    assert saved["paged_attention"](queries=1, context=100, **heads) == 4 * 100 * 16 * 2 + 4 * 100 * 8 * 256
    assert all(fusion.function.__name__ == name for name, fusion in kernels.FUSIONS.items())
