"""Scripts in nano-vLLM's style of calling run here when their import line is changed, and nothing else."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

import engines.fused
import engines.nano
from engines.base import InputError
from tests.engines import reference

LLMS = [engines.nano, engines.fused]
EOS = 257
IMPORT = "from nanovllm import LLM, SamplingParams"

# Their engine refuses temperature 0; this one is so low that the likeliest token is always drawn.
CHAT = f"""
import os
{IMPORT}
from transformers import AutoTokenizer

path = os.path.expanduser("~/huggingface/tiny/")
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
prompts = [
    tokenizer.apply_chat_template(
        [{{"role": "user", "content": question}}], tokenize=False, add_generation_prompt=True
    )
    for question in ("Who owns a block?", "Größe?")
]
outputs = llm.generate(prompts, SamplingParams(temperature=1e-4, max_tokens=16))
for prompt, output in zip(prompts, outputs):
    print(f"{{prompt!r}} {{output['text']!r}}")
"""

TOKENS = f"""
import os
from random import randint, seed
{IMPORT}

seed(0)
llm = LLM(os.path.expanduser("~/huggingface/tiny"), enforce_eager=False, max_model_len=512)
prompts = [[randint(0, 255) for _ in range(randint(10, 100))] for _ in range(12)]
settings = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(10, 50)) for _ in prompts]
llm.generate(["Warm up: "], SamplingParams())
outputs = llm.generate(prompts, settings, use_tqdm=False)
total = sum(setting.max_tokens for setting in settings)
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder with the tiny checkpoint, whose tokenizer knows a chat template."""
    folder = tmp_path / "huggingface" / "tiny"
    shutil.copytree(reference.TINY, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run(script: str, package, home: Path) -> dict:
    path = home / "script.py"
    path.write_text(script.replace(IMPORT, f"from {package.__name__} import LLM, SamplingParams"))
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("package", LLMS)
def test_chat(package, home, capsys):
    script = run(CHAT, package, home)
    prompts = ["<user>Who owns a block?<assistant>", "<user>Größe?<assistant>"]
    assert script["prompts"] == prompts
    want = reference.greedy([list(prompt.encode()) for prompt in prompts], 16)
    want = [tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens for tokens in want]
    texts = [bytes(token for token in tokens if token < 256).decode(errors="replace") for tokens in want]
    assert [output["token_ids"] for output in script["outputs"]] == want
    assert [output["text"] for output in script["outputs"]] == texts
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{prompt!r} {text!r}" for prompt, text in zip(prompts, texts, strict=True)]


@pytest.mark.parametrize("package", LLMS)
def test_token_ids_with_a_setting_each(package, home, capsys):
    script = run(TOKENS, package, home)
    lengths = [len(output["token_ids"]) for output in script["outputs"]]
    assert lengths == [setting.max_tokens for setting in script["settings"]]
    assert sum(lengths) == script["total"]
    progress = capsys.readouterr().err
    assert "1/1" in progress and "/12" not in progress  # use_tqdm=False says nothing


@pytest.mark.parametrize("package", LLMS)
def test_every_keyword_of_nano_vllm(package):
    llm = package.LLM(
        str(reference.TINY),
        max_num_batched_tokens=48,
        max_num_seqs=2,
        max_model_len=128,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=1,
        enforce_eager=True,
        kvcache_block_size=256,
    )
    capacity = llm.capacity
    assert (capacity.max_num_batched_tokens, capacity.max_num_seqs, capacity.max_model_len) == (48, 2, 128)
    assert llm.scheduler.blocks.block_size == 256
    assert llm.config.gpu_memory_utilization == 0.5 and llm.mode == "eager"
    prompts = reference.text_prompts((40, 17, 30))
    settings = package.SamplingParams(temperature=1e-4, max_tokens=8, ignore_eos=True)
    seen = []
    advance = llm.advance

    def watch() -> None:
        advance()
        seen.append(llm.last_step())

    llm.advance = watch
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == reference.greedy(prompts, 8)
    assert max(step.new_tokens for step in seen) == 48  # the second prompt is cut in two
    assert max(step.batch_size for step in seen) == 2
    with pytest.raises(InputError, match="the longest that fits is 127"):
        llm.generate([[1] * 128], settings, use_tqdm=False)
