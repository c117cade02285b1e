"""The check before timing: numbers against formulas, and engines that are right, wrong and just noisy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engines import hf
from engines.base import EngineConfig, Request, Scored
from engines.hf import HF
from harness import verify as verify_module
from harness.verify import Probing, Ratio, _judge, differences, distance, ratio, verify

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"


class Spoiled(HF):
    """The reference engine with something done to its logits."""

    def __init__(self, config: EngineConfig, spoil: Any = None) -> None:
        super().__init__(config)
        self.spoil = spoil

    def score(self, requests: Any) -> list[Scored]:
        return [replace(s, logits=self.spoil(s.logits)) for s in super().score(requests)]


@pytest.fixture(autouse=True)
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "GPU_PROBING", Probing(prompts=8, shortest=5, longest=60, new_tokens=16))


def config(dtype: str = "float32", **changes: Any) -> EngineConfig:
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
    return EngineConfig(TINY, **{"dtype": dtype, "device": "cpu", **limits, **changes})


def check(engine: HF) -> verify_module.Verification:
    return verify(engine, TINY, engine.config.dtype, "cpu", vocab_size=260)


def test_distance_is_what_the_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [torch.randn(n, 50, generator=generator) * 3 for n in (4, 7)]
    other = [logits + 0.3 * torch.randn(logits.shape, generator=generator) for logits in reference]
    tokens = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]
    found = distance([differences(*three) for three in zip(reference, other, tokens, strict=True)])
    ref, ours, index = torch.cat(reference).double(), torch.cat(other).double(), torch.tensor([*tokens[0], *tokens[1]])
    kl = F.kl_div(ours.log_softmax(-1), ref.log_softmax(-1), log_target=True, reduction="batchmean")
    nll = (F.cross_entropy(ours, index, reduction="none") - F.cross_entropy(ref, index, reduction="none")).abs().mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-9)
    assert found.nll_delta == pytest.approx(float(nll), rel=1e-9)
    assert found.greedy_agreement == float((ref.argmax(-1) == ours.argmax(-1)).double().mean())


def test_ratio_knows_how_sure_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(32, 3, generator=generator) for _ in range(30)]
    assert ratio(noise, noise, 0) == Ratio(1.0, 1.0)
    doubled = ratio([2 * n for n in noise], noise, 1)
    assert (doubled.value, doubled.low) == pytest.approx((2.0, 2.0))
    other = ratio([torch.rand(32, 3, generator=generator) for _ in range(30)], noise, 0)
    assert 0.85 < other.low < other.value < 1.15


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_reference_itself_passes(dtype: str) -> None:
    found = check(HF(config(dtype)))
    assert found.passed
    assert (found.noise is None) == (dtype == "float32")
    assert found.engine.greedy_agreement > 0.8
    assert json.loads(json.dumps(found.record()))["status"] == "passed"
    assert "agrees with transformers in float32" in found.sentence("hf")


def test_bfloat16_inside_a_float32_engine_fails() -> None:
    found = check(Spoiled(config(), lambda logits: logits.bfloat16().float()))
    assert not found.passed
    assert "does not agree" in found.sentence("x")


def test_twice_the_noise_fails() -> None:
    """An engine in bfloat16 whose logits are as far again from the reference as bfloat16 puts them."""
    spread = torch.Generator().manual_seed(0)
    found = check(Spoiled(config("bfloat16"), lambda x: x + 0.2 * torch.randn(x.shape, generator=spread)))
    assert not found.passed
    assert found.noise is not None
    assert found.engine.kl > found.bound_kl == pytest.approx(1.1 * found.noise.kl)


def test_wrong_positions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that rotates queries and keys by another base, as with a misread config."""
    engine = HF(config())
    assert engine.model is not None
    rotary: Any = engine.model.get_submodule("model.rotary_emb")
    rotary.inv_freq = rotary.inv_freq * 1.001
    assert not check(engine).passed


def test_nan_fails_and_can_be_written() -> None:
    found = check(Spoiled(config(), lambda logits: torch.full_like(logits, float("nan"))))
    assert not found.passed
    assert json.loads(json.dumps(found.record(), allow_nan=False))["engine"]["kl"] == "nan"


def test_close_calls_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine just above the bound is judged by four times as many positions; a hopeless one at once."""
    rounds: list[int] = []

    class Counting(Spoiled):
        def score(self, requests: Any) -> list[Scored]:
            rounds.append(len(requests))
            return super().score(requests)

    found = check(Counting(config("bfloat16"), lambda x: x * 3))
    assert not found.passed
    assert rounds == [8]

    # Noise of a known size around exact logits: 1.2 times as much is above the bound, and not by chance.
    pattern = (torch.arange(260) * 1.7).sin() * 0.01

    def noisy(checkpoint: Path, sequences: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
        logits = hf.teacher_forced_logits(checkpoint, sequences, torch.float32, device)
        return [x if dtype == torch.float32 else x + pattern for x in logits]

    monkeypatch.setattr(verify_module, "teacher_forced_logits", noisy)
    rounds.clear()
    found = verify(Counting(config(), lambda x: x + 1.2 * pattern), TINY, "bfloat16", "cpu", vocab_size=260)
    assert found.nll_delta_ratio is not None
    assert found.nll_delta_ratio.value == pytest.approx(1.2, rel=0.02)
    assert not found.passed
    assert rounds == [8, 8, 8, 8]
    assert found.positions == 4 * 8 * 16
    assert verify(Counting(config(), lambda x: x + 1.04 * pattern), TINY, "bfloat16", "cpu", vocab_size=260).passed


def test_what_may_be_chance_passes_only_after_the_last_round() -> None:
    generator = torch.Generator().manual_seed(3)

    def heavy_tailed(scale: float) -> list[Tensor]:
        return [scale * torch.rand(16, 3, generator=generator, dtype=torch.float64) ** 12 for _ in range(16)]

    ours, noise = heavy_tailed(1.3), heavy_tailed(1.0)
    ratios = [ratio(ours, noise, column) for column in (0, 1)]
    assert max(r.value for r in ratios) > 1.1 > max(r.low for r in ratios)
    assert [_judge(ours, noise, "bfloat16", "cpu", last).passed for last in (False, True)] == [False, True]
    assert not _judge([2 * x for x in ours], noise, "bfloat16", "cpu", last=True).passed


def test_prompts_fit_a_small_engine() -> None:
    engine = HF(config(max_model_len=12))
    seen: list[Request] = []
    score = engine.score
    engine.score = lambda requests: score(seen.extend(requests) or requests)  # type: ignore[method-assign,func-returns-value]
    assert check(engine).passed
    assert {len(r.prompt_token_ids) + r.sampling.max_tokens <= 12 for r in seen} == {True}
    assert len({len(r.prompt_token_ids) for r in seen}) == 4


def test_a_full_gpu_moves_the_reference_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def full_on_gpu(checkpoint: Path, sequences: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
        tried.append(device)
        if device != "cpu":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return hf.teacher_forced_logits(checkpoint, sequences, dtype, device)

    monkeypatch.setattr(verify_module, "teacher_forced_logits", full_on_gpu)
    found = verify(HF(config()), TINY, "float32", "cuda", vocab_size=260)
    assert found.passed
    assert tried == ["cuda", "cpu"]
    assert found.reference == "transformers in float32 on cpu"
