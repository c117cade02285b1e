"""Baseline latency per layer, and the memory that batches and lengths need."""

from __future__ import annotations

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, model, rows_of, run_of, runs
from scripts.tables.traces import KEYS, WHOLE_LAYER, keys_of, of_shape

BATCHES = (1, 8, 32, 64, 128, 256)
LENGTHS = (128, 512, 1024, 2048, 4096)
GIB = 2**30


@table("layer-times")
def layer_times(folder: str = REFERENCE, engines: str = "vllm,nano,fused") -> str:
    """µs of one whole layer inside decode graphs: the median over iterations and layers, and the range of layers."""
    found = runs(folder)
    cells: dict[tuple[str, int, int, int], dict[str, str]] = {}
    for engine in engines.split(","):
        run = run_of(found, engine)
        layers = rows_of(found.layers, run)
        for shape in run["shapes"]:
            whole = of_shape(layers, shape, "graph")
            whole = whole[whole["op"] == WHOLE_LAYER]
            if len(whole):
                each = whole.groupby("layer_index")["latency_us"].median()
                text = f"{each.median():.1f} ({each.min():.1f} to {each.max():.1f})"
                cells.setdefault(keys_of(shape), {})[engine] = text
    place = {name: KEYS.index(name) for name in ("batch_size", "context_len")}
    rows = [
        [str(key[place["batch_size"]]), str(key[place["context_len"]]), *(of.get(e, "") for e in engines.split(","))]
        for key, of in cells.items()
    ]
    return markdown(["batch", "context", *(f"{engine}, µs" for engine in engines.split(","))], rows, left=0)


@table("memory-need")
def memory_need(name: str = "qwen3-0.6b") -> str:
    """GiB of a model's matrices and cache for each batch and length, bfloat16, blocks of 256 tokens filled."""
    config = model(name)
    layers = config.num_layers * config.layer_weight_bytes
    weights = layers + config.vocab_size * config.hidden_size * config.element_bytes
    token = config.num_layers * config.layer_token_bytes
    rows = []
    for batch in BATCHES:
        needs = [weights + batch * -(-length // 256) * 256 * token for length in LENGTHS]
        rows.append([str(batch), *(f"{need / GIB:.2f}" for need in needs)])
    return markdown(["batch", *(f"{length} tokens each" for length in LENGTHS)], rows, left=0)
