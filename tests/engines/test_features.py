"""The fused engine's switches."""

from dataclasses import replace

import pytest
import torch

import kernels
from engines.base import InputError
from engines.fused import LLM
from engines.fused.features import FEATURES, FusedOptions, fallbacks
from engines.nano.graphs import why_no_graphs
from engines.nano.layers.attention import choose_backend
from tests.engines import reference

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("given", "on"),
    [
        ({}, tuple(FEATURES)),
        ({"features": []}, ()),
        ({"features": ["head", "residual"]}, ("head", "residual")),
        ({"features": ["-head"]}, tuple(name for name in FEATURES if name != "head")),
        ({"features": [f"-{name}" for name in FEATURES]}, ()),
    ],
)
def test_features_are_named_or_left_out_with_a_minus(given, on) -> None:
    assert FusedOptions.parse(given, "fused").features == on


@pytest.mark.parametrize(
    ("features", "said"), [(["haed"], "'haed'"), (["-haed"], "'-haed'"), (["head", "-residual"], "not both")]
)
def test_features_that_make_no_sense_are_a_sentence(features, said) -> None:
    with pytest.raises(InputError, match=said):
        FusedOptions.parse({"features": features}, "fused")


def test_a_gpu_without_triton_runs_plain_pytorch_and_says_so(monkeypatch) -> None:
    """Here by what the engine asks: graphs are captured where there is no reason not to."""
    llm = LLM(reference.config())
    llm.config = replace(llm.config, device="cuda")  # what its notes are about; it runs on
    assert why_no_graphs(CUDA) == "" and llm.notes["notices"] == []
    assert choose_backend("auto", CUDA, torch.float32)[0] == "triton"
    monkeypatch.setattr(kernels, "HAVE_TRITON", False)
    assert "triton" in why_no_graphs(CUDA)
    assert choose_backend("auto", CUDA, torch.float32)[0] == "torch"
    reasons = fallbacks(llm.runner.model_config, CUDA, 16)
    assert FEATURES.keys() - reasons.keys() == {"device_loop"}
    assert "triton" in reasons["prefill_graphs"]
    (notice,) = llm.notes["notices"]
    assert "triton is not installed" in notice
