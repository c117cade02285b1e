"""Who runs in this step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engines.base import InputError
from engines.nano.block_manager import BlockManager
from engines.nano.sequence import Sequence, Status


class Scheduler:
    """Continuous batching, prefill first: a step is all prefill or all decode, never mixed.

    A prompt longer than what is left of the step's token budget is computed in chunks. When the cache is full, the
    sequence that came last gives its blocks back and starts over later (with its output kept).
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # a decode step has a token for each
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.num_preemptions = 0

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        longest = sequence.num_prompt + sequence.sampling.max_tokens - 1  # the last token is never cached
        if self.blocks.blocks_for(longest) > self.blocks.num_blocks:
            raise InputError(
                f"Request {sequence.request_id} needs {longest} tokens of cache, but the whole cache holds "
                f"{self.blocks.num_blocks * self.blocks.block_size}."
            )
        self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Sequence], bool]:
        """The sequences of the next step, each with `num_scheduled` set, and whether they compute prompts."""
        sequences = self._schedule_prefill()
        if sequences:
            return sequences, True
        return self._schedule_decode(), False

    def postprocess(self, sequences: list[Sequence], token_ids: list[int]) -> list[Sequence]:
        """Take in a step's sampled tokens; returns the sequences that finished."""
        finished = []
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            self.blocks.publish(sequence)
            sequence.num_cached += sequence.num_scheduled
            sequence.num_scheduled = 0
            if sequence.num_cached < len(sequence):
                continue  # a chunk of a prompt: its token means nothing
            sequence.append(token_id, self.eos_token_ids)
            if sequence.finish_reason:
                finished.append(sequence)
        for sequence in finished:
            sequence.status = Status.FINISHED
            self.blocks.release(sequence)
        if finished:
            self.running = deque(s for s in self.running if s.status is not Status.FINISHED)
        return finished

    def take_back(self, sequences: list[Sequence]) -> None:
        """Put the sequences of a prefill that failed back to where they came from, with nothing in the cache."""
        for sequence in reversed(sequences):
            self.blocks.release(sequence)
            if sequence.status is Status.RUNNING:  # else its prompt was cut, and it is first in line still
                self.running.remove(sequence)
                sequence.status = Status.WAITING
                self.waiting.appendleft(sequence)

    def abort(self, request_ids: Iterable[str]) -> None:
        doomed = set(request_ids)
        for sequence in (*self.waiting, *self.running):
            if sequence.request_id in doomed:
                sequence.status, sequence.finish_reason = Status.FINISHED, "abort"
                self.blocks.release(sequence)
        self.waiting = deque(s for s in self.waiting if s.status is not Status.FINISHED)
        self.running = deque(s for s in self.running if s.status is not Status.FINISHED)

    def _schedule_prefill(self) -> list[Sequence]:
        sequences: list[Sequence] = []
        budget = self.max_num_batched_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not sequence.block_table and not self.blocks.allocate(sequence):
                break
            sequence.num_scheduled = min(len(sequence) - sequence.num_cached, budget)
            budget -= sequence.num_scheduled
            sequences.append(sequence)
            if sequence.num_cached + sequence.num_scheduled < len(sequence):
                break  # chunked: it stays first in line
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
        return sequences

    def _schedule_decode(self) -> list[Sequence]:
        sequences: list[Sequence] = []
        queue, self.running = self.running, deque()
        while queue:
            sequence = queue.popleft()
            while not self.blocks.can_append(sequence):
                self._preempt(queue.pop() if queue else sequence)
                if sequence.status is Status.WAITING:
                    break
            else:
                self.blocks.append(sequence)
                sequence.num_scheduled = 1
                sequences.append(sequence)
        self.running.extend(sequences)
        return sequences

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.status = Status.WAITING
        self.blocks.release(sequence)
        self.waiting.appendleft(sequence)
