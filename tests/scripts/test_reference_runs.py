"""The committed runs that the documents' tables are made from agree with themselves."""

from pathlib import Path

import pandas as pd

from harness.results import load

ROOT = Path(__file__).resolve().parents[2]


def test_the_kept_samples_agree_with_the_medians_shown() -> None:
    runs = load(ROOT / "results" / "reference" / "h200")
    timed = runs.steps[~runs.steps["instrumented"] & (runs.steps["status"] == "ok")]
    checked = 0
    for run in runs.runs:
        for shape in run["shapes"]:
            new_tokens = shape["batch_size"] * (shape["tokens"] if shape["phase"] == "prefill" else 1)
            context = 0 if shape["phase"] == "prefill" else shape["tokens"]
            rows = timed[
                (timed["run_id"] == run["run_id"])
                & (timed["phase"] == shape["phase"])
                & (timed["batch_size"] == shape["batch_size"])
                & (timed["new_tokens"] == new_tokens)
                & (timed["context_len"] == context)
            ]
            spread = rows["wall_us"].quantile([0.05, 0.95])
            assert spread[0.05] <= shape["timed"]["wall_us"] <= spread[0.95], (run["run_id"], shape)
            checked += 1
    assert checked == 6 * 13 - 3 * 10  # three latency runs of 13 shapes, three throughput runs of 3


def test_every_engine_has_layers_from_eager_steps_and_from_graphs() -> None:
    layers = load(ROOT / "results" / "reference" / "h200").layers
    whole = layers[layers["op"] == "layer"]
    seen = pd.MultiIndex.from_frame(whole[["engine", "mode"]]).unique()
    assert set(seen) == {(engine, mode) for engine in ("vllm", "nano", "fused") for mode in ("eager", "graph")}
    assert (whole.groupby(["engine", "mode"])["layer_index"].nunique() == 28).all()
