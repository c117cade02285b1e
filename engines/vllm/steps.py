"""What one engine step was, from the scheduler's own output: sizes, kind, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.base import InputError, Request, Scheduled, Step, step_kind
from engines.vllm import package


@dataclass(slots=True)
class Running:
    """A request that vLLM knows under another id. `length` counts its prompt and all tokens produced so far."""

    request_id: str
    prompt_tokens: int
    length: int


class SchedulerTap:
    """Keeps what vLLM's scheduler last decided (`schedule`) and was told (`update_from_output`).

    In process both are called once per engine step; `rows` then names the requests in the order of the logits' rows.
    """

    def __init__(self, core: Any) -> None:
        scheduler = package.reach(core, "scheduler")
        schedule = package.reach(scheduler, "schedule")
        update = package.reach(scheduler, "update_from_output")
        self.rows: list[str] = []
        self._decision: Any = None
        self._outputs: list[Any] = []
        self._count = 0

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            self._decision = schedule(*args, **kwargs)
            self._outputs = []
            self._count += 1
            return self._decision

        def updated(decision: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = update(decision, model_output, *args, **kwargs)
            self.rows = model_output.req_ids
            for of_client in result.values():
                self._outputs.extend(of_client.outputs)
            return result

        scheduler.schedule, scheduler.update_from_output = scheduled, updated

    def take(self) -> tuple[Any, list[Any]]:
        """The (decision, outputs) of the step that just ran; the decision is None if nothing was there to schedule."""
        count, taken = self._count, (self._decision, self._outputs)
        self.clear()
        if count > 1:
            raise RuntimeError(f"One vLLM step scheduled {count} times; it must be one scheduler step.")
        return taken

    def clear(self) -> None:
        """Forget what was seen so far."""
        self._decision, self._outputs, self._count = None, [], 0


def read_step(decision: Any, outputs: list[Any], running: dict[str, Running]) -> Step:
    """The step in our terms. `running` maps vLLM's request ids; its lengths are brought up to date.

    Raises RuntimeError where the scheduler's numbers and the produced tokens do not agree, and InputError if requests
    run but no schedule was seen.
    """
    if decision is None:
        if running:
            raise InputError(
                f"vLLM {package.version()} has changed inside: a step with {len(running)} requests did not call "
                f"scheduler.schedule; {package.advice()}"
            )
        return Step("decode", ())
    contexts = {new.req_id: new.num_computed_tokens for new in decision.scheduled_new_reqs}
    cached = decision.scheduled_cached_reqs
    contexts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))

    sizes: dict[str, int] = decision.num_scheduled_tokens
    scheduled, prompts, complete = [], {}, set()
    for key, new_tokens in sizes.items():
        request, context = running[key], contexts[key]
        scheduled.append(Scheduled(request.request_id, new_tokens, context))
        # A preempted request computes its lost tokens again in one go: prompt work, not a decode of one token.
        prompts[request.request_id] = context < request.prompt_tokens or new_tokens > 1
        if context + new_tokens == request.length:
            complete.add(key)

    tokens, finished, sampled = [], [], set()
    for output in outputs:
        request = running[output.request_id]
        for token in output.new_token_ids:
            tokens.append((request.request_id, token))
            sampled.add(output.request_id)
        request.length += len(output.new_token_ids)
        if output.finish_reason is not None:
            finished.append(request.request_id)
    if sampled != complete or len(tokens) != len(sampled) or sum(sizes.values()) != decision.total_num_scheduled_tokens:
        raise RuntimeError(
            f"vLLM's scheduler and its output disagree: {len(complete)} sequences were complete, "
            f"{len(tokens)} tokens came for {len(sampled)}."
        )
    return Step(step_kind(scheduled, prompts.__getitem__), tuple(scheduled), tuple(tokens), tuple(finished))


def start_running(request: Request) -> Running:
    """The bookkeeping of a request that was just queued."""
    return Running(request.request_id, len(request.prompt_token_ids), len(request.prompt_token_ids))
