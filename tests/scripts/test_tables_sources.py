"""What tables read: models from conf, the least time of work, and of committed runs those of their model alone."""

import json
import shutil
from inspect import signature
from pathlib import Path

import pytest
import torch

from engines.base import InputError
from harness.results import RunWriter
from scripts.tables import comparison
from scripts.tables.registry import TABLES, made
from scripts.tables.sources import MODELS, REFERENCE, ROOT, floor_us, model
from tests.scripts.table_runs import SMALL, block, cells, compared


def test_models_are_those_of_conf() -> None:
    small = model("qwen3-0.6b")
    assert (small.hidden_size, small.num_layers, small.num_heads, small.num_kv_heads) == (1024, 28, 16, 8)
    assert set(MODELS) | {"tiny"} == {p.stem for p in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")}
    with pytest.raises(InputError, match="no model gpt"):
        model("gpt")


def test_layer_bytes() -> None:
    # qkv 20×8, o 8×12, gate and up 20×8, down 8×10: 496 elements of 2 bytes
    assert SMALL.layer_weight_bytes == 992
    assert SMALL.layer_token_bytes == torch.empty(2, 1, 4, dtype=torch.bfloat16).nbytes
    # qkv 8.39, o 4.19, gate and up 12.58, down 6.29 MB
    assert model("qwen3-0.6b").layer_weight_bytes == (4096 + 2048 + 6144 + 3072) * 1024 * 2


def test_the_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert floor_us(4.8e6, 0) == pytest.approx(1.0)
    assert floor_us(0, 989e6) == pytest.approx(1.0)
    assert floor_us(4.8e6, 2 * 989e6) == pytest.approx(2.0)


OF_REFERENCE = [
    name for name, of in TABLES.items() if any(p.default == REFERENCE for p in signature(of).parameters.values())
]
SHAPES_ASKED = {"op-shares": " shape=decode:1x128"}


@pytest.fixture(scope="module")
def with_another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed runs, and before and behind each, by name, the same of another model."""
    folder = tmp_path_factory.mktemp("reference") / "h200"
    shutil.copytree(ROOT / REFERENCE, folder)
    for file in sorted((ROOT / REFERENCE).glob("*/run.json")):
        run = json.loads(file.read_text()) | {"model": "qwen3-4b"}
        for place in ("0", "zz") if "study" not in run else ():  # one table has studies of all models' shapes
            name = f"{place}-{file.parent.name}"
            RunWriter(folder / name, name).write_run(run | {"run_id": name})
    blocks_of = {label: [block(label, n, 1.0) for n in range(2)] for label in ("nano", "fused")}
    compared(folder / "0-compare", blocks_of, model={"name": "qwen3-4b"})
    return folder


@pytest.mark.parametrize("name", [name for name in OF_REFERENCE if name != "models"])
def test_runs_of_another_model_change_no_table_but_theirs(name: str, with_another_model: Path) -> None:
    call = name + SHAPES_ASKED.get(name, "")
    told = made(f"{call} folder={with_another_model}").replace(str(with_another_model), REFERENCE)
    assert told == made(call)


def test_runs_of_another_model_are_in_a_table_of_theirs(with_another_model: Path) -> None:
    assert {row[0] for row in cells(comparison.models(str(with_another_model)))} == {"qwen3-4b"}
