"""Small runs for tests: of the tiny checkpoint, and of an engine without a model, whose steps each test may script."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.base import Capacity, EngineConfig, HostPhases, Request, RequestResult, Scheduled, Step, TraceUnsupported
from harness import runner
from harness.config import Config, compose
from harness.progress import Reporter
from harness.runner import run

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"
QUICK = ("instrument.max_iterations=10", "instrument.traced_iterations=3", "instrument.max_seconds_per_shape=2")


def config(*overrides: str) -> Config:
    return compose(["engine=hf", "model=tiny", f"weights={TINY}", "workload=smoke", "device=cpu", *QUICK, *overrides])


def silent() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


class Scripted:
    """An engine without a model. `on_step` sees each step before it is returned, and may change it or raise."""

    name, arm, mode = "scripted", "default", "eager"

    def __init__(self, on_step: Callable[[Step], Step] = lambda step: step, kv_cache_tokens: int = 100_000) -> None:
        self.on_step = on_step
        self.launches_ahead = False
        self.capacity = Capacity(1024, 64, 16384, kv_cache_tokens)
        self.notes: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.waiting: list[Request] = []
        self.log: list[str] = []

    def start(self, _target: str, config: EngineConfig) -> Scripted:
        self.config = config
        return self

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def host_phases(self) -> HostPhases:
        return {}

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.left)

    def last_step(self) -> Step:
        return self.last

    def advance(self) -> None:
        if self.waiting:
            scheduled = tuple(Scheduled(r.request_id, len(r.prompt_token_ids), 0) for r in self.waiting)
            self.left |= {r.request_id: r.sampling.max_tokens for r in self.waiting}
            self.waiting, kind = [], "prefill"
        else:
            scheduled, kind = tuple(Scheduled(name, 1, self.lengths[name]) for name in self.left), "decode"
        self.log.append(f"{kind} {len(scheduled)}" + ("" if gc.isenabled() else " undisturbed"))
        step = self.on_step(Step(kind, scheduled))  # type: ignore[arg-type]
        for s in scheduled:
            self.lengths[s.request_id] = s.context_len + s.new_tokens
            self.left[s.request_id] -= 1
        finished = tuple(name for name, left in self.left.items() if left == 0)
        self.left = {name: left for name, left in self.left.items() if left}
        self.last = Step(step.kind, step.scheduled, (), finished)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.waiting = []
        self.left = {name: left for name, left in self.left.items() if name not in set(request_ids)}

    def serve(self, requests: Iterable[Request], on_finish: Any = None) -> list[RequestResult]:
        return []

    def score(self, requests: Iterable[Request]) -> list[Any]:
        return []

    def attach(self, probe: Any, mode: str) -> None:
        self.log.append(f"attach {mode}")
        if mode == "graph":
            raise TraceUnsupported("no graphs here")

    def detach(self) -> None:
        self.log.append("detach")

    def close(self) -> None:
        self.log.append("close")


def run_scripted(engine: Scripted, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    monkeypatch.setattr(runner, "start_engine", engine.start)
    return run(config("verify=false", *overrides), run_dir, silent())
