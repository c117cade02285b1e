"""Single decode steps add up to the calls that are made of them, also for an engine that launches steps ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import Any

import pytest
import torch

from engines.base import EngineConfig
from harness.config import compose
from harness.engine_classes import start_engine
from harness.passes import ShapeSteps
from harness.rounds import Blocks, Item
from harness.weights import resolve
from harness.workloads import Call, Prompts, Shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = 14
SEQUENCES = 8
SHAPE = Shape("decode", SEQUENCES, 192)
CALL = Call(SEQUENCES, 128, 129)
"""Its contexts are 192 tokens on average, as the shape's."""
PAUSE_S = 3e-4
NEAR = {"nano": 0.15, "fused": 0.05}
"""Whoever waits for the host in every step differs by what the host does."""


@pytest.fixture(scope="module", params=["nano", "fused"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    conf = compose([f"engine={request.param}", f"model.num_layers={LAYERS}"])
    config = EngineConfig(
        resolve(conf.model, "random", 0).path, max_model_len=512, max_num_seqs=SEQUENCES, max_num_batched_tokens=2048,
        gpu_memory_utilization=0.1, kv_cache_tokens=8192,
    )  # fmt: skip
    started = start_engine(conf.engine.target, config)
    yield started
    started.close()


def test_a_step_takes_what_a_token_of_a_call_takes(engine: Any) -> None:
    item = Item("tpot_ms", CALL, SEQUENCES)
    blocks = Blocks(engine, Prompts(10_000, 1), 0.6, [])
    blocks.warm_up(item)
    tpot_us = median(1e3 * blocks.measure(item)[0] for _ in range(7))
    walls = []
    with closing(ShapeSteps(engine, Prompts(10_000, 2), 0.6).samples(SHAPE)) as source:
        for _ in range(3 * SHAPE.width):
            walls.append(next(source).wall_us)
            time.sleep(PAUSE_S)  # someone looks at the sample
    print(f"{engine.name}: {median(walls):.1f} us a step, {tpot_us:.1f} us a token")
    assert median(walls) == pytest.approx(tpot_us, rel=NEAR[engine.name])
