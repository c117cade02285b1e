"""Contestants of comparisons: their names, their options, and what of them the command line takes."""

from __future__ import annotations

import sys

import pytest

from engines.base import InputError
from harness.compare import comparison as comparison_module
from harness.compare.__main__ import main, parse
from harness.compare.contestants import contestants, short_names

SMALL = [
    "model=tiny", "workload=tpot", "device=cpu", "weights=random", "workload.cpu_prefill=[[2,8]]",
    "workload.cpu_decode=[]", "workload.output_tokens=4",
]  # fmt: skip


def test_short_names_are_what_tells_contestants_apart() -> None:
    labels = ["nano:limits.a=1", "fused", "fused:features=[]", "vllm:arm=x:limits.a=1", "vllm:arm=y:limits.a=1"]
    assert list(short_names(labels).values()) == ["nano", "fused", "fused:features=[]", "vllm:arm=x", "vllm:arm=y"]
    assert short_names(["vllm:arm=x:limits.a=1", "vllm:arm=x"]) == {
        "vllm:arm=x:limits.a=1": "vllm:arm=x:limits.a=1", "vllm:arm=x": "vllm:arm=x"
    }  # fmt: skip
    assert short_names(["nano", "nano_vllm"]) == {"nano": "nano", "nano_vllm": "nano_vllm"}


def test_contestants_share_everything_but_their_own_options() -> None:
    nano, eager = contestants(["nano", "nano:enforce_eager=true"], [*SMALL, "seed=5"])
    assert (nano.config.engine.options, eager.config.engine.options) == ({}, {"enforce_eager": True})
    assert nano.config.seed == eager.config.seed == 5
    assert nano.config.limits.gpu_memory_utilization == pytest.approx(0.45)
    assert nano.folder != eager.folder


@pytest.mark.parametrize(
    ("labels", "said"), [([], "names no engine"), (["nano", "nano"], "twice"), (["nanno"], "no engine 'nanno'")]
)
def test_wrong_engines_are_a_sentence(labels, said) -> None:
    with pytest.raises(InputError, match=said):
        contestants(labels, SMALL)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("fused:features=[nonsense]", "Feature 'nonsense' of engine fused is not known; known are device_loop"),
        ("fused:features=5", "do not fit engine fused: 'int' object is not iterable"),
        ("nano:blocksize=64", "no option 'blocksize'; did you mean block_size?"),
        ("hf:block_size=64", "no option block_size"),
        ("vllm:serve_arm=fast", "no serve_arm 'fast'"),
        ("nano_vllm:block_size=64", "no option 'block_size'"),
    ],
)
def test_an_option_that_an_engine_does_not_take_ends_all_before_any_starts(
    label, said, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(comparison_module, "Worker", None)
    monkeypatch.setattr(sys, "argv", ["compare", f"engines=[nano,{label}]", f"into={tmp_path / 'c'}", *SMALL])
    assert main() == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not list(tmp_path.iterdir())


def test_own_settings_are_told_from_overrides() -> None:
    settings, overrides = parse(["engines=[nano,vllm:serve_arm=default]", "rounds=3", "model=tiny"])
    assert (settings.engines, settings.rounds, overrides) == (["nano", "vllm:serve_arm=default"], 3, ["model=tiny"])
    with pytest.raises(InputError, match="rounds"):
        parse(["engines=[nano]", "rounds=many"])


def test_an_option_may_be_a_list() -> None:
    labels = ["fused", "fused:features=[-head]", "fused:features=[head,residual]:block_size=64", "fused:features=[]"]
    settings, _ = parse([f"engines=[{','.join(labels)}]"])
    assert settings.engines == labels
    options = [contestant.config.engine.options for contestant in contestants(settings.engines, SMALL)]
    assert options == [
        {},
        {"features": ["-head"]},
        {"features": ["head", "residual"], "block_size": 64},
        {"features": []},
    ]
    assert len({contestant.folder for contestant in contestants(settings.engines, SMALL)}) == 4
    assert parse(["engines=['nano', \"fused:features=[head]\"]"])[0].engines == ["nano", "fused:features=[head]"]


@pytest.mark.parametrize("engines", ["[nano,fused:features=[head]", "[nano]]", "[nano],[fused]"])
def test_brackets_that_do_not_match_are_a_sentence(engines) -> None:
    with pytest.raises(InputError, match="brackets"):
        parse([f"engines={engines}"])
