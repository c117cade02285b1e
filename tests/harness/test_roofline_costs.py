"""Bytes and operations: by hand on a small model, and against floors that were worked out elsewhere."""

from __future__ import annotations

import pytest

from engines.base import BLOCKS, OPS
from harness.config import compose
from harness.roofline.costs import FLOWS, LAYER, Cost, Load, Shapes, cost, layer_cost, step_cost

# 3 query heads on 1 key/value head of 4: q 12, k and v 4 each
SMALL = Shapes(
    hidden_size=8, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=4, intermediate_size=10, vocab_size=50
)
DECODE = Load(batch_size=3, new_tokens=3, context_len=5)
PREFILL = Load(batch_size=2, new_tokens=14, context_len=0)

READ, MATRIX = 4.34e12, 815e12
"""Read bandwidth and bf16 matrix rate of one H200, with which the floors below were computed."""


def qwen3() -> Shapes:
    return Shapes.of(vars(compose(["model=qwen3-0.6b"]).model))


@pytest.mark.parametrize(
    ("op", "elements", "other_bytes"),
    [  # read + written
        ("embed", 8 + 8, 8),  # the table's row and its copy; the id
        ("input_norm", (8 + 8) + (8 + 8), 0),
        ("qk_norm", (12 + 4) + (12 + 4), 0),
        ("rope", (12 + 4) + (12 + 4), 0),
        ("kv_write", (4 + 4) + (4 + 4), 0),
        ("silu_mul", 20 + 10, 0),
        ("post_norm", (8 + 8) + (8 + 8), 0),
        ("final_norm", (8 + 8) + (8 + 8), 0),
        ("sample", 50, 8),
        ("prepare", 0, 8),
        ("read_back", 0, 8),
    ],
)
def test_an_op_without_a_matrix_reads_and_writes_each_row_once(op: str, elements: int, other_bytes: int) -> None:
    assert cost(SMALL, op, DECODE).bytes == 3 * (2 * elements + other_bytes)
    assert cost(SMALL, op, DECODE).flop == 0


@pytest.mark.parametrize(
    ("op", "out", "inside"),
    [("qkv_proj", 20, 8), ("o_proj", 8, 12), ("gate_up_proj", 20, 8), ("down_proj", 8, 10), ("lm_head", 50, 8)],
)
def test_a_product_reads_rows_and_matrix_and_writes_rows(op: str, out: int, inside: int) -> None:
    found = cost(SMALL, op, DECODE)
    assert (found.weight_bytes, found.activation_bytes) == (2 * out * inside, 2 * 3 * (inside + out))
    assert found.flop == 2 * 3 * out * inside
    assert cost(SMALL, op, PREFILL).flop == 2 * (2 if op == "lm_head" else 14) * out * inside


def test_attention_by_hand() -> None:
    found = cost(SMALL, "attention", DECODE)
    assert found.activation_bytes == 3 * 2 * (12 + 12)
    assert found.cache_bytes == 3 * (5 + 1) * 2 * (4 + 4)  # the new token sees itself
    assert found.flop == 3 * 3 * (5 + 1) * (2 * 4 + 2 * 4)  # per head and key: a score and a weighted value
    scores = sum(position + 1 for _ in range(2) for position in range(7))
    assert cost(SMALL, "attention", PREFILL).flop == 3 * scores * (2 * 4 + 2 * 4)
    behind_prefix = Load(batch_size=1, new_tokens=3, context_len=5)
    assert cost(SMALL, "attention", behind_prefix).flop == 3 * (6 + 7 + 8) * (2 * 4 + 2 * 4)


@pytest.mark.parametrize(
    ("op", "elements"),
    [  # of activations, read + written
        ("input_norm+qkv_proj", (8 + 8) + (8 + 20)),  # the normalised row stays inside, the sum goes on
        ("qk_norm+rope", (12 + 4) + (12 + 4)),
        ("qk_norm+rope+kv_write", (12 + 4 + 4) + 12),  # keys and values go to the cache only
        ("qkv_proj+qk_norm+rope+kv_write", 8 + 12),
        ("kv_write+attention", (4 + 4 + 12) + 12),
        ("gate_up_proj+silu_mul", 8 + 10),
        ("post_norm+gate_up_proj+silu_mul", (8 + 8) + (8 + 10)),
        ("down_proj+input_norm", (10 + 8) + (8 + 8)),  # of the next layer
        ("final_norm+lm_head", (8 + 8) + (8 + 50)),
    ],
)
def test_a_fused_op_keeps_what_is_used_up_inside(op: str, elements: int) -> None:
    assert cost(SMALL, op, DECODE).activation_bytes == 3 * 2 * elements


@pytest.mark.parametrize(
    ("op", "elements"),
    [  # of activations, read + written
        ("input_norm", 8 + 8),
        ("input_norm+qkv_proj", 8 + 20),
        ("o_proj", (12 + 8) + 8),
        ("post_norm+gate_up_proj+silu_mul", 8 + 10),
        ("down_proj", (10 + 8) + 8),
        ("final_norm+lm_head", 8 + 50),
        ("silu_mul", 20 + 10),
    ],
)
def test_products_that_add_to_the_stream_take_it_off_the_norms(op: str, elements: int) -> None:
    assert cost(SMALL, op, DECODE, products_add=True).activation_bytes == 3 * 2 * elements


def test_a_kernel_that_writes_and_attends_reads_no_new_token_back() -> None:
    token = 2 * (4 + 4)
    assert cost(SMALL, "kv_write", DECODE).cache_bytes == 3 * token
    assert cost(SMALL, "kv_write+attention", DECODE).cache_bytes == 3 * (5 + 1) * token


def test_the_embedding_starts_the_residual_stream() -> None:
    # reads ids and rows of the table; writes the stream, which the second norm reads, and the normalised rows
    assert cost(SMALL, "embed+input_norm", DECODE).bytes == 3 * (8 + 2 * 8 + 2 * (8 + 8))


def test_every_op_has_a_cost() -> None:
    assert set(FLOWS) == set(OPS)
    assert all(cost(SMALL, op, DECODE).bytes > 0 for op in OPS)
    assert len(LAYER) == 11 and not set(LAYER) & set(BLOCKS) - {"attention"}
    with pytest.raises(ValueError, match="no such op: spin"):
        cost(SMALL, "rope+spin", DECODE)


@pytest.mark.parametrize("load", [DECODE, PREFILL])
def test_a_layer_is_its_matrices_its_cache_and_its_rows(load: Load) -> None:
    found = layer_cost(SMALL, load)
    matrices = 20 * 8 + 8 * 12 + 20 * 8 + 8 * 10
    tokens = load.batch_size * load.context_len + load.new_tokens
    assert found.bytes == 2 * matrices + tokens * 2 * (4 + 4) + 2 * load.new_tokens * 4 * 8  # two streams in, two out
    assert found.flop == sum(cost(SMALL, op, load).flop for op in LAYER)


@pytest.mark.parametrize("load", [DECODE, PREFILL])
def test_a_step_is_the_sum_of_its_ops_without_the_traffic_between_them(load: Load) -> None:
    ops = [op for op in LAYER for _ in range(SMALL.num_layers)] + ["embed", "final_norm", "lm_head", "sample"]
    parts = sum((cost(SMALL, op, load) for op in ops), Cost())
    step = step_cost(SMALL, load)
    assert (step.weight_bytes, step.flop) == (parts.weight_bytes, parts.flop)
    # one by one, kv_write writes the new tokens and attention reads them again
    assert step.cache_bytes == parts.cache_bytes - SMALL.num_layers * load.new_tokens * 2 * (4 + 4)
    # ids in, tokens out, and the last sum that norms write
    assert step.activation_bytes == load.new_tokens * 8 + load.batch_size * (8 + 2 * 8)


def test_float32_doubles_what_is_no_id() -> None:
    wide = Shapes(**{**vars(SMALL), "element_bytes": 4})
    assert layer_cost(wide, DECODE).bytes == 2 * layer_cost(SMALL, DECODE).bytes
    assert step_cost(wide, DECODE).flop == step_cost(SMALL, DECODE).flop


def test_a_floor_is_the_larger_of_two_times() -> None:
    moved = Cost(weight_bytes=10, cache_bytes=20, activation_bytes=30, flop=60)
    assert moved.floor_us(bytes_per_s=30, flop_per_s=60) == pytest.approx(2e6)
    assert moved.floor_us(bytes_per_s=60, flop_per_s=20) == pytest.approx(3e6)


@pytest.mark.parametrize(
    ("batch_size", "floor_ms"), [(1, 0.280), (8, 0.315), (32, 0.437), (64, 0.599), (128, 0.924), (256, 1.574)]
)
def test_decode_floors_worked_out_elsewhere(batch_size: int, floor_ms: float) -> None:
    """From the bytes of weights, head and cache alone, mean context 192 (128 prompt tokens, 129 new ones)."""
    found = step_cost(qwen3(), Load(batch_size, batch_size, 192)).floor_us(READ, MATRIX) / 1e3
    assert found == pytest.approx(floor_ms, rel=0.01)


@pytest.mark.parametrize(
    ("batch_size", "tokens", "floor_ms"), [(1, 128, 0.28), (1, 1024, 1.26), (1, 4095, 6.8), (16, 1024, 20.1)]
)
def test_prefill_floors_worked_out_elsewhere(batch_size: int, tokens: int, floor_ms: float) -> None:
    found = step_cost(qwen3(), Load(batch_size, batch_size * tokens, 0)).floor_us(READ, MATRIX) / 1e3
    assert found == pytest.approx(floor_ms, rel=0.01)
