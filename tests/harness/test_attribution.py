"""Kernels laid to layers by their place, against recordings made on an H200 (Qwen3-0.6B, 28 layers, decode steps).

In the eager recordings a marker stood around each module, so the true site of each kernel is in them ("" where it was
launched outside all modules). Those of graphs and of vLLM have names and times only.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from engines.base import NO_LAYER, Site
from harness.attribution import NotDivisible, attribute, first_difference

RECORDED = Path(__file__).parents[1] / "assets" / "kernels"
LAYERS = 28

EAGER = [("nano", 1), ("nano", 256), ("fused", 1), ("fused", 32)]
GRAPHS = [("nano", 1), ("fused", 1), ("fused", 32), ("vllm", 1), ("vllm", 256)]


@cache
def recordings(engine: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{engine}.json").read_text())


def recorded(engine: str, kind: str, batch: int) -> tuple[list[str], dict[str, Any]]:
    """The names of a step's kernels in the order in which they ran, and the whole recording."""
    every = recordings(engine)
    (step,) = [s for s in every["steps"] if (s["kind"], s["batch"]) == (kind, batch)]
    return [every["names"][i] for i in step["kernels"]], step


def spelt(site: Site | None) -> str:
    assert site is not None
    return f"{site.layer_index} {site.block} {site.op}"


@pytest.mark.parametrize(("engine", "batch"), EAGER)
def test_places_are_the_markers_sites(engine: str, batch: int) -> None:
    names, step = recorded(engine, "eager", batch)
    truth = [recordings(engine)["sites"][i] for i in step["sites"]]
    found = attribute(names, LAYERS, qk_norm=True)
    marked = [i for i, site in enumerate(truth) if site]
    assert len(names) - len(marked) == 3  # copies: of the inputs, of the sampling settings, of the tokens
    assert [spelt(found[i]) for i in marked] == [truth[i] for i in marked]
    unmarked = [spelt(found[i]) for i in range(len(names)) if not truth[i]]
    assert unmarked == ["-1 step prepare", "-1 sample sample", "-1 step read_back"]


@pytest.mark.parametrize(("engine", "batch"), [("nano", 1), ("fused", 1), ("fused", 32)])
def test_a_graph_runs_the_sites_of_the_eager_step_in_its_order(engine: str, batch: int) -> None:
    """Kernels may be more: in graphs attention splits its work, and sums the parts in a kernel of its own."""
    in_graph, step = recorded(engine, "graph", batch)
    eager, _ = recorded(engine, "eager", batch)
    orders = [[site for site, _ in groupby(attribute(names, LAYERS, qk_norm=True))] for names in (in_graph, eager)]
    assert orders[0] == orders[1]
    assert len(in_graph) - len(eager) == LAYERS
    graph_launch = Counter(launches(step)).most_common(1)[0][0]
    inside = [
        s
        for s, number in zip(attribute(in_graph, LAYERS, True), launches(step), strict=True)
        if s and number == graph_launch
    ]
    assert {s.block for s in inside} == {"embed", "attention", "mlp", "head"}
    assert {s.op for s in inside if s.block == "head"} == {"final_norm"}


def launches(step: dict[str, Any]) -> list[int]:
    starts = set(step["launches_at"])
    number, numbers = -1, []
    for i in range(len(step["kernels"])):
        number += i in starts
        numbers.append(number)
    return numbers


@pytest.mark.parametrize(
    ("batch", "of_a_layer"),
    [
        (1, {"input_norm": 1, "qkv_proj": 1, "qk_norm+rope": 2, "kv_write": 1, "attention": 2, "o_proj": 1,
             "post_norm": 1, "gate_up_proj": 1, "silu_mul": 1, "down_proj": 2}),
        (256, {"input_norm": 1, "qkv_proj": 1, "qk_norm+rope": 2, "kv_write": 1, "attention": 2, "o_proj": 1,
               "post_norm": 1, "gate_up_proj": 1, "silu_mul": 1, "down_proj": 1}),
    ],
)  # fmt: skip
def test_layers_of_vllm_counted_by_hand(batch: int, of_a_layer: dict[str, int]) -> None:
    names, step = recorded("vllm", "graph", batch)
    sites = attribute(names, LAYERS, qk_norm=True)
    assert None not in sites
    inside = [s for s in sites if s is not None and s.layer_index != NO_LAYER]
    counts = Counter((s.layer_index, s.op) for s in inside)
    for layer in range(LAYERS):
        # The embedding's kernel also does layer 0's first norm.
        wanted = {op: n for op, n in of_a_layer.items() if layer or op != "input_norm"}
        assert {op: n for (index, op), n in counts.items() if index == layer} == wanted
    outside = Counter(spelt(s) for s in sites if s is not None and s.layer_index == NO_LAYER)
    assert outside["-1 embed embed+input_norm"] == outside["-1 head final_norm"] == 1
    assert (outside["-1 head lm_head"], outside["-1 sample sample"], outside["-1 step read_back"]) == (4, 9, 1)
    # The same work takes the same time in each layer.
    times = [
        sum(ns for s, ns in zip(sites, step["duration_ns"], strict=True) if s is not None and s.layer_index == layer)
        for layer in range(1, LAYERS)
    ]
    assert max(times) < 1.15 * min(times)


def test_attention_inside_layers_only() -> None:
    """vLLM plans attention before its graph; that kernel's name is attention's, its place is not."""
    names, _ = recorded("vllm", "graph", 1)
    sites = attribute(names, LAYERS, qk_norm=True)
    planned = [spelt(s) for name, s in zip(names, sites, strict=True) if "prepare_varlen" in name]
    assert planned == ["-1 step prepare"]


GEMM, NORM, FLASH = "nvjet_sm90", "triton_red_fused_mean_rsqrt_0", "void flash::fwd<cutlass::gemm::Shape>"
LAYER = [NORM, GEMM, NORM, "rotary_kernel", "reshape_and_cache", FLASH, GEMM, NORM, GEMM, "act_and_mul", GEMM]
START, END = ["Memcpy HtoD", "indexSelectSmallIndex"], [NORM, GEMM, "argmax", "Memcpy DtoH"]


def layer_ops(unit: list[str], qk_norm: bool = True) -> list[str]:
    """The ops of the second of three layers made of `unit`."""
    found = attribute(START + unit * 3 + END, 3, qk_norm)
    return [s.op for s in found if s is not None and s.layer_index == 1]


MIDDLE_CASES = {
    "all named": (["rms_norm", "rope", "kv_cache", FLASH], ["qk_norm", "rope", "kv_write", "attention"]),
    "one kernel, all but attention": (["_kernel", FLASH], ["qk_norm+rope+kv_write", "attention"]),
    "no name says anything": (["a", "b"], ["qk_norm+rope+kv_write+attention"] * 2),
    "left over": (["rms_norm", "_kernel", "kv_cache", FLASH], ["qk_norm", "rope", "kv_write", "attention"]),
    "done by the kernel before": (["rms_norm", "kv_cache", FLASH], ["qk_norm+rope", "kv_write", "attention"]),
    "one name, two ops": (["norm_rope", "kv_cache", FLASH], ["qk_norm+rope", "kv_write", "attention"]),
    "done by the nearest one before": (["rms_norm", "rope", FLASH], ["qk_norm", "rope+kv_write", "attention"]),
    "pieces of PyTorch": (
        ["at::native::pow", "rsqrt", "at::native::mul", "rope", "at::native::neg", "_kernel", FLASH],
        ["qk_norm", "qk_norm", "qk_norm+rope", "rope", "rope+kv_write+attention", "kv_write", "attention"],
    ),
}


@pytest.mark.parametrize(("names", "ops"), MIDDLE_CASES.values(), ids=MIDDLE_CASES.keys())
def test_between_qkv_and_o(names: list[str], ops: list[str]) -> None:
    assert layer_ops([NORM, GEMM, *names, *LAYER[6:]])[2:-5] == ops


def test_a_model_without_qk_norm_has_none() -> None:
    assert layer_ops([NORM, GEMM, "_kernel", FLASH, *LAYER[6:]], qk_norm=False)[2] == "rope+kv_write"


def test_what_has_no_kernel_joins_the_matrix_product_beside_it() -> None:
    assert layer_ops([GEMM, "_kernel", FLASH, GEMM, GEMM, GEMM]) == [
        "input_norm+qkv_proj", "qk_norm+rope+kv_write", "attention", "o_proj", "post_norm+gate_up_proj+silu_mul",
        "down_proj",
    ]  # fmt: skip
    assert layer_ops([GEMM] * 4)[0] == "input_norm+qkv_proj+qk_norm+rope+kv_write+attention"


def test_products_of_prefill_do_what_comes_after_them() -> None:
    """Whatever else runs for attention: a kernel before it is attention's too."""
    qkv, gate_up = "prefill_qkv_rope_kernel", "prefill_gate_up_kernel"
    assert layer_ops([NORM, qkv, "_kernel", FLASH, GEMM, NORM, gate_up, GEMM]) == [
        "input_norm", "qkv_proj+qk_norm+rope+kv_write", "attention", "attention", "o_proj", "post_norm",
        "gate_up_proj+silu_mul", "down_proj",
    ]  # fmt: skip
    assert layer_ops([NORM, qkv, FLASH, GEMM, NORM, GEMM, SILU, GEMM], False)[1:3] == [
        "qkv_proj+rope+kv_write", "attention",
    ]  # fmt: skip


EMBED_ROWS, LINEAR, ATTEND = "embed_rows_kernel", "decode_linear_vector_kernel", "decode_attention_kernel"
TILED, SILU, ADD = "decode_linear_tiled_kernel", "silu_mul_kernel", "at::native::elementwise<CUDAFunctor_add<BFloat16>>"
ATTENDED = "qk_norm+rope+kv_write+attention"
GATED = "post_norm+gate_up_proj+silu_mul"
DECODE_LAYERS = {
    "few rows": (
        [LINEAR, ATTEND, LINEAR, LINEAR, LINEAR],
        ["input_norm+qkv_proj", ATTENDED, "o_proj", GATED, "down_proj"],
    ),
    "many rows": (
        [NORM, GEMM, ATTEND, GEMM, NORM, GEMM, SILU, GEMM],
        ["input_norm", "qkv_proj", ATTENDED, "o_proj", "post_norm", "gate_up_proj", "silu_mul", "down_proj"],
    ),
    "gate_up by cuBLAS": (
        [TILED, ATTEND, TILED, NORM, GEMM, SILU, TILED],
        ["input_norm+qkv_proj", ATTENDED, "o_proj", "post_norm", "gate_up_proj", "silu_mul", "down_proj"],
    ),
    "all but gate_up by cuBLAS": (
        [NORM, GEMM, ATTEND, GEMM, TILED, GEMM],
        ["input_norm", "qkv_proj", ATTENDED, "o_proj", GATED, "down_proj"],
    ),
    "a norm that adds": (
        [LINEAR, ATTEND, GEMM, "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0", TILED, LINEAR],
        ["input_norm+qkv_proj", ATTENDED, "o_proj", "post_norm", "gate_up_proj+silu_mul", "down_proj"],
    ),
    "rotation apart": (
        [
            LINEAR,
            "qk_norm_rope_cache_kernel",
            "paged_attention_kernel",
            "paged_attention_combine_kernel",
            LINEAR,
            LINEAR,
            LINEAR,
        ],
        ["input_norm+qkv_proj", "qk_norm+rope+kv_write", "attention", "attention", "o_proj", GATED, "down_proj"],
    ),
}
DECODE_ENDS = {
    "one kernel": (
        ["decode_head_kernel", "choose_token_kernel"],
        ["-1 head final_norm+lm_head", "-1 sample sample"],
    ),
    "a product, then its sums": (
        [LINEAR, "tile_stats_kernel", "choose_token_kernel"],
        ["-1 head final_norm+lm_head", "-1 sample sample", "-1 sample sample"],
    ),
    "the next step's embedding too": (
        [LINEAR, "tile_stats_kernel", "choose_token_embed_kernel"],
        ["-1 head final_norm+lm_head", "-1 sample sample+embed", "-1 sample sample+embed"],
    ),
    "cuBLAS": (
        [NORM, GEMM, "tile_stats_kernel", "choose_token_kernel"],
        ["-1 head final_norm", "-1 head lm_head", "-1 sample sample", "-1 sample sample"],
    ),
}


@pytest.mark.parametrize(("end", "end_places"), DECODE_ENDS.values(), ids=DECODE_ENDS.keys())
@pytest.mark.parametrize(("unit", "ops"), DECODE_LAYERS.values(), ids=DECODE_LAYERS.keys())
def test_decode_steps_of_fused(unit: list[str], ops: list[str], end: list[str], end_places: list[str]) -> None:
    found = [spelt(site) for site in attribute([EMBED_ROWS, *unit * 3, *end], 3, True)]
    layers, outside = found[1 : -len(end)], [found[0], *found[-len(end) :]]
    assert [place.split()[::2] for place in layers] == [[str(layer), op] for layer in range(3) for op in ops]
    assert outside == ["-1 embed embed", *end_places]


@pytest.mark.parametrize("before", [[], ["Memcpy HtoD (Pinned -> Device)"]], ids=["nothing", "a copy"])
def test_a_decode_step_that_was_embedded_by_the_one_before(before: list[str]) -> None:
    """It begins with the first layer; block tables may go over first."""
    unit, ops = DECODE_LAYERS["few rows"]
    found = attribute([*before, *unit * 3, "decode_head_kernel", "choose_token_embed_kernel"], 3, True)
    assert [s.op for s in found if s] == ["prepare"] * len(before) + [*ops * 3, "final_norm+lm_head", "sample+embed"]
    normed = attribute(
        [*before, NORM, *[TILED, ATTEND, TILED, TILED, TILED] * 3, *["decode_head_kernel", "_"]], 3, True
    )
    assert spelt(normed[len(before)]) == "0 attention input_norm"


def test_a_sum_into_the_residual_stream_belongs_to_its_matrix_product() -> None:
    """Where the product after it does the norm; before a separate norm it is that norm's."""
    unit = [LINEAR, ATTEND, GEMM, ADD, TILED, GEMM, "cublasLt::splitKreduce_kernel", ADD]
    found = attribute([EMBED_ROWS, *unit * 2, "decode_head_kernel", "choose_token_kernel"], 2, True)
    ops = ["input_norm+qkv_proj", ATTENDED, "o_proj", "o_proj", GATED, *["down_proj"] * 3]
    assert [s.op for s in found if s] == ["embed", *ops * 2, "final_norm+lm_head", "sample"]
    assert layer_ops([NORM, GEMM, ATTEND, GEMM, ADD, NORM, GEMM, SILU, GEMM])[4:6] == ["post_norm", "post_norm"]


def test_fills_and_sums_belong_to_their_matrix_product() -> None:
    split = ["Memset (Device)", GEMM, "cublasLt::splitKreduce_kernel"]
    assert layer_ops([*LAYER[:-1], *split])[-4:] == ["silu_mul", "down_proj", "down_proj", "down_proj"]


def test_without_a_known_embedding_only_copies_before_the_layers_have_a_place() -> None:
    found = attribute(["Memcpy HtoD", "triton_red_fused_0", *LAYER[1:], *LAYER, *END], 2, True)
    assert (spelt(found[0]), found[1], spelt(found[2])) == ("-1 step prepare", None, "0 attention qkv_proj")
    found = attribute(["_plan", NORM, *LAYER[1:], *LAYER, *END], 2, True)
    assert (found[0], spelt(found[1])) == (None, "0 attention input_norm")


def test_a_head_that_norms_itself() -> None:
    found = attribute([*START, *LAYER * 2, GEMM, "argmax"], 2, True)
    assert [spelt(s) for s in found[-2:]] == ["-1 head final_norm+lm_head", "-1 sample sample"]


def test_a_norm_launched_op_by_op_holds_its_last_products() -> None:
    """They bear no norm's name; rows that are picked before the head's product count to it."""
    own = ["at::native::vectorized_elementwise_kernel<pow>", "at::native::reduce_kernel<MeanOps>",
           "at::native::elementwise_kernel<rsqrt>", "at::native::elementwise_kernel<MulFunctor>"]  # fmt: skip
    names = [*START, *LAYER * 2, *own, "at::native::indexSelectSmallIndex", "gemv", "sample"]
    found = [spelt(s) for s in attribute(names, 2, True)[-7:]]
    assert found == ["-1 head final_norm"] * 4 + ["-1 head lm_head"] * 2 + ["-1 sample sample"]


def test_a_delay_belongs_to_what_it_holds_up() -> None:
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    bare = attribute([*START, *LAYER * 2, *END], 2, True)
    slow = attribute([*START, *LAYER, spin, *LAYER, *END, spin], 2, True)
    assert (spelt(slow.pop(2 + len(LAYER))), spelt(slow.pop())) == ("1 attention input_norm", "-1 step read_back")
    assert slow == bare


def test_sequences_that_are_no_step() -> None:
    with pytest.raises(NotDivisible, match=r"13 matrix products make a step \(4 in each of 3 layers, .* and 9 were"):
        attribute(START + LAYER * 2 + END, 3, True)
    with pytest.raises(NotDivisible, match="13 .* and 0 were found among 0"):
        attribute([], 3, True)
    odd = [*LAYER[:6], "void flash::combine", *LAYER[6:]]
    with pytest.raises(
        NotDivisible, match="Layers 1 and 2 differ: kernel 6 of the one is o_proj, of the other attention"
    ):
        attribute(START + LAYER * 2 + odd + LAYER + END, 4, True)


def test_the_last_layer_may_pick_rows_and_take_other_kernels_for_them() -> None:
    pick = "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16>(...)"
    at = LAYER.index(GEMM) + 1
    o = LAYER.index(GEMM, at)
    first, attends, rest = LAYER[:at], LAYER[at:o], LAYER[o:]
    plain = attribute([*START, *LAYER * 3, *END], 3, True)[len(START) :]
    last = [*first, *attends[:-1], pick, attends[-1], pick, *rest, "cublasLt::splitKreduce_kernel"]
    found = attribute([*START, *LAYER * 2, *last, *END], 3, True)[len(START) :]
    assert found[: 2 * len(LAYER)] == plain[: 2 * len(LAYER)]
    ops = [s.op for s in plain[2 * len(LAYER) : 3 * len(LAYER)] if s]
    expected = [*ops[: o - 1], "attention", "attention", "o_proj", *ops[o:], "down_proj"]
    assert [s.op for s in found[2 * len(LAYER) : 2 * len(LAYER) + len(last)] if s] == expected
    assert {s.layer_index for s in found[2 * len(LAYER) : 2 * len(LAYER) + len(last)] if s} == {2}
    with pytest.raises(NotDivisible, match="Layers 0 and 1 differ"):  # but no layer before it
        attribute([*START, *LAYER, *last, *LAYER, *END], 3, True)
    few = [*first, *attends, pick, pick, LINEAR, LINEAR, LINEAR]  # a decode step's kernels for what is left
    found = attribute([*START, *LAYER * 2, *few, *END], 3, True)[len(START) + 2 * len(LAYER) :]
    assert [s.op for s in found[len(few) - 5 : len(few)] if s] == ["o_proj"] * 3 + [GATED, "down_proj"]


def test_the_first_layer_may_norm_by_itself() -> None:
    """Where each product leaves half of the next norm, nothing does so for the first."""
    unit = [TILED, ATTEND, TILED, TILED, TILED]
    found = attribute([EMBED_ROWS, NORM, *unit * 3, "decode_head_kernel", "choose_token_kernel"], 3, True)
    ops = [s.op for s in found if s]
    assert ops[1:3] == ["input_norm", "qkv_proj"] and ops[7] == ops[12] == "input_norm+qkv_proj"
    with pytest.raises(NotDivisible, match="Layers 1 and 2 differ"):
        attribute([EMBED_ROWS, *unit, NORM, *unit * 3, "decode_head_kernel", "choose_token_kernel"], 4, True)


def test_first_difference() -> None:
    assert first_difference(["a", "b"], ["a", "c"]) == (1, "b", "c")
    assert first_difference(["a"], ["a", "c"]) == (1, "nothing", "c")
