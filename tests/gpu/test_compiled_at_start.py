"""No request waits for a compiler: what steps of all kinds run is there when the engine has started."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from engines.base import EngineConfig, Request, SamplingParams
from harness.config import compose
from harness.engine_classes import start_engine
from harness.weights import resolve

triton = pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCABULARY = 10_000


@pytest.fixture(scope="module", params=["nano", "fused"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    conf = compose([f"engine={request.param}", "model.num_layers=3"])
    config = EngineConfig(
        resolve(conf.model, "random", 0).path, max_model_len=2048, max_num_seqs=128, max_num_batched_tokens=8192,
        gpu_memory_utilization=0.1, kv_cache_tokens=65536, prefix_caching=True,
    )  # fmt: skip
    alone: list[str] = []  # compiled where the engine waited for nothing else meanwhile
    graphs = counters["stats"]["unique_graphs"]

    def note(**kernel: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            alone.append(kernel["repr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
        started = start_engine(conf.engine.target, config)
    yield started, alone, counters["stats"]["unique_graphs"] - graphs
    started.close()


def requests_of(lengths: list[int], draw: random.Random) -> list[Request]:
    """Greedy, drawn and cut ones in turns, of random tokens; nothing in the cache is theirs."""
    all_of = {"max_tokens": 4, "ignore_eos": True}
    samplings = [SamplingParams(temperature=temperature, **all_of) for temperature in (0.0, 0.6)]
    samplings.append(SamplingParams(temperature=0.6, top_k=5, top_p=0.9, **all_of))
    return [
        Request(f"{draw.random()}", tuple(draw.choices(range(VOCABULARY), k=length)), samplings[(i + length) % 3])
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("engine", ["fused"], indirect=True)
def test_kernels_are_compiled_together(engine: Any) -> None:
    started, alone, by_torch = engine
    assert alone == [] and by_torch == 0
    stages = ["load weights", "compile kernels", "run steps of all kinds", "capture graphs"]
    assert list(started.notes["start_s"]) == stages


def test_nothing_is_compiled_for_requests(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, *_ = engine
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kernel: compiled.append(kernel["repr"]))
    graphs = counters["stats"]["unique_graphs"]
    draw = random.Random(0)
    calls = [[length] for length in (1, 7, 33, 100, 257, 600, 1100, 2000)]  # some fit into a captured step
    calls += [[draw.randint(1, 40) for _ in range(count)] for count in (2, 5, 70, 128)]  # and some are too many
    calls += [[draw.randint(50, 1500) for _ in range(count)] for count in (9, 40)]  # and these are cut
    for lengths in calls:
        requests = requests_of(lengths, draw)
        started.serve(requests)
        again = [Request(f"{r.request_id} again", r.prompt_token_ids, r.sampling) for r in requests]
        started.serve(again)  # their first blocks are in the cache
    assert compiled == []
    assert counters["stats"]["unique_graphs"] == graphs
