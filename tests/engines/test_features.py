"""The fused engine's switches."""

import pytest

from engines.base import InputError
from engines.fused.features import FEATURES, FusedOptions


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
