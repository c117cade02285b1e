"""`NanoVLLM` around an engine with upstream's interface, since upstream runs on GPUs only."""

from __future__ import annotations

import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from engines.base import Request, SamplingParams
from engines.nano_vllm.engine import NanoVLLM

VOCAB = 8


class Runner:
    fails_at = -1
    calls = 0

    def run_model(self, rows: int) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError("made up")
        return torch.eye(VOCAB)[torch.full((rows,), self.calls)]


class Scheduler:
    def __init__(self) -> None:
        self.waiting: deque = deque()
        self.running: deque = deque()
        self.block_manager = SimpleNamespace(deallocate=lambda sequence: sequence.block_table.clear())

    def schedule(self):
        prefill = bool(self.waiting)
        if prefill:
            self.running += self.waiting
            for sequence in self.waiting:
                sequence.block_table.append(0)
            self.waiting.clear()
        return list(self.running), prefill


class Sequence:
    def __init__(self, number: int, tokens: list[int], max_tokens: int) -> None:
        self.seq_id, self.tokens, self.max_tokens = number, tokens, max_tokens
        self.num_prompt_tokens = self.num_scheduled_tokens = len(tokens)
        self.num_cached_tokens, self.is_finished = 0, False
        self.block_table: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def last_token(self) -> int:
        return self.tokens[-1]


class Upstream:
    """As much of `nanovllm.LLMEngine` as is called: one step computes all prompts, each other one a token of all.

    The token is the number of the call of the model.
    """

    def __init__(self) -> None:
        self.scheduler, self.model_runner, self.made = Scheduler(), Runner(), 0

    def add_request(self, tokens: list[int], sampling: SimpleNamespace) -> None:
        self.scheduler.waiting.append(Sequence(self.made, tokens, sampling.max_tokens))
        self.made += 1

    def is_finished(self) -> bool:
        return not (self.scheduler.waiting or self.scheduler.running)

    def step(self) -> None:
        sequences, _ = self.scheduler.schedule()
        for sequence, row in zip(sequences, self.model_runner.run_model(len(sequences)), strict=True):
            sequence.tokens.append(int(row.argmax()))
            if len(sequence) - sequence.num_prompt_tokens == sequence.max_tokens:
                sequence.is_finished = True
                self.scheduler.running.remove(sequence)
                sequence.block_table.clear()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> NanoVLLM:
    monkeypatch.setitem(sys.modules, "nanovllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = NanoVLLM.__new__(NanoVLLM)
    engine._engine = Upstream()
    engine._sequences, engine._names = {}, {}
    scheduler = engine._engine.scheduler
    engine._schedule, scheduler.schedule = scheduler.schedule, engine._watched_schedule
    return engine


def test_a_failed_score_leaves_nothing_queued(engine: NanoVLLM) -> None:
    requests = [Request(name, (1, 2, 3), SamplingParams(max_tokens=4)) for name in "ab"]
    runner = engine._engine.model_runner
    runner.fails_at = 2
    with pytest.raises(torch.OutOfMemoryError):
        engine.score(requests)
    assert not engine.has_unfinished()
    assert (engine._sequences, engine._names) == ({}, {})
    runner.calls, runner.fails_at = 0, -1
    for scored in engine.score(requests):  # again, under the same names
        assert scored.token_ids == (1, 2, 3, 4)
        assert scored.logits.argmax(-1).tolist() == [1, 2, 3, 4]
