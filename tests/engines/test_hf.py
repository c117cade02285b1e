"""The reference engine against transformers' own generate, its errors, and the sites that it can time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from engines.base import EngineConfig, InputError, Request, RequestResult, SamplingParams, Site, Step, TraceUnsupported
from engines.hf import HF, Sampler, teacher_forced_logits

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
PROMPTS = [(7, 3, 250), tuple(b"Flat is better than"), tuple(range(40, 140)), (66,)]


def config(checkpoint: Path = TINY, **changes: Any) -> EngineConfig:
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineConfig(checkpoint, **{"dtype": "float32", "device": "cpu", **limits, **changes})


def requests(max_tokens: int = 12, **sampling: Any) -> list[Request]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling})
    return [Request(f"r{i}", prompt, params) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    model: Any = Qwen3ForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    outs = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=258)
        for p in PROMPTS
    ]
    return [tuple(out[0, len(p) :].tolist()) for p, out in zip(PROMPTS, outs, strict=True)]


@pytest.fixture
def engine() -> HF:
    return HF(config())


def test_serve_equals_generate(engine: HF, expected: list[tuple[int, ...]]) -> None:
    finished: list[RequestResult] = []
    results = engine.serve(requests(), finished.append)
    assert [r.token_ids for r in results] == expected
    assert {r.request_id for r in finished} == {"r0", "r1", "r2", "r3"}
    for result, prompt in zip(results, PROMPTS, strict=True):
        assert (result.prompt_tokens, result.finish_reason) == (len(prompt), "length")
        assert sorted(result.token_times_s) == list(result.token_times_s)
        assert len(result.token_times_s) == 12
        assert result.arrival_s <= result.token_times_s[0]


def test_steps_say_what_they_were(engine: HF, expected: list[tuple[int, ...]]) -> None:
    for request in requests(max_tokens=3):
        engine.add(request)
    steps = []
    while engine.has_unfinished():
        steps.append(stepped(engine))
    # 64 tokens per step: the prompts of 3 and 19 together, the one of 100 alone, that of 1 last.
    assert [s.kind for s in steps] == ["prefill", "prefill", "prefill", "decode", "decode"]
    assert [s.new_tokens for s in steps] == [22, 100, 1, 4, 4]
    assert [s.context_len for s in steps[-2:]] == [(3 + 19 + 100 + 1) // 4, (4 + 20 + 101 + 2) // 4]
    assert steps[-1].finished == ("r0", "r1", "r2", "r3")
    produced = {f"r{i}": tuple(t for s in steps for r, t in s.tokens if r == f"r{i}") for i in range(4)}
    assert list(produced.values()) == [tokens[:3] for tokens in expected]


def test_score_agrees_with_teacher_forcing(engine: HF, expected: list[tuple[int, ...]]) -> None:
    scored = engine.score(requests(temperature=0.9))  # score is greedy whatever the request says
    assert [s.token_ids for s in scored] == expected
    reference = teacher_forced_logits(TINY, [(s.prompt_token_ids, s.token_ids) for s in scored], torch.float32, "cpu")
    for one, ref in zip(scored, reference, strict=True):
        assert one.logits.shape == ref.shape == (12, 260)
        torch.testing.assert_close(one.logits, ref, atol=2e-4, rtol=0)


def test_stops(engine: HF) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompt = tuple(tokenizer.encode("let's do more of"))
    (eos,) = engine.serve([Request("a", prompt, SamplingParams(0.0, 40))])
    assert bytes(eos.token_ids[:-1]) == b" those!"
    assert eos.finish_reason == "stop"
    (past,) = engine.serve([Request("c", prompt, SamplingParams(0.0, 40, ignore_eos=True))])
    assert past.token_ids[: len(eos.token_ids)] == eos.token_ids
    assert (len(past.token_ids), past.finish_reason) == (40, "length")
    (stop,) = engine.serve([Request("b", prompt, SamplingParams(0.0, 40, stop_token_ids=(ord("o"),)))])
    assert bytes(stop.token_ids) == b" tho"


def test_abort_drops_queued_and_running(engine: HF) -> None:
    for request in requests():
        engine.add(request)
    engine.advance()
    engine.abort(["r0", "r3"])
    assert {s.request_id for s in stepped(engine).scheduled} == {"r2"}
    engine.abort(["r1", "r2"])
    assert not engine.has_unfinished()


@pytest.mark.parametrize("call", ["serve", "score"])
def test_a_call_that_fails_leaves_nothing_queued(
    engine: HF, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    forward, calls = engine._forward, []

    def failing(*arguments: Any) -> int:
        calls.append(None)
        if len(calls) == 5:  # some run, some wait
            raise torch.OutOfMemoryError("made up")
        return forward(*arguments)

    monkeypatch.setattr(engine, "_forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(engine, call)(requests())
    assert not engine.has_unfinished()
    results = engine.serve(requests())
    assert [result.token_ids for result in results] == expected


def test_seeded_sampling_repeats(engine: HF) -> None:
    drawn = [engine.serve(requests(temperature=3.0, seed=seed))[1].token_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampler_keeps_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2]))
    generator = torch.Generator().manual_seed(0)

    def seen(**kwargs: Any) -> set[int]:
        return {Sampler()(logits, SamplingParams(**kwargs), generator) for _ in range(300)}

    assert seen(temperature=0.0) == {0}
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 2}
    assert seen(top_p=0.69) == {0, 2}
    assert seen(top_p=0.71) == {0, 2, 3}


class Recorder:
    """A probe that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Site, int]] = []

    def wants(self, site: Site) -> bool:
        return True

    def begin(self, site: Site, rows: int) -> None:
        self.calls.append(("begin", site, rows))

    def end(self, site: Site) -> None:
        self.calls.append(("end", site, 0))


def test_sites(engine: HF) -> None:
    probe = Recorder()
    engine.attach(probe, "eager")
    engine.add(requests()[1])
    engine.advance()
    begun = [site for what, site, _ in probe.calls if what == "begin"]
    assert {rows for what, _, rows in probe.calls if what == "begin"} == {19}
    layer = ["layer", "input_norm", *3 * ["qkv_proj"], *2 * ["qk_norm"], "o_proj", "post_norm", *2 * ["gate_up_proj"]]
    layer.append("down_proj")
    assert sorted(s.op for s in begun if s.layer_index == 1) == sorted(layer)
    assert [s.op for s in begun if s.layer_index == -1] == ["embed", "final_norm", "lm_head", "sample"]
    engine.detach()
    seen = len(probe.calls)
    engine.advance()
    assert len(probe.calls) == seen
    with pytest.raises(TraceUnsupported):
        engine.attach(probe, "graph")


def stepped(engine: HF) -> Step:
    engine.advance()
    return engine.last_step()


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the tiny checkpoint whose tensors `change` was called on."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    missing, misshapen = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.weight"
    with pytest.raises(InputError, match=f"lacks the tensor {missing}"):
        HF(config(edited(tmp_path / "a", lambda t: t.pop(missing))))
    with pytest.raises(InputError, match=rf"{misshapen} has shape \[64, 95\], the model needs \[64, 96\]"):
        HF(config(edited(tmp_path / "b", lambda t: t.update({misshapen: torch.zeros(64, 95)}))))
    with pytest.raises(InputError, match="cannot be loaded"):
        HF(config(tmp_path))
    broken = edited(tmp_path / "c", lambda t: None)
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(InputError, match="damaged"):
        HF(config(broken))


def test_what_cannot_run_is_refused(engine: HF, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="prompt of 256 tokens; the longest that fits, with one token of output, is 255"
    ):
        engine.add(Request("long", (1,) * 256, SamplingParams(max_tokens=1)))
    with pytest.raises(InputError, match="the model's 1024 positions"):
        HF(config(max_model_len=2048))
    with pytest.raises(InputError, match="no option speed"):
        HF(config(options={"speed": 1}))
    engine.close()
    engine.close()


def test_the_committed_checkpoint_is_what_it_says() -> None:
    written = json.loads((TINY / "config.json").read_text())
    assert (written["hidden_size"], written["num_hidden_layers"], written["vocab_size"]) == (96, 3, 260)
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 2_000_000
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "Übung \t\n “quoted”  x"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
