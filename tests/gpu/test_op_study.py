"""Studies of single ops on a GPU: captured graphs give what is right, and find the L2 cold."""

from __future__ import annotations

import pytest
import torch

from harness.ops.products import QKV, Operands, Product, Vectors, expected, relative_error
from harness.ops.settings import Settings, op_conf, parse
from harness.ops.study import Study
from harness.ops.timing import Graph
from harness.ops.variants import Variant
from harness.results import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PRODUCT = Product(QKV, 1024, 4096, False, False, 1e-6, ("qwen3-0.6b",))


def test_every_variant_is_right_and_timed_in_a_graph(tmp_path) -> None:
    settings = parse(["rows=[1,64,300]", "max_iterations=20"])
    conf = op_conf(settings)
    record = Study(settings, conf, tmp_path / "s").run()
    assert record["failures"] == [] and record["verification"]["status"] == "passed"
    ops = load(tmp_path / "s").ops
    assert set(ops["mode"]) == {"graph"} and (ops["error"].between(1e-4, 1e-2)).all()
    assert {"torch", "torch_compile", "nano", "fused", "decode"} <= set(ops["variant"])
    assert "decode" not in set(ops.loc[ops["rows"] == 300, "variant"])


@torch.no_grad()
def test_rotations_make_a_product_slower_than_one_whose_weights_stay_in_the_cache() -> None:
    vectors = Vectors.random(PRODUCT, torch.bfloat16, "cuda", 0)
    conf = op_conf(Settings())
    call = Variant("fused", conf.variants["fused"], conf, "cuda").call(PRODUCT, vectors)
    times = {}
    for rotations in (1, 32):  # 8 MB and 268 MB
        operands = Operands.random(PRODUCT, 1, rotations, torch.bfloat16, "cuda", 0)
        graph = Graph(call, operands, 256 // rotations)
        for out, x, weight in zip(graph.run(), operands.x, operands.weights, strict=True):
            assert relative_error(out, expected(PRODUCT, x, weight, vectors)) < 1e-2
        times[rotations] = min(graph.sample_us() for _ in range(20))
    assert times[32] > 1.1 * times[1]
