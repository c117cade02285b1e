"""Scripts written for nano-vLLM or vLLM run here with another import."""

from __future__ import annotations

import pytest

import engines.fused
import engines.nano
from engines.base import InputError
from tests.engines import reference

LLMS = [engines.nano, engines.fused]
TEXTS = ["The engine keeps ", "A block belongs to one sequence "]


@pytest.mark.parametrize("package", LLMS)
def test_nano_vllm_script(package):
    llm = package.LLM(str(reference.TINY), enforce_eager=True, tensor_parallel_size=1, max_model_len=256)
    outputs = llm.generate(TEXTS, package.SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    want = reference.greedy([list(text.encode()) for text in TEXTS], 12)
    assert [output["token_ids"] for output in outputs] == want
    assert [output["text"] for output in outputs] == [bytes(tokens).decode() for tokens in want]


@pytest.mark.parametrize("package", LLMS)
def test_vllm_script(package):
    llm = package.LLM(model=str(reference.TINY), dtype="float32", seed=0, gpu_memory_utilization=0.5)
    prompts = [{"prompt_token_ids": list(text.encode())} for text in TEXTS]
    settings = [package.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 8)]
    outputs = llm.generate(prompts, settings)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 8]
    assert outputs[1].prompt_token_ids == list(TEXTS[1].encode())
    assert outputs[0].outputs[0].finish_reason == "length"


def test_one_prompt_and_default_settings():
    (output,) = engines.nano.LLM(reference.TINY, max_model_len=128).generate("The block ", use_tqdm=False)
    assert output.prompt == "The block " and len(output["token_ids"]) <= 64


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(InputError, match="did you mean enforce_eager"):
        engines.nano.LLM(reference.TINY, enforce_eagre=True)


def test_prompt_longer_than_the_model():
    llm = engines.nano.LLM(reference.TINY, max_model_len=32)
    with pytest.raises(InputError, match="prompt of 32 tokens.*longest that fits is 31"):
        llm.generate([[1] * 32], use_tqdm=False)
    with pytest.raises(InputError, match="outside the vocabulary"):
        llm.generate([[1, 260]], use_tqdm=False)
    with pytest.raises(InputError, match="model takes"):
        engines.nano.LLM(reference.TINY, max_model_len=100_000)


def test_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        engines.nano.LLM(tmp_path)
