"""Several ranks, over gloo on the CPU, compute what transformers computes; and no rank outlives or hangs another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engines.base import InputError, TraceUnsupported
from engines.fused import LLM as Fused
from engines.nano import LLM
from engines.nano.models import Decoder, read_model
from engines.nano.parallel import Followers, RankLost
from engines.nano.utils.loader import load_weights
from tests.engines import reference
from tests.engines.test_models import FAMILIES, make

ROOT = Path(__file__).parents[2]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
BOUND_S = 60.0
"""Ends and errors of other processes must be there within this; they take a second or two on an idle machine."""


def start(folder: Path = reference.TINY, ranks: int = 2, **changes) -> LLM:
    return LLM(reference.config(folder, {"tensor_parallel_size": ranks}, **changes))


def alive(pid: int) -> bool:
    """Whether a process runs (one that ended but was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + BOUND_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def pids(engine: LLM) -> list[int]:
    return [process.pid for process in engine.runner.followers.processes]


# (family of test_models, changes, ranks): biased projections, rotary scaling, head norms; heads tied and not.
CASES = {
    "qwen3-untied-4": ("qwen3", {}, 4),
    "qwen2-tied-4": ("qwen2", {}, 4),
    "qwen2-untied-2": ("qwen2", {"tie_word_embeddings": False}, 2),
    "llama-tied-2": ("llama", {}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_and_close_ends_all_ranks(tmp_path, case):
    family, changes, ranks = CASES[case]
    name, own = FAMILIES[family]
    folder = make(tmp_path / case, name, **(own | HEADS | changes))
    engine = start(folder, ranks)
    processes = pids(engine)
    assert len(processes) == ranks - 1 and all(alive(pid) for pid in processes)
    try:
        scores = engine.score(reference.requests([[5, 17, 42, 8], list(range(10, 90)), [99]], 5))
    finally:
        engine.close()
    for scored in scores:
        want = reference.logits(scored.prompt_token_ids, scored.token_ids, folder)
        assert (scored.logits - want).norm() / want.norm() < 2e-5
    assert not any(alive(pid) for pid in processes)
    assert not dist.is_initialized()
    engine.close()


@pytest.fixture(scope="module")
def engine():
    """Two ranks on the tiny model: chunked prompts, prefix reuse, and a cache so small that sequences are preempted."""
    engine = start(prefix_caching=True, max_num_batched_tokens=40, kv_cache_tokens=160)
    yield engine
    engine.close()


def test_greedy_with_chunks_and_preemption(engine):
    prompts = reference.text_prompts((5, 60, 90, 33))
    want = reference.greedy(prompts, 20)
    for _ in range(2):  # the second time over reused prefixes
        results = engine.serve(reference.requests(prompts, 20))
        assert [list(result.token_ids) for result in results] == want
    assert engine.notes["preemptions"] > 0


def test_abort(engine):
    prompts = reference.text_prompts((20, 30), seed=1)
    first, second = reference.requests(prompts, 10)
    engine.add(first)
    kept = engine.add(second)
    engine.advance()
    engine.abort([first.request_id])
    while engine.has_unfinished():
        engine.advance()
    assert [kept.output_token_ids] == reference.greedy(prompts[1:], 10)


def test_tracing_is_refused(engine):
    with pytest.raises(TraceUnsupported, match="tensor_parallel_size 1 only"):
        engine.attach(None, "eager")


def test_one_at_a_time_in_a_process(engine):
    with pytest.raises(InputError, match="in a torch.distributed group already"):
        start()


RANK_0 = """
import sys
from tests.engines import test_tensor_parallel as t
from tests.engines import reference
if __name__ == "__main__":
    engine = t.start()
    prompts = reference.text_prompts((5, 60))
    tokens = [list(r.token_ids) for r in engine.serve(reference.requests(prompts, 8))]
    print(t.pids(engine), tokens, sep="\\n", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, None])
def test_no_rank_outlives_rank_0(engine, tmp_path, death):
    """Beside the fixture's engine, whose ranks meet elsewhere. Rank 0 is killed, or ends without closing its engine."""
    script = tmp_path / "rank_0.py"
    script.write_text(RANK_0)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        (follower,) = eval(process.stdout.readline())
        assert eval(process.stdout.readline()) == reference.greedy(reference.text_prompts((5, 60)), 8)
        assert alive(follower)
        if death is not None:
            process.send_signal(death)
        process.stdin.close()
        assert process.wait(BOUND_S) == (0 if death is None else -death)
    assert wait_until(lambda: not alive(follower))


@pytest.mark.parametrize("when", ["idle", "computing"])
def test_a_killed_follower_is_an_error(engine, when):
    """Comes after all that need the fixture's engine: the second of these starts its own."""
    own = engine if when == "idle" else None
    if own is None:
        engine.close()
        own = start()
    (follower,) = pids(own)
    for request in reference.requests(reference.text_prompts((20, 30)), 50):
        own.add(request)
    own.advance()
    began = time.monotonic()
    if when == "idle":
        os.kill(follower, signal.SIGKILL)
        assert wait_until(lambda: not alive(follower))
    else:
        os.kill(follower, signal.SIGSTOP)  # rank 0 sends a step, waits in a collective, and then the follower dies
        subprocess.Popen(["/bin/sh", "-c", f"sleep 1; kill -9 {follower}"])
    with pytest.raises(RankLost, match="rank 1 ended with exit code -9"):
        own.advance()
    assert time.monotonic() - began < BOUND_S
    own.close()
    assert not alive(follower) and not dist.is_initialized()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_rank_0_ends_all_ranks(monkeypatch, error):
    """Rank 1 waits in a layer that rank 0 never comes to; a later step must not meet it there."""
    own = start()
    (follower,) = pids(own)

    def fail(*_args):
        raise error

    def serve():
        return own.serve(reference.requests(reference.text_prompts((20,)), 6))

    with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
        patched.setattr(own.runner.model.model.layers[1], "forward", fail)
        serve()
    assert raised.value is error
    with ThreadPoolExecutor(1) as thread:
        later = thread.submit(serve)
        try:
            with pytest.raises(RankLost, match=f"can only be closed. rank 0 failed: {re.escape(repr(error))}"):
                later.result(BOUND_S)
        finally:
            if alive(follower):
                os.kill(follower, signal.SIGKILL)  # lets the thread end
    assert not alive(follower) and not dist.is_initialized()
    own.close()


def test_a_follower_that_fails_in_a_step_tells_why():
    own = start()
    own.runner.followers.send("prefill", None)
    with pytest.raises(RankLost, match=r"rank 1 failed: Traceback (?s:.*)AttributeError"):
        own.serve(reference.requests(reference.text_prompts((20,)), 6))
    own.close()


def test_a_follower_that_cannot_start_is_an_error(monkeypatch):
    started = []
    await_loaded = Followers.await_loaded

    def kill_one(self):
        started.extend(process.pid for process in self.processes)
        os.kill(started[0], signal.SIGKILL)
        await_loaded(self)

    monkeypatch.setattr(Followers, "await_loaded", kill_one)
    with pytest.raises(RankLost, match="rank 1 ended with exit code -9"):
        start()
    assert not any(alive(pid) for pid in started)


def test_a_failing_follower_tells_why(monkeypatch):
    """Rank 1 fails where rank 0 does not: the checkpoint is gone once rank 0 has read its share."""
    monkeypatch.setattr("engines.nano.parallel.Followers.__init__", with_other_checkpoint(Followers.__init__))
    with pytest.raises(RankLost, match=r"rank 1 failed: (?s:.*)is no checkpoint: it has no config\.json"):
        start()


def with_other_checkpoint(init):
    return lambda self, config, options: init(self, replace(config, checkpoint=Path("/nonexistent")), options)


# --- what is refused, and how weights are shared: no processes ---


def test_what_does_not_divide_is_refused(tmp_path):
    with pytest.raises(InputError, match="tensor_parallel_size 4 does not divide the model's number of query heads, 6"):
        start(ranks=4)
    config, _ = read_model(reference.TINY)
    for field, words in (
        ("num_kv_heads", "number of key/value heads, 5"),
        ("intermediate_size", "intermediate size, 5"),
        ("vocab_size", "vocabulary, 5"),
    ):
        with pytest.raises(InputError, match=words):
            replace(config, **{field: 5}).share(0, 2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="tensor_parallel_size 2 needs as many GPUs; there are 1"):
        start(device="cuda")


def test_zero_ranks_are_refused():
    with pytest.raises(InputError, match="at least 1, not 0"):
        start(ranks=0)


def test_fused_refuses():
    with pytest.raises(InputError, match="Engine fused runs on one GPU"):
        Fused(reference.config(options={"tensor_parallel_size": 2}))


def test_a_tensor_that_is_not_shared_must_have_its_own_shape(tmp_path):
    """Twice as long is not "two ranks' share" where ranks share nothing."""
    folder = make(tmp_path / "model", "Qwen2", **HEADS)
    config, family = read_model(folder)
    twice = replace(config, hidden_size=32).share(0, 2)
    with pytest.raises(InputError, match=r"has shape \[(100, )?64.*\], not \[(100, )?32"):
        load_weights(Decoder(twice, family, 64, lambda *_: None), folder, 0, 2)
