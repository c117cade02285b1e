"""The result tables' columns: names, types, units and meaning, in one place.

Every table carries `schema_version` in its metadata, and every column its meaning (`description`) and, where it has
one, its `unit` in the field's metadata.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised whenever a column is removed, changes its meaning, or one is added that needs a value. A column that may be
null is added freely: in files from before it reads as null."""

_VERSION_KEY = b"schema_version"


def _column(name: str, kind: pa.DataType, description: str, *, unit: str = "", nullable: bool = False) -> pa.Field:
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


def _table(*columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()})


def version_of(schema: pa.Schema) -> str:
    """The `schema_version` that a file's schema carries, "" if none."""
    return (schema.metadata or {}).get(_VERSION_KEY, b"").decode(errors="replace")


_WHO = (
    _column("run_id", pa.string(), "The run that measured this row."),
    _column("engine", pa.string(), "Engine: vllm, nano, fused or hf."),
    _column("arm", pa.string(), "The engine's variant that ran, as the engine names it."),
)
_SHAPE = (
    _column("phase", pa.string(), "Kind of step: prefill, decode or mixed."),
    _column("batch_size", pa.int32(), "Sequences in the step."),
    _column("new_tokens", pa.int32(), "Tokens computed in the step, over all sequences.", unit="tokens"),
    _column("context_len", pa.int32(), "Mean tokens already in the cache per sequence.", unit="tokens"),
    _column("mode", pa.string(), "How the step ran: eager, graph or compiled."),
    _column("source", pa.string(), "What took the time: cuda_event, cupti or host."),
    _column("iteration", pa.int32(), "Number of the sample within its shape, from 0."),
)

LAYERS = _table(
    *_WHO,
    *_SHAPE,
    _column("layer_index", pa.int32(), "Decoder layer from 0; -1 for what lies outside the layers."),
    _column("block", pa.string(), "embed, attention, mlp, head, sample or step; layer for a whole decoder layer."),
    _column("op", pa.string(), "What ran, joined with + where one kernel does several; layer for a whole layer."),
    _column(
        "kernels", pa.string(), "Names of the GPU kernels that ran, joined with '; ', where the source knows them."
    ),
    _column(
        "start_us",
        pa.float64(),
        "Start, from the step's start on; of cupti from its first kernel's on, that of a kernel that waits included.",
        unit="us",
    ),
    _column(
        "latency_us",
        pa.float64(),
        "Duration; of cupti only what lies after the end of all kernels that started before, an op's without gaps. "
        "Layers include ops.",
        unit="us",
    ),
)
STEPS = _table(
    *_WHO,
    *_SHAPE,
    _column("wall_us", pa.float64(), "Host time of the whole step; null if it failed.", unit="us", nullable=True),
    _column("gpu_us", pa.float64(), "First to last traced GPU work; null if not traced.", unit="us", nullable=True),
    _column("host_us", pa.float64(), "Host time outside GPU work; null if not known.", unit="us", nullable=True),
    _column("instrumented", pa.bool_(), "Whether an instrument ran inside the step; its times are then overstated."),
    _column("status", pa.string(), "ok, or the reason why this shape has no time."),
)
REQUESTS = _table(
    *_WHO,
    _column("request_id", pa.string(), "Name of the request within its workload; at each rate anew."),
    _column("prompt_tokens", pa.int32(), "Length of the prompt.", unit="tokens"),
    _column("output_tokens", pa.int32(), "n, the number of tokens produced.", unit="tokens"),
    _column("arrival_s", pa.float64(), "When the request arrived, counted from the workload's start.", unit="s"),
    _column("ttft_ms", pa.float64(), "Time of first token - arrival; null if n = 0.", unit="ms", nullable=True),
    _column("tpot_ms", pa.float64(), "(last token - first token) / (n - 1); null if n < 2.", unit="ms", nullable=True),
    _column("itl_ms", pa.list_(pa.float64()), "The n - 1 gaps between one token and the next.", unit="ms"),
    _column("e2el_ms", pa.float64(), "Time of last token - arrival; null if n = 0.", unit="ms", nullable=True),
    _column("finish_reason", pa.string(), "length, stop or abort."),
    _column(
        "rate",
        pa.float64(),
        "Requests per second that were offered; null where all arrived at once.",
        unit="1/s",
        nullable=True,
    ),
)
HOST = _table(
    *_WHO,
    *_SHAPE,
    _column("host_phase", pa.string(), "schedule, prepare, launch, sample, finish; rest: mostly waiting for the GPU."),
    _column("latency_us", pa.float64(), "Host time of the phase in the step, without phases inside it.", unit="us"),
)
ROUNDS = _table(
    *_WHO,
    _column("metric", pa.string(), "step_ms, tpot_ms, generate_ms or output_tok_s: what `value` is, with its unit."),
    _column("phase", pa.string(), "prefill or decode; serve for a whole workload of requests."),
    _column("batch_size", pa.int32(), "Sequences at once; requests of a whole workload."),
    _column("tokens", pa.int32(), "Prompt tokens, or tokens in the cache of decode steps; 0: mixed.", unit="tokens"),
    _column("output_len", pa.int32(), "Tokens made for each sequence; 0: single steps, or mixed.", unit="tokens"),
    _column("launch", pa.int32(), "Number of the engine's process, from 0."),
    _column("round", pa.int32(), "Number of the round, from 0; rounds of one number ran next to each other."),
    _column("started_s", pa.float64(), "When the block began, counted from the comparison's start.", unit="s"),
    _column("samples", pa.int32(), "Steps or calls in the block, whose median is `value`; 0 if it failed."),
    _column("value", pa.float64(), "The block's median; null if it failed.", nullable=True),
    _column("status", pa.string(), "ok, or the reason why this block has no value."),
    _column(
        "throttled",
        pa.bool_(),
        "Whether the GPU held its clocks back at the block's end; null: not known.",
        nullable=True,
    ),
)
OPS = _table(
    _column("run_id", pa.string(), "The run that measured this row."),
    _column("op", pa.string(), "What was done, in the names that layers have."),
    _column("variant", pa.string(), "Who did it, a name of conf/op."),
    _column("shape", pa.string(), "Rows x rows of the weight x its columns."),
    _column("rows", pa.int32(), "Rows of the input: tokens of the step."),
    _column("dtype", pa.string(), "Of inputs, weights and output."),
    _column("mode", pa.string(), "graph: many calls in one CUDA graph; eager: calls in a row."),
    _column("source", pa.string(), "What took the time: cuda_event or host."),
    _column("iteration", pa.int32(), "Number of the turn within the shape, from 0; equal ones ran next to each other."),
    _column("latency_us", pa.float64(), "Time of one call; null if it failed.", unit="us", nullable=True),
    _column("bytes", pa.int64(), "Inputs, weights and output, each moved once.", unit="bytes"),
    _column("operations", pa.int64(), "Multiplications and additions of the product."),
    _column("saved_bytes", pa.int64(), "Of intermediate tensors, neither written nor read.", unit="bytes"),
    _column("error", pa.float64(), "Relative error to float32 throughout; null if it failed.", nullable=True),
    _column("status", pa.string(), "ok, or the reason why this variant has no time."),
)

TABLES: dict[str, pa.Schema] = {
    "layers": LAYERS, "steps": STEPS, "requests": REQUESTS, "host": HOST, "rounds": ROUNDS, "ops": OPS,
}  # fmt: skip
"""Table name (its file is `<name>.parquet`) to schema."""
