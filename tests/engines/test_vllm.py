"""The vLLM adapter against the real package.

vLLM keeps process-wide state, so the tests of a class share one engine, which is closed before the next class starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engines.base import (
    NO_LAYER,
    WHOLE_LAYER,
    Engine,
    EngineConfig,
    InputError,
    Request,
    SamplingParams,
    Scheduled,
    Site,
    TraceUnsupported,
)
from engines.vllm import VLLM, arms, package, processes, steps
from tests.engines import reference

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
LENGTHS = (1, 15, 16, 17, 40, 65)
NUM_TOKENS = 20
NUM_LAYERS = 3


def config(**changes) -> EngineConfig:
    settings = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 8} | changes
    return EngineConfig(reference.TINY, **({"max_num_batched_tokens": 512} | settings))


def step_of(engine):
    engine.advance()
    return engine.last_step()


def drain(engine, requests):
    """Add and step to the end: (steps, tokens of each request)."""
    for request in requests:
        engine.add(request)
    done, tokens = [], {request.request_id: [] for request in requests}
    while engine.has_unfinished():
        done.append(step_of(engine))
        for request_id, token in done[-1].tokens:
            tokens[request_id].append(token)
    return done, list(tokens.values())


@pytest.fixture(scope="module")
def prompts():
    return reference.text_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(prompts):
    return reference.greedy(prompts, NUM_TOKENS)


@needs_vllm
def test_versions_that_were_not_tried_get_a_notice(monkeypatch, capsys):
    import vllm

    monkeypatch.setattr(package, "_noticed", set())
    assert package.notice() == "" and package.version() in package.TRIED
    for found, text in (("9.9.9", "check its numbers"), ("0.33.1+cpu", "only its source was read")):
        monkeypatch.setattr(vllm, "__version__", found)
        assert text in package.notice() and package.notice()
        assert capsys.readouterr().err.count("was not tried") == 1  # said once


@needs_vllm
def test_a_child_that_does_not_end_is_killed():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = [process for process in processes.children() if process.pid == child.pid]
    processes.end(found, grace_s=0.1)
    assert len(found) == 1 and not found[0].is_running()
    child.wait(10)


@needs_vllm
def test_a_changed_internal_is_named():
    with pytest.raises(InputError, match=r"changed inside: .* has no 'update_from_output'"):
        steps.SchedulerTap(SimpleNamespace(scheduler=SimpleNamespace(schedule=None)))
    with pytest.raises(InputError, match="no engine argument 'max_modle_len'"):
        arms.engine_args(config(options={"engine_args": {"max_modle_len": 3}}), arms.ARMS["eager"])


@needs_vllm
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"max_model_len": 100_000}, "100000"),  # fails before anything runs
        ({"kv_cache_tokens": 64}, "KV cache"),  # fails half way, with the model loaded
        ({"device": "cuda"}, "the installed vllm is for cpu"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens"),
    ],
)
def test_a_start_that_cannot_work_is_one_sentence(changes, reason):
    with pytest.raises(InputError, match=reason) as caught:
        VLLM(config(options={"arm": "eager"}, **changes))
    assert "\n" not in str(caught.value)
    assert not processes.children()


class Recorder:
    """A probe that keeps what it is told."""

    def __init__(self):
        self.began, self.open = [], []

    def wants(self, site):
        return True

    def begin(self, site, rows):
        self.began.append((site, rows))
        self.open.append(site)

    def end(self, site):
        assert self.open.pop() == site


def sites_of(num_layers):
    attention = ("input_norm", "qkv_proj", "qk_norm", "qk_norm", "rope", "kv_write+attention", "o_proj")
    mlp = ("post_norm", "gate_up_proj", "silu_mul", "down_proj")
    found = [Site(NO_LAYER, "embed", "embed")]
    for index in range(num_layers):
        found.append(Site(index, WHOLE_LAYER, WHOLE_LAYER))
        found += [Site(index, "attention", op) for op in attention] + [Site(index, "mlp", op) for op in mlp]
    return [
        *found,
        Site(NO_LAYER, "head", "final_norm"),
        Site(NO_LAYER, "head", "lm_head"),
        Site(NO_LAYER, "sample", "sample"),
    ]


@needs_vllm
def test_the_traced_worker_hooks_the_model_before_graphs_are_captured(monkeypatch):
    from vllm.v1.worker.cpu_worker import CPUWorker

    from engines.vllm import worker
    from engines.vllm.live import Live
    from engines.vllm.requests import queue

    class Base(CPUWorker):
        def compile_or_warm_up_model(self):  # where a GPU worker captures
            captured.append(len(next(iter(self.get_model().model.layers))._forward_pre_hooks))
            return super().compile_or_warm_up_model()

    # The same class over the CPU's worker: there is no GPU to capture on.
    traced = type("TracedCPUWorker", (worker.TracedWorker, Base), {})
    monkeypatch.setattr(worker, "TracedCPUWorker", traced, raising=False)
    captured, probe = [], Recorder()
    worker.pending[:] = [probe]
    live = Live(config(), arms.ARMS["eager"], f"{worker.__name__}.TracedCPUWorker")
    worker.pending.clear()
    try:
        assert captured == [1]
        queue(live.engine, reference.requests([[1, 2, 3]], 1)[0], ())
        probe.began.clear()
        live.engine.step()
        assert [site for site, _ in probe.began] == sites_of(NUM_LAYERS)
    finally:
        live.close()


@pytest.fixture(scope="class")
def small():
    settings = {"kv_cache_tokens": 256, "max_num_batched_tokens": 48, "prefix_caching": True}
    engine = VLLM(config(options={"arm": "eager"}, **settings))
    yield engine
    engine.close()


@pytest.fixture(scope="class")
def engine():
    engine = VLLM(config(options={"engine_args": {"disable_log_stats": False}}))  # its own clocks are compared
    yield engine
    engine.close()
    engine.close()
    assert not processes.children()


@pytest.fixture
def cpu_schedules_ahead(monkeypatch):
    """vLLM's CPU platform turns asynchronous scheduling off; its engine core runs it there as well."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def checked(vllm_config):
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    monkeypatch.setattr(type(current_platform), "check_and_update_config", staticmethod(checked))


def serving(arm, **engine_args):
    """An engine that serves in `arm`, without compiling, which takes long."""
    settings = {"enforce_eager": True, "disable_log_stats": False} | engine_args
    options = {"arm": "eager", "serve_arm": arm, "engine_args": settings}
    return VLLM(config(options=options))


@needs_vllm
class TestServing:
    """Whole requests in this process; `TestArms` serves in vLLM's own."""

    def check(self, engine, prompts, expected):
        requests = [
            Request(f"r{i}", tuple(prompts[i % 6]), SamplingParams(0.0, max_tokens=1 + i, ignore_eos=True))
            for i in range(14)
        ]
        for i, result in enumerate(engine.serve(requests)):
            assert list(result.token_ids) == expected[i % 6][: 1 + i] and result.finish_reason == "length"
            assert len(result.token_times_s) == 1 + i
            # A step of its own for every token, so a time of its own.
            times = (result.arrival_s, *result.token_times_s)
            assert list(times) == sorted(set(times))
        assert not processes.children()

    @pytest.mark.usefixtures("cpu_schedules_ahead")
    def test_scheduling_ahead_in_process(self, prompts, expected):
        engine = serving("inproc_async")
        try:
            self.check(engine, prompts, expected)
            assert (engine.arm, engine.mode) == ("inproc_async", "compiled")
            assert engine.notes["arms"]["inproc_async"]["async_scheduling"]
            assert not any("schedule ahead" in notice for notice in engine.notes["notices"])
            core = engine._live.core
            assert core.batch_queue.maxlen == 2 and core.step_fn == core.step_with_batch_queue
            # Stop tokens come as a surprise: a step more is scheduled already, and must not be left to the next work.
            stops = tuple({tokens[5] for tokens in expected})
            results = engine.serve(reference.requests(prompts, NUM_TOKENS, stop_token_ids=stops))
            assert [len(r.token_ids) for r in results] == [
                next(i for i, token in enumerate(tokens, 1) if token in stops) for tokens in expected
            ]
            assert not core.batch_queue
            self.check(engine, prompts, expected)
        finally:
            engine.close()

    def test_where_it_does_not_schedule_ahead_it_says_so(self, prompts, expected):
        engine = serving("inproc_async", disable_log_stats=True)
        try:
            self.check(engine, prompts, expected)
            assert not engine.notes["arms"]["inproc_async"]["async_scheduling"]
            assert engine.notes["request_clocks"]["requests"] == 0  # no statistics
            assert any("not schedule ahead in the arm 'inproc_async'" in notice for notice in engine.notes["notices"])
        finally:
            engine.close()

    def test_step_by_step_in_process_with_vllms_own_clock(self, prompts, expected):
        engine = serving("inproc")
        try:
            self.check(engine, prompts, expected)
            assert engine.arm == "inproc" and not engine.notes["arms"]["inproc"]["async_scheduling"]
            # Twice as many as run at once, so half of them wait long for their first token.
            results = engine.serve(reference.requests(reference.text_prompts((90,) * 16), 140))
            assert min(r.token_times_s[-1] - r.token_times_s[0] for r in results) > 0.2
            assert sum(r.token_times_s[0] - r.arrival_s > 0.2 for r in results) >= 8
            clocks = engine.notes["request_clocks"]
            assert clocks["requests"] == 16
            assert not any("statistics differ" in notice for notice in engine.notes["notices"])
            assert clocks["ttft_disagreement"] < 0.02 and clocks["decode_disagreement"] < 0.02
        finally:
            engine.close()


@needs_vllm
class TestSmall:
    """A cache and a step so small that requests are cut, preempted and share blocks."""

    def test_it_is_an_engine(self, small):
        assert isinstance(small, Engine)
        assert (small.name, small.arm, small.mode) == ("vllm", "eager", "eager")
        assert (small.capacity.kv_cache_tokens, small.capacity.max_model_len) == (256, 256)
        notes = small.notes["arms"]["eager"]
        assert notes["compilation_mode"] == "NONE" and notes["attention_backend"] and not notes["async_scheduling"]
        with pytest.raises(InputError, match="one vLLM engine at a time"):
            VLLM(config(options={"arm": "eager"}))

    def test_chunked_prefill(self, small, prompts, expected):
        done, tokens = drain(small, reference.requests(prompts, NUM_TOKENS))
        assert tokens == expected
        # 1 + 15 + 16 tokens and 16 of the fourth prompt's 17 fill the first step.
        assert done[0].kind == "prefill" and done[0].new_tokens == 48
        assert [(s.new_tokens, s.context_len) for s in done[0].scheduled] == [(1, 0), (15, 0), (16, 0), (16, 0)]
        assert [token[0] for token in done[0].tokens] == ["request 0", "request 1", "request 2"]
        assert done[1].kind == "mixed" and Scheduled("request 3", 1, 16) in done[1].scheduled
        assert done[-1].kind == "decode" and done[-1].finished

    def test_preemption(self, small):
        prompts = reference.text_prompts((70, 71, 72), seed=1)
        before = small.notes["preemptions"]
        _, tokens = drain(small, reference.requests(prompts, 60))
        assert tokens == reference.greedy(prompts, 60)
        assert small.notes["preemptions"] > before

    def test_prefix_reuse(self, small, prompts, expected):
        again = reference.requests(prompts[5:], NUM_TOKENS)
        drain(small, again)
        done, tokens = drain(small, again)
        assert tokens == expected[5:]
        assert done[0].scheduled == (Scheduled("request 0", 1, 64),)  # two blocks of 32 come from the cache
        assert done[0].kind == "prefill"

    def test_stop_tokens_and_limits(self, small, prompts, expected):
        stop = expected[4][5]
        length = expected[4].index(stop) + 1
        done, tokens = drain(small, reference.requests(prompts[4:5], NUM_TOKENS, stop_token_ids=(stop,)))
        assert tokens == [expected[4][:length]] and done[-1].finished == ("request 0",)
        with pytest.raises(InputError, match="needs 300 tokens"):
            small.add(Request("long", tuple(range(100)), SamplingParams(max_tokens=200)))
        with pytest.raises(InputError, match="empty prompt"):
            small.add(Request("empty", (), SamplingParams()))
        with pytest.raises(InputError, match="'strange' has a token outside the vocabulary of 260"):
            small.add(Request("strange", (10**6,), SamplingParams()))
        assert not small.has_unfinished()

    def test_end_of_sequence_ends_a_request_unless_ignored(self, small, prompts, expected, monkeypatch):
        monkeypatch.setattr(small, "_eos", (expected[4][3],))
        length = expected[4].index(expected[4][3]) + 1
        for ignore, wanted in ((False, length), (True, NUM_TOKENS)):
            _, tokens = drain(small, reference.requests(prompts[4:5], NUM_TOKENS, ignore_eos=ignore))
            assert len(tokens[0]) == wanted

    def test_abort(self, small, prompts, expected):
        requests = reference.requests(prompts, NUM_TOKENS)
        for request in requests:
            small.add(request)
        with pytest.raises(InputError, match="already a request 'request 0'"):
            small.add(requests[0])
        small.advance()
        small.abort([request.request_id for request in requests[:3]])
        assert {s.request_id for s in step_of(small).scheduled} == {f"request {i}" for i in (3, 4, 5)}
        small.abort([*(request.request_id for request in requests), "nobody"])
        assert not small.has_unfinished()
        assert drain(small, requests[:1])[1] == expected[:1]


@needs_vllm
class TestArms:
    """One engine through its arms: compiled in process, traced, its own process, and back."""

    def test_scores_are_transformers(self, engine, prompts, expected):
        assert (engine.arm, engine.mode) == ("inproc", "compiled")
        requests = reference.requests(prompts, NUM_TOKENS, temperature=0.7)  # scored greedily all the same
        for scored, prompt, tokens in zip(engine.score(requests), prompts, expected, strict=True):
            assert scored.prompt_token_ids == tuple(prompt) and list(scored.token_ids) == tokens
            wanted = reference.logits(tuple(prompt), tuple(tokens))
            assert scored.logits.shape == wanted.shape and scored.logits.dtype == torch.float32
            torch.testing.assert_close(scored.logits, wanted, rtol=1e-3, atol=1e-3)

    def test_steps_after_enqueuing_all_are_one_prefill_then_decodes(self, engine, prompts, expected):
        done, tokens = drain(engine, reference.requests(prompts, NUM_TOKENS))
        assert tokens == expected and (engine.arm, engine.mode) == ("inproc", "compiled")
        hooked = [m for m in engine._live.runner.get_model().modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked  # what is timed, or traced by CUPTI, is vLLM's model as it is
        assert [step.kind for step in done] == ["prefill"] + ["decode"] * (NUM_TOKENS - 1)
        assert (done[0].batch_size, done[0].new_tokens, done[0].context_len) == (6, sum(LENGTHS), 0)
        for index, step in enumerate(done[1:]):
            assert [s.context_len for s in step.scheduled] == [length + index for length in LENGTHS]
            assert step.new_tokens == len(step.tokens) == 6
        assert set(done[-1].finished) == {f"request {i}" for i in range(6)}

    def test_eager_trace_sees_every_site_in_order(self, engine, prompts, expected):
        probe = Recorder()
        engine.attach(probe, "eager")
        assert (engine.arm, engine.mode) == ("eager", "eager")
        probe.began.clear()
        for request in reference.requests(prompts[:3], 3):
            engine.add(request)
        for tokens in (sum(LENGTHS[:3]), 3, 3):
            engine.advance()
            assert [site for site, _ in probe.began] == sites_of(NUM_LAYERS)
            assert {rows for site, rows in probe.began if site.layer_index >= 0} == {tokens}
            assert [rows for _, rows in probe.began[-2:]] == [3, 3]
            assert not probe.open
            probe.began.clear()
        with pytest.raises(TraceUnsupported, match="CUDA only"):
            engine.attach(probe, "graph")
        engine.detach()
        assert engine.arm == "inproc"

    def test_serve_runs_its_own_process(self, engine, prompts, expected):
        requests = [
            Request(f"r{i}", tuple(prompts[i % 6]), SamplingParams(0.0, max_tokens=1 + i, ignore_eos=True))
            for i in range(14)
        ]
        seen = []
        results = engine.serve(requests, seen.append)
        assert (engine.arm, engine.mode) == ("default", "compiled") and processes.children()
        assert len(list(Path(os.environ["VLLM_RPC_BASE_PATH"]).iterdir())) > 0
        assert [r.request_id for r in results] == [r.request_id for r in requests]
        assert sorted(r.request_id for r in seen) == sorted(r.request_id for r in requests)
        for i, result in enumerate(results):
            assert list(result.token_ids) == expected[i % 6][: 1 + i] and result.finish_reason == "length"
            times = (result.arrival_s, *result.token_times_s)
            assert len(times) == 2 + i and list(times) == sorted(times)
        clocks = engine.notes["request_clocks"]
        assert clocks["requests"] == 14 and clocks["ttft_disagreement"] < 0.2  # the machine may be busy

    def test_it_comes_back_in_process_and_leaves_nothing(self, engine, prompts, expected):
        sockets = Path(os.environ["VLLM_RPC_BASE_PATH"])
        assert drain(engine, reference.requests(prompts[:2], 5))[1] == [tokens[:5] for tokens in expected[:2]]
        assert (engine.arm, engine.mode) == ("inproc", "compiled")
        assert not processes.children() and not sockets.exists()
        assert set(engine.notes["arms"]) == {"inproc", "eager", "default"}
