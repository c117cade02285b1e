"""A vLLM that has changed inside: everything of it that the adapter touches is taken away once, and must be named."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engines import vllm as adapter
from engines.base import InputError
from engines.vllm import VLLM, arms, package, steps
from engines.vllm.layers import hook_runner
from engines.vllm.live import CALLED, Live
from engines.vllm.scoring import LogitsTap
from tests.engines import reference
from tests.engines.test_vllm import Recorder, config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
EAGER = {"arm": "eager", "serve_arm": "eager"}


@pytest.fixture(scope="module")
def engine():
    engine = VLLM(config(options=EAGER))
    yield engine
    engine.close()


def take_away(patch, owner, name):
    """Remove `name` from an object (or class) and, where it is found there, from its classes."""
    holders = owner.__mro__ if inspect.isclass(owner) else (owner, *type(owner).__mro__)
    for holder in holders[:-1]:
        if name in getattr(holder, "__dict__", {}) or (holder is owner and name in getattr(owner, "_modules", {})):
            patch.delattr(holder, name)


def named(name):
    return pytest.raises(InputError, match=rf"vLLM \S+ has changed.*\b{name}\b.*use vllm")


def one_line(caught):
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CALLED)
def test_its_engine_is_looked_at_before_a_start(name, monkeypatch):
    take_away(monkeypatch, package.load().LLMEngine, name)
    with named(name):
        Live(config(), arms.ARMS["eager"])


@pytest.mark.parametrize(
    "module, name",
    [
        ("vllm.usage.usage_lib", "UsageContext"),
        ("vllm.envs", "disable_envs_cache"),
    ],
)
def test_its_modules_are_looked_at_before_a_start(module, name, monkeypatch):
    monkeypatch.delattr(importlib.import_module(module), name)
    with named(name):
        Live(config(), arms.ARMS["eager"])
    monkeypatch.setitem(sys.modules, module, None)
    with named(f"no module {module}"):
        Live(config(), arms.ARMS["eager"])


def test_an_engine_argument_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(arms.ARMS, "odd", arms.Arm("odd", "eager", arguments={"enforce_eagerly": True}))
    with pytest.raises(InputError, match=r"no engine argument 'enforce_eagerly' any more; use vllm"):
        arms.engine_args(config(), arms.ARMS["odd"])


# What is taken away: a path from the running engine to its owner, and a name. `layer` is the first decoder layer.
READ_AT_START = [
    ("engine", "engine_core"),
    ("engine", "model_executor"),
    ("engine", "vllm_config"),
    ("engine", "model_config"),
    ("engine.engine_core", "engine_core"),
    ("engine.engine_core.engine_core", "scheduler"),
    ("engine.engine_core.engine_core", "batch_queue"),
    ("engine.model_executor", "driver_worker"),
    ("worker", "model_runner"),
    ("runner", "get_model"),
    ("engine.model_config", "max_model_len"),
    ("engine.vllm_config", "cache_config"),
    ("engine.vllm_config", "compilation_config"),
    ("engine.vllm_config", "scheduler_config"),
    ("engine.vllm_config.cache_config", "num_gpu_blocks"),
    ("engine.vllm_config.cache_config", "block_size"),
    ("engine.vllm_config.cache_config", "enable_prefix_caching"),
    ("engine.vllm_config.compilation_config", "mode"),
    ("engine.vllm_config.compilation_config", "cudagraph_mode"),
    ("engine.vllm_config.compilation_config", "cudagraph_capture_sizes"),
    ("engine.vllm_config.scheduler_config", "async_scheduling"),
    ("engine.vllm_config.scheduler_config", "enable_chunked_prefill"),
    ("model.model", "layers"),
    ("layer", "self_attn"),
    ("layer.self_attn", "attn"),
    ("layer.self_attn.attn", "attn_backend"),
    ("layer.self_attn.attn.attn_backend", "get_name"),
]
READ_BY_A_PROBE = [
    ("runner", "get_model"),
    ("runner", "sampler"),
    ("model", "model"),
    ("model", "logits_processor"),
    ("model.model", "embed_tokens"),
    ("model.model", "layers"),
    ("model.model", "norm"),
    ("layer", "input_layernorm"),
    ("layer", "post_attention_layernorm"),
    ("layer", "self_attn"),
    ("layer.self_attn", "qkv_proj"),
    ("layer.self_attn", "rotary_emb"),
    ("layer.self_attn", "attn"),
    ("layer.self_attn", "o_proj"),
    ("layer", "mlp"),
    ("layer.mlp", "gate_up_proj"),
    ("layer.mlp", "act_fn"),
    ("layer.mlp", "down_proj"),
]


def owner_of(engine, path):
    live = engine._live
    model = live.runner.get_model()
    worker = live.engine.model_executor.driver_worker.worker
    roots = {"engine": live.engine, "worker": worker, "runner": live.runner, "model": model}
    roots["layer"] = model.model.layers[0]
    first, *rest = path.split(".")
    value = roots[first]
    for name in rest:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("path, name", READ_AT_START)
def test_a_start_names_what_is_gone(engine, path, name):
    live = engine._live

    @package.changes
    def start():
        live.capacity(engine._config)
        _ = live.schedules_ahead
        steps.SchedulerTap(live.core)
        live.notes()

    kept = dict(vars(live.core.scheduler))
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, owner_of(engine, path), name)
        with named(name) as caught:
            start()
    one_line(caught)
    vars(live.core.scheduler).update(kept)  # the engine's own tap again


@pytest.mark.parametrize("path, name", READ_BY_A_PROBE)
def test_a_probe_names_what_is_gone(engine, path, name):
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, owner_of(engine, path), name)
        with named(name), package.changes:
            hook_runner(engine._live.runner, Recorder())


@pytest.mark.parametrize("path, name", [("runner", "get_model"), ("model", "logits_processor")])
def test_scoring_names_what_is_gone(engine, path, name):
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, owner_of(engine, path), name)
        with named(name):
            LogitsTap(engine._live.runner)


HOST = [("engine.engine_core.engine_core", "model_executor"), ("engine", "output_processor")]


@pytest.mark.parametrize("path, name", HOST)
def test_host_phases_name_what_is_gone(engine, path, name):
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, owner_of(engine, path), name)
        with named(name):
            engine.host_phases()


@pytest.mark.parametrize("name", ["schedule", "update_from_output"])
def test_a_scheduler_without_its_methods_is_named(engine, name):
    scheduler = object.__new__(type(engine._live.core.scheduler))
    with pytest.MonkeyPatch.context() as patch:
        take_away(patch, scheduler, name)
        with named(name):
            steps.SchedulerTap(SimpleNamespace(scheduler=scheduler))


DECISION = ("scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens")


@pytest.mark.parametrize(
    "part, name",
    [
        *(("decision", name) for name in (*DECISION, "preempted_req_ids")),
        ("new", "req_id"),
        ("new", "num_computed_tokens"),
        ("cached", "req_ids"),
        ("cached", "num_computed_tokens"),
        ("output", "request_id"),
        ("output", "new_token_ids"),
        ("output", "finish_reason"),
    ],
)
def test_a_step_names_what_is_gone(engine, part, name):
    requests = reference.requests([[1, 2, 3]], 3)
    engine.add(requests[0])
    try:
        engine.advance()
        decision, outputs = engine._tap._decision, engine._tap._outputs
        new, cached = decision.scheduled_new_reqs[0], decision.scheduled_cached_reqs
        owner = {"decision": decision, "new": new, "cached": cached, "output": outputs[0]}[part]
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(type(owner), "__struct_fields__"):
                delattr(owner, name)
            else:
                take_away(patch, owner, name)
            with named(name) as caught:
                engine.last_step()
        one_line(caught)
    finally:
        engine.abort(["request 0"])


@pytest.mark.parametrize("name", ["req_ids", "outputs"])
def test_what_the_scheduler_is_told_is_named(name):
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

    told, answer = ModelRunnerOutput(req_ids=[], req_id_to_index={}), EngineCoreOutputs()
    scheduler = SimpleNamespace(schedule=None, update_from_output=lambda *_: {0: answer})
    steps.SchedulerTap(SimpleNamespace(scheduler=scheduler))
    delattr(told if name == "req_ids" else answer, name)
    with named(name), package.changes:
        scheduler.update_from_output(None, told)


@pytest.mark.parametrize("name", ["RequestOutputKind", "FINAL_ONLY"])
def test_sampling_settings_that_are_gone_are_named(engine, name, monkeypatch):
    import vllm.sampling_params as module

    if name == "FINAL_ONLY":
        monkeypatch.setattr(module, "RequestOutputKind", SimpleNamespace())
    else:
        monkeypatch.delattr(module, name)
    with named(name):
        engine.add(reference.requests([[1]], 1)[0])
    assert not engine.has_unfinished()


def test_a_changed_signature_is_named(engine, monkeypatch):
    engine.add(reference.requests([[1]], 1)[0])
    monkeypatch.setattr(engine._live.engine, "abort_request", lambda request_ids: None)
    with named("internal"):
        engine.abort(["request 0"])
    monkeypatch.undo()
    engine.abort(["request 0"])


@pytest.mark.parametrize(
    "part, name",
    [
        ("output", "request_id"),
        ("output", "outputs"),
        ("output", "metrics"),
        ("completion", "token_ids"),
        ("completion", "finish_reason"),
        ("metrics", "first_token_latency"),
        ("metrics", "first_token_ts"),
        ("metrics", "last_token_ts"),
        ("answer", "outputs"),
        ("token", "request_id"),
        ("token", "new_token_ids"),
        ("client", "get_output"),
    ],
)
def test_serving_names_what_is_gone(engine, part, name):
    live = engine._live.engine
    client, step, get_output = live.engine_core, live.step, live.engine_core.get_output
    requests = reference.requests([[1, 2, 3]], 2)
    with pytest.MonkeyPatch.context() as patch:

        def stepped():
            for output in (outputs := step()):
                parts = {"output": output, "completion": output.outputs[0], "metrics": output.metrics}
                take_away(patch, parts[part], name)
            return outputs

        def answered():
            answer = get_output()
            delattr(answer if part == "answer" else answer.outputs[0], name)
            return answer

        if part in ("answer", "token"):
            client.get_output = answered  # serving takes it off again
        elif part == "client":
            take_away(patch, client, name)
        else:
            patch.setattr(live, "step", stepped)
        with named(name) as caught:
            engine.serve(requests)
    one_line(caught)
    assert len(engine.serve(requests)[0].token_ids) == 2  # nothing of it is left behind


def test_a_traced_worker_that_cannot_be_made_is_named(engine, monkeypatch):
    import vllm.v1.worker.gpu_worker as module

    monkeypatch.setattr(engine, "_config", replace(engine._config, device="cuda"))
    monkeypatch.setattr(engine, "_start", lambda *_: None)  # a worker that never captured: the probe is left over
    monkeypatch.setattr(engine, "_stop", lambda: None)
    with named("compile_or_warm_up_model"):
        engine.attach(Recorder(), "graph")

    monkeypatch.delitem(sys.modules, "engines.vllm.worker")
    monkeypatch.delattr(adapter, "worker")
    monkeypatch.delattr(module, "Worker")
    with named("Worker"):
        engine.attach(Recorder(), "graph")


@pytest.mark.parametrize("client, name", [(SimpleNamespace(shutdown=lambda: None), "timeout"), (None, "shutdown")])
def test_an_engine_that_cannot_be_closed_is_named(client, name, monkeypatch):
    """A stand-in for an engine in its own process; one that runs would be left behind."""
    if client is None:
        from vllm.v1.engine.core_client import InprocClient

        client = object.__new__(InprocClient)
        take_away(monkeypatch, client, name)
    stopped = object.__new__(VLLM)
    live = stopped._live = object.__new__(Live)
    live.arm, live.engine, live._others = arms.ARMS["default"], SimpleNamespace(engine_core=client), set()
    with named(name) as caught:
        stopped._stop()
    one_line(caught)


def test_an_error_of_vllm_itself_keeps_its_traceback(engine, monkeypatch):
    def step():
        return object().nothing

    monkeypatch.setattr(engine._live.engine, "step", step)
    with pytest.raises(AttributeError, match="nothing"):
        engine.advance()
    monkeypatch.setattr(engine, "_live", None)
    monkeypatch.setattr(engine, "_start", lambda arm: None)  # our own mistake, of no vLLM object
    with pytest.raises(AttributeError, match="NoneType"):
        engine.advance()
