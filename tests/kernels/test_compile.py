"""Every kernel compiles for the GPUs that count, in launches like an engine's, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
DEPENDENT = {
    "causal_attention.causal_attention_kernel",
    "decode_attention.decode_attention_kernel",
    "decode_linear_matrix.decode_linear_matrix_kernel",
    "decode_head.decode_head_kernel",
    "decode_head_tiles.decode_head_tiles_kernel",
    "decode_linear_tiled.decode_linear_tiled_kernel",
    "decode_linear_vector.decode_linear_vector_kernel",
    "embed_rows.embed_rows_kernel",
    "prefill_attention.prefill_attention_kernel",
    "prefill_gate_up.prefill_gate_up_kernel",
    "prefill_qkv_rope.prefill_qkv_rope_kernel",
    "qk_norm_rope_cache.qk_norm_rope_cache_kernel",
    "rms_norm.rms_norm_kernel",
    "sample.choose_token_kernel",
    "sample.tile_stats_kernel",
    "silu_mul.silu_mul_kernel",
}
"""Kernels of a decode step or a small prefill, which wait for one another where the GPU can."""
KERNELS = DEPENDENT | {
    "paged_attention.paged_attention_combine_kernel",
    "paged_attention.paged_attention_kernel",
    "rms_norm_linear.rms_norm_linear_tiled_kernel",
    "rms_norm_linear.rms_norm_linear_vector_kernel",
    "write_kv.write_kv_kernel",
}


def test_kernels_compile():
    """In processes of their own: the interpreter's `triton.jit` of this one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    processes = {
        capability: subprocess.Popen(
            [sys.executable, str(SCRIPT), capability, str(shared_bytes)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability, shared_bytes in (("90", 227 * 1024), ("80", 163 * 1024))
    }  # fmt: skip
    for capability, process in processes.items():
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-4000:]
        compiled = [json.loads(line) for line in output.splitlines()]
        assert {kernel["kernel"].removeprefix("kernels.") for kernel in compiled} == KERNELS
        for kernel in compiled:
            depends = capability == "90" and kernel["kernel"].removeprefix("kernels.") in DEPENDENT
            assert kernel["waits"] == depends, (capability, kernel)
