"""`VLLM`: upstream vLLM as an engine of this project."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from engines.arrivals import Arrivals
from engines.base import (
    Capacity,
    EngineConfig,
    HostPhases,
    InputError,
    Probe,
    Request,
    RequestResult,
    Scored,
    Step,
    TraceMode,
    TraceUnsupported,
)
from engines.vllm import arms, package
from engines.vllm.arms import ARMS, Arm
from engines.vllm.layers import hook_runner
from engines.vllm.live import Live
from engines.vllm.requests import check, eos_token_ids, queue
from engines.vllm.scoring import LogitsTap
from engines.vllm.serving import serve
from engines.vllm.steps import Running, SchedulerTap, read_step, start_running

NOTHING = Step("decode", ())
"""The last step of an engine that took none."""


class VLLM:
    """Upstream vLLM, one engine at a time, restarted in the arm that the work needs.

    Steps run in process, compiled and with graphs (`inproc`; option `arm` picks another). `serve` runs its default: an
    engine in a process of its own (`default`; option `serve_arm` picks another, such as `inproc_async`, in process and
    scheduling ahead). `attach` restarts it as `eager` or `python_graph`. Option `engine_args` goes to vLLM's
    EngineArgs, over ours.
    """

    name = "vllm"
    arm: str
    launches_ahead = False  # in none of the arms whose steps are told apart
    mode: Literal["eager", "graph", "compiled"]
    capacity: Capacity

    @package.changes
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._step_arm, self._serve_arm = arms.choose(config.options)
        self._live: Live | None = None
        self._running: dict[str, Running] = {}
        self._tap: SchedulerTap | None = None
        self._unhook: Callable[[], None] | None = None
        self._traced: TraceMode | None = None
        self._unread = False
        self._last = NOTHING
        self.notes: dict[str, Any] = {"version": package.version(), "notices": [], "arms": {}, "preemptions": 0}
        self._notice(package.notice())
        self._eos = eos_token_ids(config)
        self._vocab_size = int(arms.read_model_config(config).get("vocab_size") or 0)
        self._at_exit = _close_at_exit(self)
        self._start(self._step_arm)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        arms.choose(options)

    # Requests and steps

    @package.changes
    def add(self, request: Request) -> None:
        self._read()
        engine = self._stepping().engine
        check(request, self.capacity, self._vocab_size)
        if any(r.request_id == request.request_id for r in self._running.values()):
            raise InputError(f"There is already a request {request.request_id!r}.")
        self._running[queue(engine, request, self._eos)] = start_running(request)

    def advance(self) -> None:
        self._read()
        with package.changes:
            self._stepping().engine.step()
        self._unread = True

    def last_step(self) -> Step:
        self._read()
        return self._last

    def has_unfinished(self) -> bool:
        self._read()
        return bool(self._running)

    @package.changes
    def abort(self, request_ids: Iterable[str]) -> None:
        self._read()
        dropped = set(request_ids)
        keys = [key for key, r in self._running.items() if r.request_id in dropped]
        if keys:
            self._stepping().engine.abort_request(keys, internal=True)
        for key in keys:
            del self._running[key]

    # Whole requests

    @package.changes
    def serve(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[RequestResult], None] | None = None,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[RequestResult]:
        self._check_idle("serve")
        requests = list(requests)
        if len({r.request_id for r in requests}) < len(requests):
            raise InputError("Two requests have the same id.")
        for request in requests:
            check(request, self.capacity, self._vocab_size)
        live = self._live
        if live is None or live.arm is not self._serve_arm:
            live = self._start(self._serve_arm)
        arrivals = Arrivals(requests, arrivals_s)
        try:
            results, clocks = serve(live.engine, requests, self._eos, on_finish, arrivals)
        finally:
            live.settle()
            if self._tap is not None:
                self._tap.clear()
        self.notes["request_clocks"] = clocks.notes()
        if arrivals_s is not None:
            self.notes["max_handover_ms"] = 1e3 * arrivals.max_late_s
        self._notice(clocks.notice())
        return results

    @package.changes
    def score(self, requests: Iterable[Request]) -> list[Scored]:
        self._check_idle("score")
        requests = [replace(r, sampling=replace(r.sampling, temperature=0.0, top_k=0, top_p=1.0)) for r in requests]
        live = self._stepping()
        assert self._tap is not None
        tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
        logits: dict[str, list[torch.Tensor]] = {r.request_id: [] for r in requests}
        tap = LogitsTap(live.runner)
        try:
            for request in requests:
                self.add(request)
            while self.has_unfinished():
                names = {key: r.request_id for key, r in self._running.items()}
                self.advance()
                step = self.last_step()
                for request_id, row in tap.take(step, [names[key] for key in self._tap.rows]).items():
                    logits[request_id].append(row)
                for request_id, token in step.tokens:
                    tokens[request_id].append(token)
        finally:
            tap.close()
            self.abort(list(tokens))
        return [
            Scored(r.prompt_token_ids, tuple(tokens[r.request_id]), torch.stack(logits[r.request_id])) for r in requests
        ]

    # Tracing

    @package.changes
    def host_phases(self) -> HostPhases:
        live = self._stepping()
        core, runner = live.core, live.runner
        named = {
            "schedule": [(core.scheduler, "schedule")],
            "prepare": [(runner, "_prepare_inputs"), (runner, "prepare_inputs")],
            "launch": [(core.model_executor, "execute_model")],
            "sample": [(core.model_executor, "sample_tokens")],
            "rest": [(runner, "_to_list")],  # inside of sampling: waits for the tokens
            "finish": [(core.scheduler, "update_from_output"), (live.engine.output_processor, "process_outputs")],
        }
        return {phase: [m for m in methods if hasattr(*m)] for phase, methods in named.items()}

    @package.changes
    def attach(self, probe: Probe, mode: TraceMode) -> None:
        self._check_idle("attach")
        self.detach()
        if mode == "graph":
            if self._config.device != "cuda":
                raise TraceUnsupported("vLLM captures decode graphs on CUDA only.")
            from engines.vllm import worker

            worker.pending[:] = [probe]
            try:
                self._start(ARMS["python_graph"], worker.PATH)
                if worker.pending:
                    self._stop()
                    raise InputError(
                        f"vLLM {package.version()} has changed inside: its worker's compile_or_warm_up_model was not "
                        f"called, so the graphs hold no probe; {package.advice()}"
                    )
            finally:
                worker.pending.clear()
            self._traced = "graph"
            return
        live = self._live
        if live is None or live.arm.name != "eager":
            live = self._start(ARMS["eager"])
        self._unhook, self._traced = hook_runner(live.runner, probe), "eager"
        self._show(live.arm)

    def detach(self) -> None:
        """Take the probe off. The timed arm comes back with the next request, step or score."""
        if self._traced is None:
            return
        self._check_idle("detach")
        if self._unhook is not None:
            self._unhook()
        graphs_hold_probe = self._traced == "graph"
        self._unhook = self._traced = None
        if graphs_hold_probe:
            self._stop()
        self._show(self._step_arm)

    # Life

    def close(self) -> None:
        atexit.unregister(self._at_exit)
        self._stop()

    @package.changes
    def _read(self) -> None:
        """Take in what the last step did, if that was not done yet. `advance` itself must do nothing but the step."""
        if not self._unread:
            return
        assert self._tap is not None
        self._unread = False
        decision, outputs = self._tap.take()
        self._last = read_step(decision, outputs, self._running)
        if decision is not None:
            self.notes["preemptions"] += len(decision.preempted_req_ids or ())
        if self._last.finished:
            done = set(self._last.finished)
            self._running = {key: r for key, r in self._running.items() if r.request_id not in done}

    def _stepping(self) -> Live:
        """The engine that steps run in: the traced one, else the timed arm, started if it is not there."""
        live = self._live
        if live is not None and (self._traced or live.arm is self._step_arm):
            return live
        return self._start(self._step_arm)

    def _start(self, arm: Arm, worker_cls: str | None = None) -> Live:
        self._stop()
        live = self._live = Live(self._config, arm, worker_cls)
        try:
            if not arm.own_process:
                self._check_scheduling(live)
            if arm.steps:
                self._tap = SchedulerTap(live.core)
            self.capacity = live.capacity(self._config)
            self.notes["arms"][arm.name] = live.notes()
        except BaseException:
            self.close()
            raise
        self._show(arm)
        return live

    def _check_scheduling(self, live: Live) -> None:
        """An arm in this process must schedule as its name says, or its numbers go by a wrong name."""
        if live.schedules_ahead and live.arm.steps:
            raise InputError(f"vLLM schedules ahead in the arm {live.arm.name!r}: its steps cannot be told apart.")
        if not live.schedules_ahead and not live.arm.steps:
            text = f"vLLM does not schedule ahead in the arm {live.arm.name!r}: it is served as if it were 'inproc'."
            if self._config.device != "cpu":
                raise InputError(text)
            self._notice(text)  # its CPU platform turns asynchronous scheduling off, whatever is asked

    def _notice(self, text: str) -> None:
        if text and text not in self.notes["notices"]:
            self.notes["notices"].append(text)

    def _show(self, arm: Arm) -> None:
        self.arm, self.mode = arm.name, arm.mode

    @package.changes
    def _stop(self) -> None:
        live, self._live = self._live, None
        self._forget()
        if live is not None:
            live.close()

    def _forget(self) -> None:
        """Drop everything that refers into a running engine."""
        self._running = {}
        self._tap = self._unhook = self._traced = None
        self._unread, self._last = False, NOTHING

    def _check_idle(self, what: str) -> None:
        if self.has_unfinished():
            raise RuntimeError(f"{what} needs an idle engine: finish or abort {len(self._running)} requests first.")


def _close_at_exit(engine: VLLM) -> Callable[[], None]:
    """Close the engine when Python ends, without keeping it alive until then."""
    reference = weakref.ref(engine)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)
    return close
