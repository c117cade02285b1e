"""Whole workloads at vLLM's full speed, with the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

from engines.arrivals import Arrivals
from engines.base import Request, RequestResult
from engines.vllm import package
from engines.vllm.requests import queue

AGREEMENT = 0.02
"""The share of the requests' times by which the two clocks may differ."""
MIN_SPAN_S = 0.05
"""A shorter time counts as this long: handing an answer to another process may take 2 % of it, a millisecond."""


class Clocks:
    """How far vLLM's own request statistics lie from our clock: |theirs − ours| over all requests, as a share of ours.

    Over all of them together, so that one request in the way of which the machine came does not decide.
    """

    def __init__(self) -> None:
        self.compared = 0
        self._ttft = _Difference()
        self._decode = _Difference()

    def compare(self, metrics: Any, result: RequestResult) -> None:
        """Take one request's `RequestOutput.metrics` (or None, if vLLM made none) and what we measured."""
        if metrics is None or not result.token_times_s:
            return
        first, last = result.token_times_s[0], result.token_times_s[-1]
        self.compared += 1
        self._ttft.add(package.reach(metrics, "first_token_latency"), first - result.arrival_s)
        theirs = package.reach(metrics, "last_token_ts") - package.reach(metrics, "first_token_ts")
        self._decode.add(theirs, last - first)

    def notes(self) -> dict[str, Any]:
        """JSON-ready: requests compared, and by what share the times to the first token and of decoding differ."""
        return {
            "requests": self.compared,
            "ttft_disagreement": self._ttft.share,
            "decode_disagreement": self._decode.share,
        }

    def notice(self) -> str:
        """One sentence if the clocks differ by more than `AGREEMENT`; else ""."""
        if max(self._ttft.share, self._decode.share) <= AGREEMENT:
            return ""
        return (
            f"vLLM's own request statistics differ from the harness's clock by {self._ttft.share:.1%} (first token) "
            f"and {self._decode.share:.1%} (decode); {AGREEMENT:.0%} is expected."
        )


class _Difference:
    """Two clocks' times of the same things, summed up."""

    def __init__(self) -> None:
        self._apart_s = 0.0
        self._ours_s = 0.0

    def add(self, theirs_s: float, ours_s: float) -> None:
        self._apart_s += abs(theirs_s - ours_s)
        self._ours_s += max(ours_s, MIN_SPAN_S)

    @property
    def share(self) -> float:
        return self._apart_s / self._ours_s if self._ours_s else 0.0


class _Interruptible:
    """The queue of answers from an engine's process, whose `get` hands over what arrives while it waits."""

    def __init__(self, answers: Any, arrivals: Arrivals, hand_over: Callable[[], None]) -> None:
        self._answers = answers
        self._arrivals = arrivals
        self._hand_over = hand_over

    def get(self) -> Any:
        while (left_s := self._arrivals.left_s) is not None:
            try:
                return self._answers.get(timeout=left_s)
            except Empty:
                self._hand_over()
        return self._answers.get()


def serve(
    engine: Any,
    requests: Sequence[Request],
    eos: tuple[int, ...],
    on_finish: Callable[[RequestResult], None] | None,
    arrivals: Arrivals,
) -> tuple[list[RequestResult], Clocks]:
    """Run all requests as they arrive; results in their order.

    As in vLLM's own `generate`, outputs are built once per request; a token's time is taken when the engine's answer
    for its step arrives here, so tokens that arrive together share it.

    An engine in this process takes requests between its steps. One in another process is given them when they are due,
    as vLLM's server would, also while this one waits for its next answer.
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
    to_their_clock_s = time.time() - time.perf_counter()

    def hand_over() -> None:
        for request in arrivals.take():
            key = queue(engine, request, eos, arrivals.due_s(request.request_id) + to_their_clock_s)
            keys.append(key)
            waiting[request.request_id] = (request, times.setdefault(key, []))

    client.get_output = timed_output
    answers = getattr(client, "outputs_queue", None)
    if answers is not None:
        client.outputs_queue = _Interruptible(answers, arrivals, hand_over)
    try:
        while True:
            hand_over()
            if not engine.has_unfinished_requests():
                if not arrivals.wait():
                    break
                continue
            for output in engine.step():
                request, at = waiting.pop(output.request_id)
                completion = output.outputs[0]
                result = RequestResult(
                    request_id=request.request_id,
                    prompt_tokens=len(request.prompt_token_ids),
                    token_ids=tuple(completion.token_ids),
                    arrival_s=arrivals.due_s(request.request_id),
                    token_times_s=tuple(at),
                    finish_reason=str(completion.finish_reason),
                )
                results[request.request_id] = result
                clocks.compare(output.metrics, result)
                if on_finish is not None:
                    on_finish(result)
    finally:
        del client.get_output  # the class's own method again
        if answers is not None:
            client.outputs_queue = answers
        if waiting:
            engine.abort_request(keys, internal=True)
    return [results[request.request_id] for request in requests], clocks
