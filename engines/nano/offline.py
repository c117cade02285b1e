"""The calls of nano-vLLM's and vLLM's offline scripts, `LLM(folder, ...)` and `generate`; and `stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch

from engines.base import EngineConfig, InputError, Request, RequestResult, SamplingParams
from engines.nano.models.config import ModelConfig
from engines.nano.sequence import Sequence as NanoSequence
from engines.nano.utils.detokenize import TextStream
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
    """One continuation, with vLLM's names. `finish_reason` is None while more is to come."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


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


@dataclass(frozen=True, kw_only=True)
class StreamOutput(RequestOutput):
    """A request after one more token. `outputs[0]` holds all of it so far, as vLLM's streams do by default.

    prompt_index: which of the prompts, from 0
    token_id: the new token
    delta: the text that it completed; empty while a character lacks bytes, and for special tokens
    """

    prompt_index: int
    token_id: int
    delta: str


class OfflineCalls:
    """Mixed into an engine that serves: prompts as texts or token ids, a progress bar, texts back."""

    config: EngineConfig
    serve: Callable[..., list[RequestResult]]
    add: Callable[[Request], NanoSequence]
    advance: Callable[[], None]
    abort: Callable[[Iterable[str]], None]
    streamed: set[str]  # ids of the requests of streams; an abort takes them out
    _ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts (texts, token ids, or vLLM's {"prompt_token_ids": ...}); outputs in their order."""
        from tqdm import tqdm

        asked = self._requests(prompts, sampling_params)
        with tqdm(total=len(asked), desc="Generating", disable=not use_tqdm) as bar:
            results = self.serve([request for _, request in asked], lambda _result: bar.update())
        return [
            RequestOutput(
                result.request_id, prompt, list(request.prompt_token_ids),
                [CompletionOutput(0, self._text(result.token_ids), list(result.token_ids), result.finish_reason)],
            )
            for (prompt, request), result in zip(asked, results, strict=True)
        ]  # fmt: skip

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamOutput]:
        """Continue prompts as `generate` does; an output for each new token of each of them, as the steps end.

        ```
        for output in llm.stream(["Once upon", "In the end"], SamplingParams(max_tokens=32)):
            reason = output.outputs[0].finish_reason  # None but at the request's last token
            print(output.prompt_index, output.token_id, repr(output.delta), reason)
        ```

        The deltas of a request, joined, are the text that `generate` gives. Leaving the loop aborts what is unfinished
        and frees its cache (in full: closing the generator does). `abort([output.request_id])` inside the loop ends one
        request, of which nothing more comes. Requests start at the first `next`; wrong arguments are told at once.
        """
        return self._stream(self._requests(prompts, sampling_params))

    def _stream(self, asked: list[tuple[str | None, Request]]) -> Iterator[StreamOutput]:
        ids = {request.request_id for _, request in asked}
        self.streamed |= ids
        try:
            live = [
                _Growing(index, prompt, list(request.prompt_token_ids), self.add(request), TextStream(self._text))
                for index, (prompt, request) in enumerate(asked)
            ]
            while live:
                if not any(growing.behind for growing in live):  # another loop may have run the engine meanwhile
                    self.advance()
                for growing in live:
                    while growing.behind and growing.sequence.request_id in self.streamed:
                        yield growing.next_output()
                live = [growing for growing in live if growing.open and growing.sequence.request_id in self.streamed]
        finally:
            self.abort(ids)

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[str | None, Request]]:
        """Each prompt, where it is a text, and its request."""
        batch = _as_list(prompts)
        settings = sampling_params or SamplingParams()
        each = [settings] * len(batch) if isinstance(settings, SamplingParams) else list(settings)
        if len(each) != len(batch):
            raise InputError(f"{len(batch)} prompts need as many sampling params, not {len(each)}.")
        return [
            (
                prompt if isinstance(prompt, str) else None,
                Request(f"generate {next(self._ids)}", tuple(self._token_ids(prompt)), sampling),
            )
            for prompt, sampling in zip(batch, each, strict=True)
        ]

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

    def _text(self, token_ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        # As in vLLM, spaces are left as they are: tidying them would take back what a stream has given out.
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass
class _Growing:
    """A request of a stream, and how many of its tokens were given out."""

    prompt_index: int
    prompt: str | None
    prompt_token_ids: list[int]
    sequence: NanoSequence
    text: TextStream
    given: int = 0

    @property
    def behind(self) -> bool:
        return self.given < self.sequence.num_output

    @property
    def open(self) -> bool:
        return self.behind or not self.sequence.finish_reason

    def next_output(self) -> StreamOutput:
        sequence = self.sequence
        self.given += 1
        tokens = sequence.output_token_ids[: self.given]
        delta = self.text.push(tokens[-1])
        finish_reason = None if self.behind else sequence.finish_reason or None
        if finish_reason:
            delta += self.text.flush()
        return StreamOutput(
            sequence.request_id, self.prompt, self.prompt_token_ids,
            [CompletionOutput(0, self.text.text, tokens, finish_reason)], finish_reason is not None,
            prompt_index=self.prompt_index, token_id=tokens[-1], delta=delta,
        )  # fmt: skip


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, a dict, a list of numbers) or several, as several."""
    if isinstance(prompts, (str, dict)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
