"""nano's scheduler and memory management over fused layers and a decode loop that runs ahead of the host."""

from __future__ import annotations

from random import Random
from typing import Any

from engines.base import HostPhases, Probe, Request, TraceMode
from engines.fused.features import FusedOptions
from engines.fused.runner import FusedRunner
from engines.fused.state import Flight
from engines.nano.engine import LLM as NanoLLM
from engines.nano.engine import Ran
from engines.nano.sequence import Sequence, Status
from kernels.choices import fingerprint

SEED_BITS = 63


class LLM(NanoLLM):
    """Takes the same calls as `engines.nano.LLM`; its options are `FusedOptions`.

    While the host looks at the tokens of a decode step, the next one runs. What it cannot know by then is which
    sequences have met a stop token: their surplus token is dropped.
    """

    name = "fused"
    options_class = FusedOptions
    options: FusedOptions
    runner: FusedRunner

    def __init__(self, model: Any, **keywords: Any) -> None:
        self._flight: Flight | None = None  # launched, and not read yet
        super().__init__(model, **keywords)
        self._seeds = Random(self.config.seed)

    @property
    def launches_ahead(self) -> bool:  # type: ignore[override]
        runner = self.runner
        return "device_loop" in runner.features and not runner.watched and not runner.keep_logits

    def _start_runner(self) -> FusedRunner:
        return FusedRunner(self.config, self.options)

    @property
    def notes(self) -> dict[str, Any]:
        return super().notes | {
            "features": sorted(self.runner.features),
            "fallbacks": self.runner.fallbacks,
            "kernels": self.runner.kernels,
            "choices": fingerprint(self.runner.device),
            "max_fused_prefill_rows": self.options.max_fused_prefill_rows,
        }

    def add(self, request: Request) -> Sequence:
        sequence = super().add(request)
        seed = request.sampling.seed
        sequence.seed = (self._seeds.getrandbits(SEED_BITS) if seed is None else int(seed)) % (1 << SEED_BITS)
        return sequence

    def advance(self) -> None:
        try:
            self._advance()
        except BaseException:  # requests that others wait for go on after it
            self._ground()
            raise

    def _advance(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None or not any(s.status is Status.RUNNING for s in flight.sequences):
            sequences, is_prefill = self.scheduler.schedule()
            if is_prefill:
                self._run(sequences, is_prefill)
                return
            flight = self.runner.launch(longest_first(sequences))
        self._launch_ahead(flight)
        self._land(flight)

    def _ground(self) -> None:
        """Give up steps that were launched and not read: run again, they draw the same tokens."""
        self._flight = None
        self.runner.state.forget()

    def _launch_ahead(self, flight: Flight) -> None:
        """Launch the step after `flight`, unless it depends on what is still in the air."""
        if not self.launches_ahead:
            self.runner.state.forget()  # the host brings everything to the device, step by step
            return
        following = [s for s in flight.sequences if s.status is Status.RUNNING and not ends(s)]
        if following and not self._can_admit() and self.scheduler.blocks.append_ahead(following):
            self._flight = self.runner.launch(following, flight)

    def _can_admit(self) -> bool:
        """Whether the next step could be a prefill, which goes first; it waits for nobody's tokens to be read."""
        scheduler = self.scheduler
        if not scheduler.waiting or len(scheduler.running) >= scheduler.max_num_seqs:
            return False
        sequence = scheduler.waiting[0]
        return bool(sequence.block_table) or scheduler.blocks.can_allocate(sequence)

    def _land(self, flight: Flight) -> None:
        """Take in the tokens of `flight`; those of sequences that have ended meanwhile are dropped."""
        tokens = flight.read()
        landed = [(s, token) for s, token in zip(flight.sequences, tokens, strict=True) if s.status is Status.RUNNING]
        sequences, token_ids = [s for s, _ in landed], [token for _, token in landed]
        for sequence in sequences:
            sequence.num_scheduled = 1
        self._last = Ran(sequences, False, [], token_ids)
        self._last.finished = self.scheduler.postprocess(sequences, token_ids)

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        self._ground()  # capturing runs steps on the same state and ring
        super().attach(probe, mode)

    def host_phases(self) -> HostPhases:
        phases = dict(super().host_phases())
        return {**phases, "schedule": [*phases["schedule"], (self, "_can_admit")]}

    def close(self) -> None:
        self._flight = None
        super().close()


def longest_first(sequences: list[Sequence]) -> list[Sequence]:
    """Attention starts with the first rows: a long context among the last would run alone at the end."""
    return sorted(sequences, key=len, reverse=True)


def ends(sequence: Sequence) -> bool:
    """Whether the token in the air is the last one that `sequence` may have."""
    return sequence.num_output + 1 >= sequence.sampling.max_tokens
