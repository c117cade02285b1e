"""The tuner of prompts' attention without a GPU: what it offers, what it rejects, what it chooses."""

import pytest
import torch

from kernels import _tune_causal, causal_attention, use
from kernels._triton import triton
from kernels._tune_causal import CANDIDATES, Prompts, measure, shapes
from kernels._tune_models import Model
from kernels.causal_attention import Launch

TINY = Model(layers=3, hidden=32, inter=16, heads=4, kv_heads=2, head_dim=16, vocab=64)
BAD, GOOD, BETTER = Launch(16, 16, 4, 1), Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)


@pytest.fixture
def prompts(monkeypatch) -> Prompts:
    """Of which `BAD` gives something else; launches take as long as their tile is high."""
    monkeypatch.setattr(_tune_causal, "CANDIDATES", (BAD, GOOD, BETTER))
    monkeypatch.setattr(
        _tune_causal, "causal_attention",
        lambda *a, launch, dependent: causal_attention(*a, launch=launch) * (2 if launch == BAD else 1),
    )  # fmt: skip
    return Prompts(TINY, 12, 6, torch.device("cpu"))


def time_as(monkeypatch, launches: dict[Launch, float], flash: float | None, prompts: Prompts) -> None:
    monkeypatch.setattr(prompts, "flash_attention_3", lambda: None if flash is None else "flash")
    of = lambda call: flash if call == "flash" else launches[call.args[0]]  # noqa: E731
    monkeypatch.setattr(_tune_causal, "time_us", of)


def test_the_fastest_right_one_is_chosen(prompts, monkeypatch, capsys):
    time_as(monkeypatch, {GOOD: 7.0, BETTER: 5.0}, 6.0, prompts)
    with use("reference"):
        failures: list[str] = []
        entry = measure(prompts, failures)
    assert entry == {
        "launch": {"block_t": 32, "block_n": 16, "num_warps": 4, "num_stages": 1}, "us": 5.0, "flash_attention_us": 6.0
    }  # fmt: skip
    (told,) = failures
    assert told == f"    12 tokens of at most    6 {BAD}: relative error 1"
    assert f"WRONG {told}" in capsys.readouterr().out


def test_flash_attention_may_win_or_not_be_there(prompts, monkeypatch):
    time_as(monkeypatch, {GOOD: 7.0, BETTER: 5.0}, 4.0, prompts)
    with use("reference"):
        assert measure(prompts, []) == {"path": "flash_attention", "us": 5.0, "flash_attention_us": 4.0}
        time_as(monkeypatch, {GOOD: 7.0, BETTER: 5.0}, None, prompts)
        assert measure(prompts, [])["us"] == 5.0


def test_what_is_too_large_for_the_gpu_is_left_out(prompts, monkeypatch):
    """Groups of more heads than those that the candidates were made for want more shared memory."""

    def attend(*inputs, launch, dependent):
        if launch == BAD:
            raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")
        return causal_attention(*inputs, launch=launch)

    monkeypatch.setattr(_tune_causal, "causal_attention", attend)
    time_as(monkeypatch, {GOOD: 7.0, BETTER: 5.0}, None, prompts)
    with use("reference"):
        assert measure(prompts, [])["us"] == 5.0


def test_each_prompt_sees_itself_alone(prompts, assert_close):
    """Of two equal prompts: expected one by one, and together."""
    with use("reference"):
        together = causal_attention(prompts.q, prompts.k, prompts.v, prompts.positions, prompts.scale)
    assert_close(prompts.expected, together)


def test_candidates_and_shapes():
    """Shared memory of two programs, or of one large one; rows for the instruction; steps of one prompt and of many."""
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    for launch in CANDIDATES:
        rows = 2 * launch.block_t
        assert rows % 16 == 0 and rows <= 16 * launch.num_warps
        assert (rows + 2 * launch.num_stages * launch.block_n) * 256 <= (114 if launch.num_warps == 4 else 162) * 1024
    found = list(shapes())
    assert (1024, 1024) in found and (16384, 1024) in found and (16384, 4096) in found
    assert all(longest <= tokens for tokens, longest in found)
