"""What the tuners measured and chose for a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scripts.tables.registry import markdown, table
from scripts.tables.sources import ROOT

OPS = {
    "input_norm+qkv_proj": ("decode_linear", "{qkv}x{hidden}"),
    "o_proj, residual": ("decode_linear", "{hidden}x{wide}"),
    "post_norm+gate_up_proj+silu_mul": ("decode_linear", "gated {inter}x{hidden}"),
    "down_proj, residual": ("decode_linear", "{hidden}x{inter}"),
    "final_norm+lm_head": ("decode_head", "{vocab}x{hidden}"),
    "qk_norm+rope+kv_write+attention": ("decode_attention", "{heads}/{kv_heads}x{dim}"),
}
QWEN3_06B = {
    "hidden": 1024, "wide": 2048, "qkv": 4096, "inter": 3072, "vocab": 151936, "heads": 16, "kv_heads": 8, "dim": 128,
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
PREFILL_OPS = {
    "gate_up_proj+silu_mul": ("prefill_gate_up", "6144x1024", "`silu_mul`"),
    "qkv_proj+qk_norm+rope+kv_write": ("prefill_qkv_rope", "4096x1024", "`qk_norm_rope_cache`"),
}
"""By what is fused: the kernel, W's shape in Qwen3-0.6B, and what runs behind cuBLAS otherwise."""
PREFILL_ROWS = (512, 1024, 2048, 4096, 8192, 16384)


@table("decode-choices")
def decode_choices(gpu: str = "nvidia-h200") -> str:
    """Time of each decode kernel of Qwen3-0.6B at its chosen launch, beside the library's; the faster one in bold.

    What is used was chosen in a whole step, where it need not be the one that is faster by itself.
    """
    file = f"kernels/choices/{gpu}.json"
    measured = json.loads((ROOT / file).read_text())
    rows = []
    for op, (kernel, key) in OPS.items():
        for count in ROWS:
            entry = measured["choices"].get(kernel, {}).get(f"{key.format(**QWEN3_06B)} rows {count}")
            if entry is None:
                continue
            other = entry.get("cublas_us", entry.get("flash_attention_us"))
            ours = entry["us"]
            wins = other is None or ours <= other
            launch = entry.get("launch", {})
            how = {"cublas": "library", "prefill": "prefill's"}.get(entry.get("path", "")) or _how(launch, key)
            cells = [f"{ours:.1f}", "" if other is None else f"{other:.1f}"]
            cells[0 if wins else 1] = f"**{cells[0 if wins else 1]}**"
            rows.append([op, str(count), *cells, how])
    facts = measured["facts"]
    source = (
        f"µs per launch in a captured graph over the matrices (caches) of 28 layers, {facts['gpu']}, torch "
        f"{facts['torch']}, Triton {facts['triton']}, {_days(measured, OPS)}; ours launched dependently. The library "
        "is cuBLAS with separate norm and activation, for attention FlashAttention 3 after `qk_norm_rope_cache`; "
        f"contexts of 128 to 256 tokens. File: `{file}`, written by `python -m kernels.tune`."
    )
    return "\n\n".join([markdown(["op", "rows", "ours", "library", "used"], rows, left=1), source])


def _how(launch: Mapping[str, Any], key: str) -> str:
    """A launch in words; `key` ends with x and the columns of W."""
    how = launch.get("product", launch).get("kernel", "tensor cores" if launch.get("dot") else "")
    if "tiles" in launch:
        return "tiles, norm apart"
    if not launch.get("described"):
        return how
    k = int(key.format(**QWEN3_06B).rpartition("x")[2])
    held = launch["block_k"] * launch.get("split_k", 1) == k
    return f"{how}, W in shared memory" if held else f"{how}, a loop by descriptors"


@table("prefill-choices")
def prefill_choices(gpu: str = "nvidia-h200") -> str:
    """Time of prefill's fused products of Qwen3-0.6B at their chosen launch, beside cuBLAS with what runs behind it."""
    file = f"kernels/choices/{gpu}.json"
    measured = json.loads((ROOT / file).read_text())
    rows = []
    for op, (kernel, shape, behind) in PREFILL_OPS.items():
        out, k = map(int, shape.split("x"))
        for count in PREFILL_ROWS:
            entry = measured["choices"].get(kernel, {}).get(f"{shape} rows {count}")
            if entry is None:
                continue
            library = entry["cublas_us"]
            if "launch" not in entry:
                rows.append([op, f"{count:,}", "", f"**{library:.1f}**", "", "", f"cuBLAS, {behind}"])
                continue
            ours, launch = entry["us"], entry["launch"]
            tile = f"{launch['block_m']} × {launch['block_n']}, {launch['num_warps']} warps"
            rate = 2 * count * out * k / ours / 1e6
            rows.append(
                [op, f"{count:,}", f"**{ours:.1f}**", f"{library:.1f}", f"{ours / library:.2f}×", f"{rate:.0f}", tile]
            )
    source = (
        "µs per call in a captured graph over the matrices of 28 layers, each right after the other, "
        f"{measured['facts']['gpu']}, {_days(measured, PREFILL_OPS)}; a choice serves all steps of up to so many rows "
        "and of more than half as many. The library is cuBLAS with the kernel behind it. "
        f"File: `{file}`, written by `python -m kernels.tune`."
    )
    heads = ["op", "rows", "ours", "library", "ours / library", "TFLOP/s", "tile"]
    return "\n\n".join([markdown(heads, rows, left=1), source])


def _days(measured: dict[str, Any], ops: Mapping[str, tuple[str, ...]]) -> str:
    """When the choices of these ops' kernels were measured: a day, or the first and the last."""
    tables = [measured["choices"].get(kernel, {}) for kernel in {op[0] for op in ops.values()}]
    found = sorted(entry["date"] for table in tables for entry in table.values())
    return found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


@table("causal-choices")
def causal_choices(gpu: str = "nvidia-h200") -> str:
    """Time of attention of whole prompts at its fastest launch, beside FlashAttention 3; what runs is in bold."""
    file = f"kernels/choices/{gpu}.json"
    measured = json.loads((ROOT / file).read_text())
    rows = []
    for key, entry in measured["choices"].get("causal_attention", {}).items():
        heads, _, numbers = key.partition(" tokens ")
        if heads != "{heads}/{kv_heads}x{dim}".format(**QWEN3_06B):
            continue
        tokens, longest = map(int, numbers.split(" of at most "))
        ours, other = entry["us"], entry["flash_attention_us"]
        rate = 2 * 16 * 128 * tokens * (longest + 1) / min(ours, other) / 1e6
        cells = [f"{ours:.1f}", f"{other:.1f}"]
        at = 0 if "launch" in entry else 1
        cells[at] = f"**{cells[at]}**"
        rows.append([f"{tokens // longest} × {longest:,}", *cells, f"{ours / other:.2f}×", f"{rate:.0f}"])
    source = (
        f"µs per call in a captured graph, on the same queries, keys and values, {measured['facts']['gpu']}, "
        f"{_days(measured, {'': ('causal_attention',)})}; TFLOP/s of the faster one, of both products without what the "
        f"mask hides. File: `{file}`, written by `python -m kernels.tune`."
    )
    return "\n\n".join(
        [markdown(["prompts", "ours", "FlashAttention 3", "ours / its", "TFLOP/s"], rows, left=1), source]
    )
