"""Compiles every launch that the public functions make for a GPU architecture, without a GPU; started by a test.

    python tests/kernels/compile_kernels.py 90 [shared bytes that one program may use]

Tensors are on torch's meta device; the launch stops after the compiler. The interpreter forgives what the compiler does
not: types that change in a loop, tiles too small for an instruction, more shared memory than a multiprocessor has.
Prints one JSON line per compiled kernel; `waits` says whether it waits for the kernel before it.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels
from kernels.decode_attention import workspace
from kernels.decode_attention_launch import Launch as AttentionLaunch
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_linear import decode_linear_half_norm
from kernels.decode_linear_launch import Launch
from kernels.prefill_linear import Launch as PrefillLaunch

META = torch.device("meta")


def compile_launches(capability: int, shared_limit: int) -> None:
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    run = JITFunction.run
    seen: set[str] = set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert all(0 < size <= (2**31 - 1, 65535, 65535)[axis] for axis, size in enumerate(grid)), grid
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            meta = kernel.metadata
            shared = meta.shared
            waits = "griddepcontrol.wait" in kernel.asm["ptx"]
            name = f"{self.__module__}.{self.__name__}"
            print(json.dumps({"kernel": name, "shared": shared, "waits": waits}), flush=True)
            assert shared <= shared_limit, f"{self.__name__} {kwargs} needs {shared} bytes of shared memory"
        return kernel

    JITFunction.run = compile_only
    for name, module in list(sys.modules.items()):  # a meta tensor's device does not tell what it stands for
        if name.startswith("kernels.") and hasattr(module, "can_depend"):
            module.can_depend = lambda device: capability >= 90
    with kernels.use("triton"):
        for rows in (1, 3, 16, 60, 100, 300):
            norm_linear(rows, 1024, 4096, 3072, torch.bfloat16, residual=rows != 3)
        norm_linear(7, 100, 33, 37, torch.float16, residual=True)
        norm_linear(300, 100, 33, 37, torch.float32, residual=True)
        rotary(1, torch.bfloat16, norm=True)
        rotary(2000, torch.float32, norm=False)
        # (sequences, queries each, heads, kv_heads, head_dim, block_size, splits)
        attention(torch.bfloat16, 1, 1, 16, 8, 128, 256, 16)
        attention(torch.bfloat16, 64, 1, 12, 2, 128, 16, 1)
        attention(torch.bfloat16, 4, 10, 32, 8, 64, 32, 1)
        attention(torch.bfloat16, 16, 1024, 16, 8, 128, 256, 1)
        attention(torch.float16, 1, 300, 2, 1, 256, 16, 1)
        attention(torch.float32, 2, 1, 4, 2, 20, 64, 4)
        k = torch.empty(5, 2, 24, dtype=torch.bfloat16, device=META)
        cache = torch.empty(2, 16, 2, 24, dtype=torch.bfloat16, device=META)
        kernels.write_kv(k, k, cache, cache, torch.empty(5, dtype=torch.int32, device=META))
        kernels.silu_mul(torch.empty(3, 200, dtype=torch.bfloat16, device=META), dependent=True)
        for rows, hidden, dtype in ((128, 1024, torch.bfloat16), (4096, 1024, torch.bfloat16), (3, 100, torch.float16)):
            x = torch.empty(rows, hidden, dtype=dtype, device=META)
            kernels.rms_norm(x, x[0], 1e-6, dependent=True)
        for tokens in (1, 64, 128, 256):
            prefill_attention(tokens, 16, 8, 128, torch.bfloat16, norm=True)
        prefill_attention(200, 64, 8, 128, torch.bfloat16, norm=True)
        prefill_attention(200, 4, 4, 256, torch.bfloat16, norm=True)
        prefill_attention(40, 14, 2, 64, torch.float16, norm=False)
        prefill_attention(9, 4, 4, 20, torch.float32, norm=True)
        for head_dim, dtype in ((128, torch.bfloat16), (128, torch.float32), (80, torch.float16)):
            causal_attention(300, 16, 8, head_dim, dtype)
        # A prefill's products with their ends: as on any GPU, and as a GPU with descriptors goes from tile to tile.
        for gate_up, qkv in (
            (None, None),
            (PrefillLaunch(128, 128, 64, 8, 3), PrefillLaunch(128, 256, 64, 8, 3)),
            (
                PrefillLaunch(64, 128, 64, 4, 2, per_sm=0, pieces=2),
                PrefillLaunch(64, 256, 64, 4, 2, per_sm=0),
            ),
        )[: 3 if capability >= 90 else 1]:
            prefill_products(4095, 1024, 3072, 16, 8, 128, torch.bfloat16, gate_up, qkv)
        prefill_products(300, 100, 33, 14, 2, 64, torch.float16, None, None)
        prefill_products(300, 896, 4864, 14, 2, 64, torch.float32, None, None)
        # A decode step's products: norm and gate, residual, a norm in halves, and a sum over K in parts.
        for rows in (1, 16, 64, 256):
            decode_linear(rows, 1024, 4096, torch.bfloat16, norm=True)
            decode_linear(rows, 1024, 2 * 3072, torch.bfloat16, norm=True, gated=True)
            decode_linear(rows, 3072, 1024, torch.bfloat16, residual=True)
        split = Launch("tiled", 32, 128, 4, block_m=16, num_stages=4, split_k=2)
        decode_linear(16, 3072, 1024, torch.bfloat16, residual=True, launch=split)
        described = Launch("tiled", 32, 256, 4, block_m=64, split_k=4, described=True)
        norm_in_halves(64, 2048, 1024, 3072, torch.bfloat16, None, described)
        looped = Launch("tiled", 64, 64, 8, block_m=128, num_stages=4, split_k=2, described=True)
        norm_in_halves(256, 2048, 1024, 3072, torch.bfloat16, looped, looped)
        for rows in (16, 128):
            held = Launch("tiled", 64, 256, 4, block_m=min(rows, 64), split_k=8)
            norm_in_halves(rows, 2048, 1024, 3072, torch.bfloat16, held, None)
            norm_in_halves(rows, 2048, 1024, 3072, torch.bfloat16, None, split)
        norm_in_halves(20, 100, 33, 37, torch.float32, None, None)
        passes = Launch("matrix", 16, 512, 16, block_m=16, registers=128)
        decode_linear(64, 3072, 1024, torch.bfloat16, residual=True, launch=passes)
        decode_linear(2, 100, 34, torch.float32, norm=True, gated=True)
        decode_linear(20, 100, 34, torch.float16, norm=True)
        for rows in (1, 16, 64, 256):
            decode_attention(torch.bfloat16, rows, 16, 8, 128, 256)
        decode_attention(
            torch.bfloat16, 8, 16, 8, 128, 256, AttentionLaunch(64, 4, 64, 2, True, num_stages=3, held=True)
        )
        decode_attention(torch.float16, 3, 12, 2, 128, 16)
        decode_attention(torch.float32, 2, 4, 2, 20, 64)
        head_and_sample(1, torch.bfloat16)
        head_and_sample(16, torch.bfloat16)
        head_and_sample(3, torch.float16)
        # Of many rows: W's rows first and x's, from tile to tile and not, and by pointers where a row is of odd length.
        head_and_sample(17, torch.bfloat16, PrefillLaunch(32, 256, 64, 8, 3))
        head_and_sample(256, torch.bfloat16, PrefillLaunch(128, 128, 64, 8, 4))
        head_and_sample(60, torch.float16, PrefillLaunch(64, 256, 64, 4, 3, per_sm=0))
        head_and_sample(9, torch.float32, PrefillLaunch(16, 128, 32, 4, 2, per_sm=0))
        head_and_sample(9, torch.bfloat16, PrefillLaunch(16, 128, 32, 4, 2), vocab=1001)


def norm_linear(rows: int, hidden: int, out: int, inter: int, dtype: torch.dtype, residual: bool) -> None:
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    other = new(rows, hidden) if residual else None
    bias = None if residual else new(out)
    kernels.rms_norm_linear(new(rows, hidden), new(hidden), new(out, hidden), 1e-6, bias, other)
    kernels.rms_norm_gate_up_silu(new(rows, hidden), new(hidden), new(2 * inter, hidden), 1e-6, other)


def rotary(tokens: int, dtype: torch.dtype, norm: bool) -> None:
    gamma = torch.empty(128, dtype=dtype, device=META) if norm else None
    cache = torch.empty(4, 256, 8, 128, dtype=dtype, device=META)
    kernels.qk_norm_rope_cache(
        torch.empty(tokens, 32 * 128, dtype=dtype, device=META), gamma, gamma,
        torch.empty(4096, 128, device=META), torch.empty(tokens, dtype=torch.int64, device=META),
        torch.empty(tokens, dtype=torch.int32, device=META), cache, cache, 16, 8, 128, 1e-6, return_kv=norm,
        dependent=True,
    )  # fmt: skip


def attention(
    dtype: torch.dtype, sequences: int, queries: int, heads: int, kv_heads: int, head_dim: int, block_size: int,
    splits: int,
) -> None:  # fmt: skip
    cache = torch.empty(8, block_size, kv_heads, head_dim, dtype=dtype, device=META)
    kernels.paged_attention(
        torch.empty(sequences * queries, heads, head_dim, dtype=dtype, device=META), cache, cache,
        torch.empty(sequences, 16, dtype=torch.int32, device=META),
        torch.empty(sequences + 1, dtype=torch.int32, device=META),
        torch.empty(sequences, dtype=torch.int32, device=META), queries, 0.1, num_splits=splits,
    )  # fmt: skip


def prefill_attention(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, norm: bool
) -> None:  # fmt: skip
    gamma = torch.empty(head_dim, dtype=dtype, device=META) if norm else None
    cache = torch.empty(4, 256, kv_heads, head_dim, dtype=dtype, device=META)
    numbers = torch.empty(tokens, dtype=torch.int32, device=META)
    kernels.prefill_attention(
        torch.empty(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=META), gamma, gamma,
        torch.empty(4096, head_dim, device=META), numbers, numbers, cache, cache, heads, kv_heads, head_dim, 1e-6, 0.1,
        dependent=True,
    )  # fmt: skip


def causal_attention(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q = torch.empty(tokens, heads, head_dim, dtype=dtype, device=META)
    positions = torch.empty(tokens, dtype=torch.int32, device=META)
    kernels.causal_attention(q, q[:, :kv_heads].contiguous(), q[:, :kv_heads], positions, 0.1, dependent=True)


def prefill_products(
    rows: int, hidden: int, inter: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
    gate_up: PrefillLaunch | None, qkv: PrefillLaunch | None,
) -> None:  # fmt: skip
    """Without q and k norms, and with a bias, where there is no launch."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    x, out = new(rows, hidden), (heads + 2 * kv_heads) * head_dim
    kernels.prefill_gate_up(x, new(2 * inter, hidden), gate_up, dependent=True)
    gamma, bias = (new(head_dim), None) if qkv else (None, new(out))
    cache = new(4, 256, kv_heads, head_dim)
    numbers = torch.empty(rows, dtype=torch.int32, device=META)
    kernels.prefill_qkv_rope(
        x, new(out, hidden), gamma, gamma, torch.empty(4096, head_dim, device=META), numbers, numbers, cache, cache,
        heads, kv_heads, head_dim, 1e-6, bias, return_kv=bias is None, launch=qkv,
        dependent=True,
    )  # fmt: skip


def decode_linear(
    rows: int, k: int, weight_rows: int, dtype: torch.dtype, norm: bool = False, gated: bool = False,
    residual: bool = False, launch: Launch | None = None,
) -> None:  # fmt: skip
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    kernels.decode_linear(
        new(rows, k), new(weight_rows, k), norm_weight=new(k) if norm else None, eps=1e-6, gated=gated,
        residual=new(rows, weight_rows) if residual else None, dependent=True, launch=launch,
    )  # fmt: skip


def norm_in_halves(
    rows: int, k: int, hidden: int, inter: int, dtype: torch.dtype, first: Launch | None, second: Launch | None
) -> None:  # fmt: skip
    """A product that leaves half a norm, and the gated one that takes it."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    half = decode_linear_half_norm(
        new(rows, k), new(hidden, k), new(rows, hidden), new(hidden), dependent=True, launch=first
    )
    kernels.decode_linear(half, new(2 * inter, hidden), eps=1e-6, gated=True, dependent=True, launch=second)


def decode_attention(
    dtype: torch.dtype, rows: int, heads: int, kv_heads: int, head_dim: int, block_size: int,
    launch: AttentionLaunch | None = None,
) -> None:  # fmt: skip
    gamma = torch.empty(head_dim, dtype=dtype, device=META)
    cache = torch.empty(8, block_size, kv_heads, head_dim, dtype=dtype, device=META)
    kernels.decode_attention(
        torch.empty(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=META), gamma, gamma,
        torch.empty(4096, head_dim, device=META), torch.empty(rows, dtype=torch.int32, device=META),
        torch.empty(rows, 4096 // block_size, dtype=torch.int32, device=META), cache, cache,
        heads, kv_heads, head_dim, 1e-6, 0.1, workspace=workspace(rows, heads, head_dim, META), dependent=True,
        launch=launch,
    )  # fmt: skip


def head_and_sample(rows: int, dtype: torch.dtype, tiles: PrefillLaunch | None = None, vocab: int = 1000) -> None:
    """A decode step's ends: the tokens' embeddings, then head, sums and choice, with the next embeddings or without."""
    hidden = 1024
    table = torch.empty(vocab, hidden, dtype=dtype, device=META)
    tokens, steps, positions = (torch.empty(rows, dtype=torch.int32, device=META) for _ in range(3))
    temperatures = torch.empty(rows, device=META)
    x = kernels.embed_rows(tokens, table, dependent=True)
    norm_weight = torch.empty(hidden, dtype=dtype, device=META)
    logits, *stats = kernels.decode_head(
        x, norm_weight, table, 1e-6, temperatures, dependent=True, launch=HeadLaunch(tiles=tiles) if tiles else None
    )
    kernels.tile_stats(logits, temperatures, dependent=True)
    for embedding in (None, (table, x)):
        kernels.choose_token(
            logits, *stats, temperatures, torch.empty(rows, dtype=torch.int64, device=META), positions, tokens,
            torch.empty(4, rows, dtype=torch.int32, device=META), steps, embedding, dependent=True,
        )  # fmt: skip


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]), int(sys.argv[2]))
