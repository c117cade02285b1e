"""A small case played through the real scheduler and block manager, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from engines.base import Request, SamplingParams
from engines.nano.block_manager import BlockManager
from engines.nano.scheduler import Scheduler
from engines.nano.sequence import Sequence
from scripts.tables.registry import markdown, table

BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS, BUDGET = 4, 6, 3, 12
SHARED = (11, 12, 13, 14)
PROMPTS = {"A": (*SHARED, 21, 22, 23), "B": (*SHARED, 31, 32), "C": (*SHARED, 21, 22, 23, 41, 42)}
MAX_TOKENS = {"A": 4, "B": 8, "C": 5}
ARRIVAL = {"A": 0, "B": 0, "C": 5}
"""The step before which each request arrives."""
FIRST_SAMPLED = 50
"""Sampled tokens are made up: 50, 51, 52, ... in the order in which they are drawn."""


@dataclass(frozen=True)
class Share:
    """What one sequence had of a step: tokens [start, end) were computed and written to `slots`."""

    name: str
    start: int
    end: int
    block_table: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """One step, and how it left the blocks: reference counts, free blocks oldest first, block → hash."""

    kind: str
    shares: tuple[Share, ...]
    preempted: tuple[str, ...]
    finished: tuple[str, ...]
    ref_counts: tuple[int, ...]
    free: tuple[int, ...]
    hashes: tuple[tuple[int, str], ...]


def slots_of(sequence: Sequence, start: int, end: int) -> tuple[int, ...]:
    """Cache slots of the tokens [start, end): block × block size + offset."""
    at = range(start, end)
    return tuple(sequence.block_table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in at)


def play() -> list[Event]:
    """All steps until every request has ended."""
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(blocks, MAX_SEQS, BUDGET, frozenset())
    waiting = {
        name: Sequence(Request(name, prompt, SamplingParams(max_tokens=MAX_TOKENS[name], ignore_eos=True)))
        for name, prompt in PROMPTS.items()
    }
    events: list[Event] = []
    token = FIRST_SAMPLED
    while waiting or scheduler.has_unfinished():
        for name in [name for name in waiting if ARRIVAL[name] <= len(events)]:
            scheduler.add(waiting.pop(name))
        running = [s.request_id for s in scheduler.running]
        sequences, is_prefill = scheduler.schedule()
        shares = tuple(_share(sequence) for sequence in sequences)
        queued = [s.request_id for s in scheduler.waiting]
        finished = scheduler.postprocess(sequences, list(range(token, token + len(sequences))))
        token += len(sequences)
        events.append(
            Event(
                "prefill" if is_prefill else "decode",
                shares,
                tuple(name for name in running if name in queued),
                tuple(s.request_id for s in finished),
                tuple(blocks.ref_counts),
                tuple(blocks.free),
                tuple((block, digest.hex()[:4]) for block, digest in enumerate(blocks.hash_of) if digest),
            )
        )
    return events


@table("blocks")
def blocks() -> str:
    """The whole case as a table, a row per step."""
    head = ["step", "computed", "block tables", "slots written", "reference counts", "free, next first", "known hashes"]
    rows = []
    for number, event in enumerate(play()):
        notes = [f"preempts {', '.join(event.preempted)}"] if event.preempted else []
        notes += [f"ends {', '.join(event.finished)}"] if event.finished else []
        computed = [f"{event.kind}:", *(f"{s.name} {_range(s.start, s.end)}" for s in event.shares), *notes]
        rows.append(
            [
                str(number),
                "<br>".join(computed),
                "<br>".join(f"{s.name} [{_list(s.block_table)}]" for s in event.shares),
                "<br>".join(f"{s.name} {_list(s.slots)}" for s in event.shares),
                " ".join(map(str, event.ref_counts)),
                _list(event.free) or "none",
                "<br>".join(f"{block}: {digest}" for block, digest in event.hashes),
            ]
        )
    return markdown(head, rows, left=len(head))


def _share(sequence: Sequence) -> Share:
    start, end = sequence.num_cached, sequence.num_cached + sequence.num_scheduled
    table_now = tuple(sequence.block_table)
    return Share(sequence.request_id, start, end, table_now, slots_of(sequence, start, end))


def _range(start: int, end: int) -> str:
    return f"token {start}" if end == start + 1 else f"tokens {start}–{end - 1}"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


@table("blocks-requests")
def blocks_requests() -> str:
    """The requests of the case."""
    rows = [
        [name, " ".join(map(str, prompt)), str(MAX_TOKENS[name]), f"step {ARRIVAL[name]}"]
        for name, prompt in PROMPTS.items()
    ]
    return markdown(["request", "prompt", "tokens to produce", "arrives before"], rows, left=2)
