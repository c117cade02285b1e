"""Studies of single ops: the work against transformers and closed forms, turns, verdicts, and what a run holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from harness.config import compose
from harness.ops import study as study_module
from harness.ops import variants
from harness.ops.__main__ import BAD_INPUT, FAILED, OK, main
from harness.ops.products import GATE_UP, QKV, Operands, Product, Vectors, expected, products, relative_error
from harness.ops.settings import Settings, VariantConf, models, op_conf, parse
from harness.ops.study import Study
from harness.ops.table import crossovers
from harness.ops.timing import CACHE_FACTOR, MAX_CALLS, Loop, repeats_for, rotations_for
from harness.ops.variants import Variant
from harness.results import Runs, RunWriter, load
from harness.roofline import ceilings as ceilings_module
from harness.roofline.ceilings import Key, given
from harness.roofline.costs import Cost
from harness.slim import slim

FAST = ["model=tiny", "device=cpu", "min_iterations=3", "max_iterations=5"]
SMALL = Product(QKV, 24, 40, False, True, 1e-6, ("small",))
SMALL_GATED = Product(GATE_UP, 24, 16, True, False, 1e-6, ("small",))
CONF = op_conf(Settings())
HERE = ("torch", "nano", "fused", "decode")
"""Variants that every machine has and that need no compiler."""


def data(product: Product, rows: int) -> tuple[torch.Tensor, torch.Tensor, Vectors]:
    operands = Operands.random(product, rows, 2, torch.float32, "cpu", seed=3)
    return operands.x[1], operands.weights[1], Vectors.random(product, torch.float32, "cpu", seed=3)


@torch.no_grad()
def by_transformers(product: Product, x: torch.Tensor, weight: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    norm = Qwen3RMSNorm(product.k, product.eps)
    norm.weight.copy_(vectors.norm_weight)
    if not product.gated:
        linear = nn.Linear(product.k, product.out, bias=product.bias)
        linear.weight.copy_(weight)
        if vectors.bias is not None:
            linear.bias.copy_(vectors.bias)
        return linear(norm(x))
    mlp = Qwen3MLP(Qwen3Config(hidden_size=product.k, intermediate_size=product.out))
    mlp.gate_proj.weight.copy_(weight[: product.out])
    mlp.up_proj.weight.copy_(weight[product.out :])
    mlp.down_proj = nn.Identity()
    return mlp(norm(x))


# --- the work ---


def test_products_are_those_of_the_published_shapes() -> None:
    found = products(models(Settings(model="qwen3-0.6b,qwen2.5-1.5b")))
    assert [(p.op, p.weight_rows, p.k, p.out, p.bias) for p in found] == [
        (QKV, (16 + 2 * 8) * 128, 1024, 4096, False),
        (GATE_UP, 2 * 3072, 1024, 3072, False),
        (QKV, (12 + 2 * 2) * 128, 1536, 2048, True),
        (GATE_UP, 2 * 8960, 1536, 8960, False),
    ]
    assert found[0].shape(16) == "16 x 4096 x 1024"


def test_a_matrix_that_two_models_have_is_one_product() -> None:
    model = compose(["model=tiny"]).model
    found = products([model, replace(model, name="twin")])
    assert [p.models for p in found] == [("tiny", "twin")] * 2


def test_all_are_the_models_that_are_published() -> None:
    names = [model.name for model in models(Settings(model="all"))]
    assert "qwen3-8b" in names and "tiny" not in names and len(names) == 6


def test_a_product_costs_each_input_and_output_once() -> None:
    cost = SMALL_GATED.cost(rows=5, element_bytes=2)
    assert cost.flop == 2 * 5 * 32 * 24
    assert cost.bytes == 2 * (32 * 24 + 24 + 5 * 24 + 5 * 16)
    assert SMALL.cost(5, 2).bytes == 2 * (40 * 24 + 24 + 40 + 5 * 24 + 5 * 40)


@pytest.mark.parametrize("product", [SMALL, SMALL_GATED], ids=["bias", "gated"])
def test_what_variants_are_held_against_is_what_transformers_computes(product: Product) -> None:
    x, weight, vectors = data(product, 7)
    assert relative_error(by_transformers(product, x, weight, vectors), expected(product, x, weight, vectors)) < 1e-6


@pytest.mark.parametrize("name", [*HERE, "torch_compile"])
@pytest.mark.parametrize("product", [SMALL, SMALL_GATED], ids=["bias", "gated"])
def test_every_variant_computes_what_transformers_does(product: Product, name: str) -> None:
    x, weight, vectors = data(product, 7)
    with torch.no_grad():
        out = Variant(name, CONF.variants[name], CONF, "cpu").call(product, vectors)(x, weight)
    assert out.shape == (7, product.out)
    assert relative_error(out, by_transformers(product, x, weight, vectors)) < 1e-5


def test_what_is_compiled_is_compiled_for_each_number_of_rows() -> None:
    """More of them than the compiler takes by itself, each static, and each right."""
    torch.compiler.reset()
    call = Variant("torch_compile", CONF.variants["torch_compile"], CONF, "cpu")
    _, _, vectors = data(SMALL, 1)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        compiled = call.call(SMALL, vectors)
        counters["stats"].clear()
        for rows in (1, 2, 3, 4):
            x, weight, _ = data(SMALL, rows)
            assert relative_error(compiled(x, weight), by_transformers(SMALL, x, weight, vectors)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 4


def test_products_do_not_share_what_the_compiler_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of several models, whose products are the same code: together they may have more than one alone."""
    torch.compiler.reset()
    monkeypatch.setattr(variants, "MOST_COMPILED", 2)
    variant = Variant("torch_compile", CONF.variants["torch_compile"], CONF, "cpu")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for product in (SMALL, replace(SMALL, out=48), SMALL_GATED):
            call = variant.call(product, data(product, 1)[2])
            for rows in (1, 2):
                x, weight, vectors = data(product, rows)
                assert relative_error(call(x, weight), by_transformers(product, x, weight, vectors)) < 1e-5


def test_gate_and_up_may_be_products_of_their_own() -> None:
    conf = VariantConf(norm="torch.nn.RMSNorm", swiglu=f"{__name__}.swiglu")
    x, weight, vectors = data(SMALL_GATED, 7)
    with torch.no_grad():
        out = Variant("apart", conf, CONF, "cpu").call(SMALL_GATED, vectors)(x, weight)
    assert relative_error(out, by_transformers(SMALL_GATED, x, weight, vectors)) < 1e-5


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    assert gate.is_contiguous() and up.is_contiguous()
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("name", ["fused", "decode"])
def test_fused_variants_save_the_normalised_rows_and_gate_and_up(name: str) -> None:
    variant = Variant(name, CONF.variants[name], CONF, "cpu")
    assert variant.saved_bytes(SMALL, 5, 2) == 2 * 5 * 24 * 2
    assert variant.saved_bytes(SMALL_GATED, 5, 2) == (2 * 5 * 24 + 2 * 5 * 32) * 2
    assert Variant("torch", CONF.variants["torch"], CONF, "cpu").saved_bytes(SMALL_GATED, 5, 2) == 0


@pytest.mark.parametrize("moved", [1 << 10, 8 << 20, 700 << 20])
def test_rotations_leave_nothing_in_the_cache_and_a_graph_is_long(moved: int) -> None:
    cache, cost = 60 << 20, Cost(moved, 0, 0, 0)
    rotations = rotations_for(cost, cache)
    repeats = repeats_for(cost, rotations)
    assert rotations >= 2 and repeats >= 1
    assert rotations * moved >= CACHE_FACTOR * cache or rotations == 64
    assert rotations * repeats <= MAX_CALLS
    assert rotations * repeats * max(2e-6, moved / 8e12) >= 0.4e-3 or repeats == MAX_CALLS // rotations


def test_loops_give_the_outputs_of_all_rotations() -> None:
    operands = Operands.random(SMALL, 3, 4, torch.float32, "cpu", seed=0)
    outputs = Loop(lambda x, weight: x @ weight.T, operands, 1).run()
    assert all(
        torch.equal(y, x @ w.T) for y, x, w in zip(outputs, operands.x, operands.weights, strict=True)
    )  # fmt: skip
    assert len({float(y.sum()) for y in outputs}) == 4


# --- turns and verdicts ---


class Paced:
    """Stands for a captured graph: fixed times, and a log of whose turn it was."""

    mode, source = "eager", "host"
    log: list[float]
    times: Sequence[float]

    def __init__(self, call: Any, operands: Operands, repeats: int) -> None:
        self._pairs = list(zip(operands.x, operands.weights, strict=True))
        self._call, self._us = call, self.times[len(self.log)]
        self.log.append(self._us)

    def run(self) -> list[torch.Tensor]:
        return [self._call(x, weight) for x, weight in self._pairs]

    def sample_us(self) -> float:
        self.log.append(self._us)
        return self._us


def test_variants_take_turns_there_and_back_and_the_ratio_is_that_of_pairs(tmp_path, monkeypatch) -> None:
    Paced.log, Paced.times = [], (40.0, 10.0)
    monkeypatch.setattr(study_module, "Loop", Paced)
    monkeypatch.setattr(study_module, "WARMUP_S", 0.0)
    settings = parse([*FAST, "rows=[1]", "variants=[torch,fused]"])
    settings.max_iterations = settings.min_iterations = 4
    study = Study(settings, op_conf(settings), tmp_path / "s")
    study.products = study.products[:1]
    shape = study.run()["study"][0]["rows"][0]
    assert Paced.log == [40.0, 10.0, *(40.0, 10.0, 10.0, 40.0), *(10.0, 40.0, 40.0, 10.0)]
    assert shape["variants"]["torch"]["median_us"] == 40.0
    assert shape["over_baseline"]["fused"]["ratio"] == pytest.approx(0.25)
    both = shape["fused_over_unfused"]
    assert (both["fused"], both["unfused"], both["pairs"], both["verdict"]) == ("fused", "torch", 4, "faster")


def test_the_most_rows_come_first_as_in_an_engine(tmp_path, monkeypatch) -> None:
    """What torch compiles for any number of rows, it makes for one of the first two that it meets."""
    met: list[int] = []

    class Noting(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            met.append(len(x))
            return super().forward(x)

    settings = parse([*FAST, "rows=[1,2,5,3]", "variants=[torch]"])
    conf = op_conf(settings)
    monkeypatch.setattr("torch.nn.RMSNorm", Noting)
    study = Study(settings, conf, tmp_path / "s")
    study.products = study.products[:1]
    record = study.run()["study"][0]
    assert list(dict.fromkeys(met)) == [5, 3, 2, 1]
    assert [shape["rows"] for shape in record["rows"]] == [1, 2, 3, 5]


def test_where_fusing_loses_is_said_as_plainly() -> None:
    outcomes = [(1, 0.5, "faster"), (2, 0.8, "faster"), (4, 1.0, "even"), (512, 1.25, "slower")]
    shapes: list[dict[str, Any]] = [{"rows": 8}, *(
        {"rows": rows, "fused_over_unfused": {"ratio": ratio, "verdict": verdict}} for rows, ratio, verdict in outcomes
    )]  # fmt: skip
    assert list(crossovers(shapes)) == [
        "Fusing wins at 1 to 2 rows (0.50× to 0.80×); is even at 4 rows (1.00×); loses at 512 rows (1.25×)."
    ]


# --- whole studies ---


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Runs, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("ops")
    key = Key.here("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(folder / "cache"))
        key.path.parent.mkdir(parents=True)
        key.path.write_text(json.dumps({**asdict(given(1e9, 1e12)), "copy_bytes_per_s": 1e9, **asdict(key)}))
        assert ceilings_module.cached(key) is not None
        patch.setattr(
            "sys.argv", ["ops", *FAST, "rows=[1,3]", f"variants=[{','.join(HERE)},liger]", f"into={folder / 'run'}"]
        )
        assert main() == OK
    runs = load(folder / "run")
    return runs, runs.runs[0], folder / "run"


def test_every_sample_is_a_row_and_the_medians_are_theirs(run) -> None:
    runs, record, _ = run
    ops = runs.ops
    assert set(ops["variant"]) == set(HERE) and set(ops["op"]) == {QKV, GATE_UP}
    assert (ops["status"] == "ok").all() and (ops["latency_us"] > 0).all() and (ops["error"] < 1e-5).all()
    for product in record["study"]:
        for shape in product["rows"]:
            for name, cell in shape["variants"].items():
                rows = ops[(ops["variant"] == name) & (ops["op"] == product["op"]) & (ops["rows"] == shape["rows"])]
                assert rows["iteration"].tolist() == list(range(cell["samples"]))
                assert rows["latency_us"].median() == pytest.approx(cell["median_us"])
                assert cell["gb_per_s"] == pytest.approx(shape["bytes"] / cell["median_us"] / 1e3)
                assert cell["of_read"] == pytest.approx(cell["gb_per_s"])  # of 1 GB/s
                assert cell["of_matrix"] == pytest.approx(shape["operations"] / cell["median_us"] / 1e6)  # of 1 TFLOP/s


def test_a_study_says_what_it_ran_on_and_what_was_left_out(run) -> None:
    _, record, _ = run
    assert (record["status"], record["engine"], record["workload"]) == ("ok", "ops", "rms_norm_linear")
    assert record["verification"]["status"] == "passed" and record["verification"]["max_error"] < 1e-5
    assert record["provenance"]["versions"]["torch"] and "gpu_before" in record and "gpu_after" in record
    assert record["variants"]["liger"]["status"] == "liger-kernel is not installed."


def test_a_study_made_small_keeps_so_many_of_each_shape(tmp_path) -> None:
    row = {"op": QKV, "variant": "torch", "rows": 1, "dtype": "float32", "mode": "eager", "source": "host",
           "latency_us": 1.0, "bytes": 1, "operations": 1, "saved_bytes": 0, "error": 0.0, "status": "ok"}  # fmt: skip
    writer = RunWriter(tmp_path / "run", "a study")
    for shape, samples in (("1 x 2 x 3", 10), ("2 x 2 x 3", 4)):
        writer.add_ops({**row, "shape": shape, "iteration": i} for i in range(samples))
    writer.flush()
    writer.write_run({"status": "ok"})
    slim(tmp_path / "run", tmp_path / "small", 2)
    kept = load(tmp_path / "small").ops.groupby("shape")["iteration"].apply(list).to_dict()
    assert kept == {"1 x 2 x 3": [0, 5], "2 x 2 x 3": [0, 2]}


def test_the_table_says_who_won_and_who_is_missing(run, capsys) -> None:
    from harness.summary import print_summary

    print_summary(run[2])
    shown = capsys.readouterr().out
    assert "best unfused" in shown and "W 512 x 96 (tiny)" in shown and "Fusing " in shown
    assert "liger is left out: liger-kernel is not installed." in shown


class WrongNorm(nn.RMSNorm):
    """Forgets its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps)


class HoledNorm(nn.RMSNorm):
    """Leaves a value unwritten."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y[-1, -1] = float("nan")
        return y


class FailingNorm(nn.RMSNorm):
    """Breaks down at more than one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise RuntimeError("no more than one row\nand a second line")
        return super().forward(x)


def test_a_variant_that_is_wrong_has_a_reason_and_no_time(tmp_path) -> None:
    settings = parse([*FAST, "rows=[1,3]", "variants=[torch,decode]"])
    conf = op_conf(settings)
    conf.variants["decode"].max_rows = 2
    for kind in (WrongNorm, HoledNorm, FailingNorm):
        conf.variants[kind.__name__] = VariantConf(norm=f"{__name__}.{kind.__name__}")
    record = Study(settings, conf, tmp_path / "s").run()
    ops = load(tmp_path / "s").ops
    for kind, reason in ((WrongNorm, "Its relative error to float32 is 0."), (HoledNorm, "float32 is nan")):
        rows = ops[ops["variant"] == kind.__name__]
        assert len(rows) == 4 and rows["latency_us"].isna().all() and rows["error"].isna().all()
        assert rows["status"].str.contains(reason, regex=False).all()
    failing = ops[ops["variant"] == "FailingNorm"]
    assert (failing.loc[failing["rows"] == 1, "status"] == "ok").all()
    assert (failing.loc[failing["rows"] == 3, "status"] == "RuntimeError: no more than one row").all()
    assert set(ops.loc[ops["variant"] == "decode", "rows"]) == {1}
    assert (ops.loc[ops["variant"] == "torch", "status"] == "ok").all()
    assert record["verification"]["status"] == "failed" and len(record["failures"]) == 4 + 4 + 2


def test_a_failure_is_the_exit_code(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study_module, "TOLERANCE", {"float32": -1.0})
    monkeypatch.setattr("sys.argv", ["ops", *FAST, "rows=[2]", "variants=[nano]", f"into={tmp_path / 's'}"])
    assert main() == FAILED


def test_where_memory_ends_every_variant_has_a_row(tmp_path, monkeypatch) -> None:
    def full(*_arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    settings = parse([*FAST, "rows=[2]", "variants=[torch,fused]"])
    monkeypatch.setattr(Operands, "random", full)
    Study(settings, op_conf(settings), tmp_path / "s").run()
    ops = load(tmp_path / "s").ops
    assert sorted(ops["variant"]) == ["fused", "fused", "torch", "torch"]
    assert ops["status"].str.contains("out of memory").all() and ops["latency_us"].isna().all()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("op=rms_norm", "no op 'rms_norm'"), ("model=qwen", "no model 'qwen'"),
        ("variants=[toch]", "no variant 'toch'"), ("row=[1]", "no setting 'row=[1]'; did you mean rows"),
        ("rows=[0]", "rows must be at least 1"),
        ("dtype=int8", "dtype must be one of"), ("precision=2", "precision must lie"), ("rows=many", "rows"),
        ("variants=[liger]", "no variant of rms_norm_linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_sentence(argument, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["ops", *FAST, argument, f"into={tmp_path / 's'}"])
    assert main() == BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
