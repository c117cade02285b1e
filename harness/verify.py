"""The check before timing: are the engine's logits as good as its dtype allows?

The engine continues random prompts greedily; transformers then computes the logits of the same tokens in float32 (the
reference) and in the engine's own dtype (the noise that this dtype has anyway). The engine passes if its mean
KL(reference || engine) and its mean |change of the chosen tokens' NLL| are at most 1.1 times that noise.

Both means rest on few positions that weigh much, so equally good engines differ by 10 % and more: transformers with a
cache against transformers without one came out at 1.17 for a small peaked model. So an engine above the bound is looked
at with more prompts. After the last round it still passes if the bootstrap interval of its ratio (over sequences)
reaches down to 1.1 and the ratio is not above 1.5. The record holds the ratios and the intervals' lower ends.

A float32 engine has no such noise to be measured by, so it has absolute bounds. Reordered float32 sums move a logit by
1e-6 to 1e-4, which is that much NLL and, being of second order, below 1e-8 of KL; the bounds lie ten and a hundred
times above, and far below what TF32 or bfloat16 anywhere in the engine costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.base import Engine, Request, SamplingParams
from engines.hf import teacher_forced_logits
from harness.workloads import Prompts

NOISE_FACTOR = 1.1
FLOAT32_KL, FLOAT32_NLL_DELTA = 1e-6, 1e-3
MAX_ROUNDS = 4
UNPROVEN_FACTOR = 1.5
"""No uncertainty excuses a ratio above this one."""
_RESAMPLES, _LOW = 2000, 0.025


@dataclass(frozen=True, slots=True)
class Probing:
    """How much is compared in a round: prompts of random lengths in a range, and tokens produced after each."""

    prompts: int
    shortest: int
    longest: int
    new_tokens: int


GPU_PROBING = Probing(prompts=8, shortest=5, longest=200, new_tokens=32)
CPU_PROBING = Probing(prompts=4, shortest=5, longest=48, new_tokens=4)


@dataclass(frozen=True, slots=True)
class Distance:
    """Means over positions, against the float32 reference; `greedy_agreement` is a share."""

    kl: float
    nll_delta: float
    greedy_agreement: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean over the noise's, and the lower end of its 95 % interval."""

    value: float
    low: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What the check found. `noise` and the ratios to it are None for float32, whose bounds are absolute."""

    passed: bool
    dtype: str
    positions: int
    engine: Distance
    noise: Distance | None
    kl_ratio: Ratio | None
    nll_delta_ratio: Ratio | None
    bound_kl: float
    bound_nll_delta: float
    reference: str

    def sentence(self, engine: str) -> str:
        """The outcome with its numbers."""
        verdict = "agrees with" if self.passed else "does not agree with"
        return (
            f"{engine} in {self.dtype} {verdict} {self.reference} over {self.positions} tokens: "
            f"KL {self.engine.kl:.2e} (bound {self.bound_kl:.2e}), |ΔNLL| {self.engine.nll_delta:.2e} "
            f"(bound {self.bound_nll_delta:.2e}), greedy agreement {self.engine.greedy_agreement:.1%}."
        )

    def record(self) -> dict[str, Any]:
        """For `run.json`: numbers that are not finite become their names."""
        return {"status": "passed" if self.passed else "failed", **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def differences(reference: Tensor, other: Tensor, tokens: Sequence[int]) -> Tensor:
    """KL(reference || other), |ΔNLL| of `tokens` [n], and whether both choose the same token: float64 [n, 3].

    `reference` and `other` are logits [n, vocab] of the positions that produce `tokens`.
    """
    ref, ours = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    index = torch.tensor(tokens, device=ref.device).unsqueeze(1)
    kl = (ref.exp() * (ref - ours)).sum(-1)
    nll_delta = (ref.gather(1, index) - ours.gather(1, index)).abs().squeeze(1)
    return torch.stack([kl, nll_delta, (ref.argmax(-1) == ours.argmax(-1)).double()], dim=1)


def distance(found: Sequence[Tensor]) -> Distance:
    """Means over all positions of `differences`, one tensor per sequence."""
    return Distance(*torch.cat(list(found)).mean(0).tolist())


def resampled(ours: Sequence[Tensor], noise: Sequence[Tensor], column: int) -> tuple[float, np.ndarray]:
    """The ratio of the means of a column of `differences`, and what a bootstrap over sequences makes of it: tokens of
    one are not independent."""
    sums = np.array([[float(one[:, column].sum()) for one in both] for both in (ours, noise)])
    picks = np.random.default_rng(0).integers(sums.shape[1], size=(_RESAMPLES, sums.shape[1]))
    return float(sums[0].sum() / sums[1].sum()), sums[0][picks].sum(1) / sums[1][picks].sum(1)


def ratio(ours: Sequence[Tensor], noise: Sequence[Tensor], column: int) -> Ratio:
    """Of the means of a column of `differences`."""
    value, ratios = resampled(ours, noise, column)
    return Ratio(value, float(np.quantile(ratios, _LOW)))


def verify(engine: Engine, checkpoint: Path, dtype: str, device: str, vocab_size: int, seed: int = 0) -> Verification:
    """Check `engine`, which runs `checkpoint` in `dtype` on `device`. Its logits must be those of its normal steps."""
    prompts = Prompts(vocab_size, seed)
    ours: list[Tensor] = []
    noise: list[Tensor] = []
    # Absolute bounds need few positions, which is what a big model can afford on a CPU.
    probing = CPU_PROBING if device == "cpu" and dtype == "float32" else GPU_PROBING
    for round_index in range(MAX_ROUNDS):
        scored = engine.score(_requests(engine, prompts, probing))
        sequences = [(s.prompt_token_ids, s.token_ids) for s in scored]
        references, where = _logits(checkpoint, sequences, torch.float32, device)
        pairs = list(zip(references, scored, strict=True))
        ours += [differences(reference, s.logits, s.token_ids) for reference, s in pairs]
        if dtype != "float32":
            noisy, _ = _logits(checkpoint, sequences, getattr(torch, dtype), device)
            noise += [differences(ref, n, s.token_ids) for (ref, s), n in zip(pairs, noisy, strict=True)]
        found = _judge(ours, noise, dtype, where, last=round_index == MAX_ROUNDS - 1)
        hopeless = not found.engine.kl <= 2 * found.bound_kl  # NaN too
        if found.passed or dtype == "float32" or hopeless:
            break
    return found


def _judge(ours: Sequence[Tensor], noise: Sequence[Tensor], dtype: str, device: str, last: bool) -> Verification:
    engine, positions = distance(ours), sum(map(len, ours))
    reference = f"transformers in float32 on {device}"
    # Comparisons are written so that NaN fails.
    if not noise:
        passed = engine.kl <= FLOAT32_KL and engine.nll_delta <= FLOAT32_NLL_DELTA
        return Verification(
            passed, dtype, positions, engine, None, None, None, FLOAT32_KL, FLOAT32_NLL_DELTA, reference
        )
    base = distance(noise)
    ratios = ratio(ours, noise, 0), ratio(ours, noise, 1)
    unproven = last and all(r.low <= NOISE_FACTOR and r.value <= UNPROVEN_FACTOR for r in ratios)
    passed = unproven or all(r.value <= NOISE_FACTOR for r in ratios)
    bounds = NOISE_FACTOR * base.kl, NOISE_FACTOR * base.nll_delta
    return Verification(passed, dtype, positions, engine, base, *ratios, *bounds, reference)


def _requests(engine: Engine, prompts: Prompts, probing: Probing) -> list[Request]:
    """Ragged prompts that fit the engine."""
    sampling = SamplingParams(temperature=0.0, max_tokens=probing.new_tokens, ignore_eos=True)
    capacity = engine.capacity
    room = min(capacity.max_model_len, capacity.kv_cache_tokens) - probing.new_tokens
    longest = max(1, min(probing.longest, room))
    shortest = min(probing.shortest, longest)
    spread = [shortest + (longest - shortest) * i // max(1, probing.prompts - 1) for i in range(probing.prompts)]
    return [prompts.request(length, sampling) for length in spread]


def _logits(
    checkpoint: Path, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], str]:
    """Logits from transformers, and where they were computed: what the engine leaves of the GPU may be too little."""
    if device != "cpu":
        try:
            return teacher_forced_logits(checkpoint, sequences, dtype, device), device
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    return teacher_forced_logits(checkpoint, sequences, dtype, "cpu"), "cpu"
