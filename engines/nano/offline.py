"""The calls of nano-vLLM's and vLLM's offline scripts: `LLM(folder, ...)` and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch

from engines.base import EngineConfig, InputError, Request, RequestResult, SamplingParams
from engines.nano.models.config import ModelConfig
from engines.nano.utils.loader import read_config

Prompt = str | Sequence[int] | dict[str, Any]

RENAMED = {"kvcache_block_size": "block_size", "enable_prefix_caching": "prefix_caching"}
"""Keywords of the other engines that have another name here."""


def config_of(checkpoint: Path, keywords: dict[str, Any]) -> EngineConfig:
    """An `EngineConfig` from a script's keywords: ours, nano-vLLM's and vLLM's; what none of them knows is refused.

    Like there, prefixes are reused unless switched off, and a model longer than 4096 tokens is cut to that.
    """
    checkpoint = checkpoint.expanduser()
    known = {RENAMED.get(name, name): value for name, value in keywords.items()}
    if known.pop("tensor_parallel_size", 1) != 1:
        raise InputError("tensor_parallel_size must be 1: this engine runs on one GPU.")
    longest = ModelConfig.from_json(read_config(checkpoint), checkpoint).max_position
    known.setdefault("max_model_len", min(4096, longest))
    known.setdefault("prefix_caching", True)
    known.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    dtype = known.pop("dtype", "auto")
    known["dtype"] = ("bfloat16" if known["device"] == "cuda" else "float32") if dtype == "auto" else str(dtype)
    known["dtype"] = known["dtype"].removeprefix("torch.")
    ours = {field.name for field in fields(EngineConfig)} - {"checkpoint", "options"}
    options = {name: known.pop(name) for name in list(known) if name not in ours}
    return EngineConfig(checkpoint, options=options, **known)


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation, with vLLM's names."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """`output["text"]` and `output["token_ids"]` as in nano-vLLM, `output.outputs[0].text` as in vLLM."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True

    def __getitem__(self, key: str) -> str | list[int]:
        if key not in ("text", "token_ids"):
            raise KeyError(key)
        return getattr(self.outputs[0], key)


class OfflineCalls:
    """Mixed into an engine that serves: prompts as texts or token ids, a progress bar, texts back."""

    config: EngineConfig
    serve: Callable[..., list[RequestResult]]
    _ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts (texts, token ids, or vLLM's {"prompt_token_ids": ...}); outputs in their order."""
        from tqdm import tqdm

        batch = _as_list(prompts)
        settings = sampling_params or SamplingParams()
        each = [settings] * len(batch) if isinstance(settings, SamplingParams) else list(settings)
        if len(each) != len(batch):
            raise InputError(f"{len(batch)} prompts need as many sampling params, not {len(each)}.")
        ids = [self._token_ids(prompt) for prompt in batch]
        requests = [
            Request(f"generate {next(self._ids)}", tuple(tokens), sampling)
            for tokens, sampling in zip(ids, each, strict=True)
        ]
        with tqdm(total=len(requests), desc="Generating", disable=not use_tqdm) as bar:
            results = self.serve(requests, lambda _result: bar.update())
        return [
            RequestOutput(
                result.request_id, prompt if isinstance(prompt, str) else None, tokens,
                [CompletionOutput(0, self._text(result.token_ids), list(result.token_ids), result.finish_reason)],
            )
            for prompt, tokens, result in zip(batch, ids, results, strict=True)
        ]  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, None where it has none."""
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = None
            folder = Path(self.config.checkpoint)
            if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(folder)
        return self._tokenizer

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, dict):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise InputError(f"{self.config.checkpoint} has no tokenizer; give prompts as token ids.")
        return self.tokenizer.encode(prompt)

    def _text(self, token_ids: tuple[int, ...]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, a dict, a list of numbers) or several, as several."""
    if isinstance(prompts, (str, dict)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
