"""Every kernel compiles for the GPUs that count, in launches like an engine's, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
KERNELS = {
    "rms_norm_linear._vector_kernel", "rms_norm_linear._tiled_kernel", "qk_norm_rope_cache._kernel",
    "paged_attention._kernel", "paged_attention._combine", "silu_mul._kernel", "write_kv._kernel",
}  # fmt: skip


def test_kernels_compile():
    """In processes of their own: the interpreter's `triton.jit` of this one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), capability, str(shared_bytes)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for capability, shared_bytes in (("90", 227 * 1024), ("80", 163 * 1024))
    ]  # fmt: skip
    for process in processes:
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors[-4000:]
        compiled = {json.loads(line)["kernel"].removeprefix("kernels.") for line in output.splitlines()}
        assert compiled == KERNELS
