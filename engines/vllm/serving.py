"""Whole workloads at vLLM's full speed, with the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from engines.base import Request, RequestResult
from engines.vllm import package
from engines.vllm.requests import queue

MIN_SPAN_S = 1e-3
"""Times under a millisecond say nothing about how well two clocks agree."""


class Clocks:
    """How far vLLM's own request statistics lie from our clock, as the largest share of any request's time."""

    def __init__(self) -> None:
        self.compared = 0
        self.ttft = 0.0
        self.decode = 0.0

    def compare(self, metrics: Any, result: RequestResult) -> None:
        """Take one request's `RequestOutput.metrics` (or None, if vLLM made none) and what we measured."""
        if metrics is None or not result.token_times_s:
            return
        first, last = result.token_times_s[0], result.token_times_s[-1]
        self.compared += 1
        theirs = package.reach(metrics, "first_token_latency")
        self.ttft = max(self.ttft, _share(theirs, first - result.arrival_s))
        theirs = package.reach(metrics, "last_token_ts") - package.reach(metrics, "first_token_ts")
        self.decode = max(self.decode, _share(theirs, last - first))

    def notes(self) -> dict[str, Any]:
        """JSON-ready: requests compared, and the largest |theirs − ours| / ours for first token and decode time."""
        return {"requests": self.compared, "ttft_disagreement": self.ttft, "decode_disagreement": self.decode}


def serve(
    engine: Any,
    requests: Sequence[Request],
    eos: tuple[int, ...],
    on_finish: Callable[[RequestResult], None] | None,
) -> tuple[list[RequestResult], Clocks]:
    """Run all requests, all arriving now; results in their order.

    As in vLLM's own `generate`, outputs are built once per request; a token's time is taken when the engine's answer
    for its step arrives here, so tokens that arrive together share it.
    """
    client = package.reach(engine, "engine_core")
    get_output = package.reach(client, "get_output")
    times: dict[str, list[float]] = {}

    def timed_output() -> Any:
        answer = get_output()
        now = time.perf_counter()
        for output in answer.outputs:
            times[output.request_id] += [now] * len(output.new_token_ids)
        return answer

    clocks, results = Clocks(), {}
    waiting: dict[str, tuple[Request, list[float]]] = {}
    keys: list[str] = []
    client.get_output = timed_output
    arrival_s, arrival_time = time.perf_counter(), time.time()
    try:
        for request in requests:
            key = queue(engine, request, eos, arrival_time)
            keys.append(key)
            waiting[request.request_id] = (request, times.setdefault(key, []))
        while engine.has_unfinished_requests():
            for output in engine.step():
                request, at = waiting.pop(output.request_id)
                completion = output.outputs[0]
                result = RequestResult(
                    request_id=request.request_id,
                    prompt_tokens=len(request.prompt_token_ids),
                    token_ids=tuple(completion.token_ids),
                    arrival_s=arrival_s,
                    token_times_s=tuple(at),
                    finish_reason=str(completion.finish_reason),
                )
                results[request.request_id] = result
                clocks.compare(output.metrics, result)
                if on_finish is not None:
                    on_finish(result)
    finally:
        del client.get_output  # the class's own method again
        if waiting:
            engine.abort_request(keys, internal=True)
    return [results[request.request_id] for request in requests], clocks


def _share(theirs: float, ours: float) -> float:
    return abs(theirs - ours) / max(ours, MIN_SPAN_S)
