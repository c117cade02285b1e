"""How large the key/value cache is."""

from __future__ import annotations

from scripts.tables.registry import InputError, markdown, table
from scripts.tables.sources import MODELS, REFERENCE, model, run_of, runs

BLOCK = 256
"""nano's default block size in tokens."""
SEQUENCE = 4096
GIB, MIB = 2**30, 2**20


@table("cache-bytes")
def cache_bytes() -> str:
    """Per model: cache bytes of a token, a block and a sequence, and the tokens in one GiB."""
    rows = []
    for name in MODELS:
        config = model(name)
        token = config.token_bytes
        shape = f"{config.num_layers} × {config.num_kv_heads} × {config.head_dim}"
        sizes = [f"{token * BLOCK / MIB:.2f}", f"{token * SEQUENCE / MIB:,.0f}", f"{GIB // token:,}"]
        rows.append([name, shape, f"{token:,}", *sizes])
    head = [
        "model", "layers × kv heads × head dim", "bytes per token", f"MiB per block of {BLOCK}",
        f"MiB per {SEQUENCE:,} tokens", "tokens per GiB",
    ]  # fmt: skip
    return markdown(head, rows, left=2)


@table("cache-size")
def cache_size(folder: str = REFERENCE, engine: str = "nano") -> str:
    """How a committed run's engine split the GPU's memory."""
    run = run_of(runs(folder), engine)
    config = model(run["model"])
    if run["dtype"] != "bfloat16":
        raise InputError(f"Table cache-size counts bfloat16, but the run of {engine} has {run['dtype']}.")
    total = run["provenance"]["gpu"]["memory_mib"]
    share = run["limits"]["gpu_memory_utilization"]
    tokens, block = run["capacity"]["kv_cache_tokens"], run["notes"]["block_size"]
    token = config.token_bytes
    cached = tokens * token / MIB
    rows = [
        ["the GPU's memory", f"{total:,}"],
        [f"{share:.0%} of it", f"{total * share:,.0f}"],
        [f"cache: {tokens // block:,} blocks × {block} tokens × {token:,} bytes", f"{cached:,.0f}"],
        ["left for weights, the largest step, graphs and CUDA itself", f"{total * share - cached:,.0f}"],
    ]
    caption = f"{run['provenance']['gpu']['name']}, {run['model']}, engine {engine}; run in `{folder}`."
    return markdown([caption, "MiB"], rows)


@table("memory-beside")
def memory_beside(folder: str = REFERENCE, engines: str = "nano,fused") -> str:
    """What engines hold in their latency runs beside the model's matrices and the cache, in MiB."""
    found, rows = runs(folder), []
    for engine in engines.split(","):
        run = run_of(found, engine)
        config = model(run["model"])
        tokens = run["capacity"]["kv_cache_tokens"]
        known = config.weight_bytes + tokens * config.token_bytes
        held = [shape["timed"]["memory"] for shape in run["shapes"] if "memory" in shape.get("timed", {})]
        most = {name: max(memory[name] for memory in held) for name in held[0]}
        beside = [most[f"{name}_bytes"] - known for name in ("allocated", "peak_allocated", "reserved", "device_used")]
        rows.append([engine, f"{tokens:,}", *(f"{size / MIB:,.0f}" for size in beside)])
    head = ["engine", "tokens in the cache", "before a step", "in its largest step", "kept by PyTorch", "on the device"]
    source = (
        "MiB beside the matrices (a tied embedding once) and the cache, the most of a run's shapes; the first two "
        f"of PyTorch's tensors, the last with CUDA's own. Runs: `{folder}`."
    )
    return "\n\n".join([markdown(head, rows), source])
