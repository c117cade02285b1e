"""Thousands of random requests through the fused engine, with a cache too small for them: does it say what nano says?

    python scripts/soak.py --requests 10000 --json results/reference/h200/soak.json

Requests of random lengths come in bursts; some begin alike, some end at a stop token, some are aborted: waiting,
running or with a step in the air. The cache holds a fraction of those that run, so that sequences wait, are preempted
and find prefixes again. The model is the trained tiny checkpoint in float32, whose greedy choices are far apart; nano
continues the same prompts with room for all of them, without reuse, preemption or aborts. With --seconds no more
requests come after that time; those that came are finished and judged, and the record says how many there were.

It passes if
- every token is nano's: of an aborted request those that came. Where the two part, the logits of transformers decide: a
  choice between two tokens that lie closer than TIE is either's, and the rest of that request is not compared;
- every block is free in the end, as at the start;
- memory is flat: while the second half runs, no reading lies above the highest of the first half by more than GROWTH.
  It is read SAMPLES times in --requests requests, and twice at least.

Exit codes: 0 passed, 1 not, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import EngineConfig, InputError, Request, SamplingParams
from engines.fused import LLM as Fused
from engines.hf import teacher_forced_logits
from engines.nano import LLM as Nano
from harness import machine
from harness.limits import device_of
from harness.results import write_json

CHECKPOINT = ROOT / "tests" / "assets" / "tiny-qwen3"
VOCAB, LONGEST_PROMPT, LONGEST_OUTPUT, BLOCK_SIZE = 256, 192, 64, 16
STEMS, STEM_LENGTH, SHARED = 8, 96, 0.4
"""Beginnings that prompts have in common, and the share of prompts that begin with one."""
ABORTED, STOPPED = 0.1, 0.2
"""Shares of the requests that are aborted, and that have a stop token."""
AT_ONCE, CACHE_TOKENS, STEP_TOKENS = 64, 3072, 512
"""Sequences that may run, tokens of the cache (about a third of what so many want), and tokens of a step."""
BURST, PAUSE_STEPS = 24, 48
"""Most requests that come at once, and most steps until others come."""
REFERENCE_AT_ONCE = 256
SAMPLES = 200
TIE = 1e-3
"""A thousand times what the order of float32 sums does to a logit."""
GROWTH = {"allocated_bytes": 1 << 20, "reserved_bytes": 4 << 20, "host_bytes": 16 << 20}
"""The GPU's memory may grow by a segment of torch's cache; the host's by what 3 KiB a request would be of 5,000."""


@dataclass(frozen=True)
class Job:
    """A request, the step before which it comes, and after how many more it is aborted (None: never)."""

    request: Request
    arrival: int
    abort_after: int | None


@dataclass
class Outcome:
    """What came of the jobs: tokens of each that came, in their order, and what the engine held meanwhile."""

    tokens: dict[str, list[int]]
    steps: int
    seconds: float
    preemptions: int
    free_blocks: tuple[int, int]
    memory: list[dict[str, int]] = field(default_factory=list)


def jobs(count: int, seed: int) -> list[Job]:
    """`count` random jobs in the order of their arrival, the same for the same seed."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB) for _ in range(STEM_LENGTH)] for _ in range(STEMS)]
    made: list[Job] = []
    arrival = 0
    while len(made) < count:
        for _ in range(min(rng.randint(1, BURST), count - len(made))):
            start = rng.choice(stems)[: rng.randint(1, STEM_LENGTH)] if rng.random() < SHARED else []
            prompt = start + [rng.randrange(VOCAB) for _ in range(rng.randint(1, LONGEST_PROMPT - len(start)))]
            stop = (rng.randrange(ord("a"), ord("z") + 1),) if rng.random() < STOPPED else ()
            sampling = SamplingParams(0.0, rng.randint(1, LONGEST_OUTPUT), ignore_eos=True, stop_token_ids=stop)
            abort = rng.randint(0, LONGEST_OUTPUT) if rng.random() < ABORTED else None
            made.append(Job(Request(f"{len(made)}", tuple(prompt), sampling), arrival, abort))
        arrival += rng.randint(0, PAUSE_STEPS)
    return made


def soak(engine: Nano, todo: Sequence[Job], seconds: float = math.inf) -> Outcome:
    """Run the jobs step by step, those that come before `seconds` are over; memory is read up to SAMPLES times."""
    device = engine.config.device
    tokens: dict[str, list[int]] = {}
    aborts: dict[int, list[str]] = {}
    for job in todo:
        if job.abort_after is not None:
            aborts.setdefault(job.arrival + job.abort_after, []).append(job.request.request_id)
    blocks = engine.scheduler.blocks
    free_before, memory, step, came, gone = len(blocks.free), [], 0, 0, 0
    every = max(1, len(todo) // SAMPLES)
    start_s = time.perf_counter()
    while came < len(todo) or engine.has_unfinished():
        if time.perf_counter() - start_s > seconds:
            todo = todo[:came]
        while came < len(todo) and todo[came].arrival <= step:
            engine.add(todo[came].request)
            tokens[todo[came].request.request_id] = []
            came += 1
        if step in aborts:
            engine.abort(aborts[step])
        if engine.has_unfinished():
            engine.advance()
            did = engine.last_step()
            for request_id, token in did.tokens:
                tokens[request_id].append(token)
            gone += len(did.finished)
            if gone >= every * (len(memory) + 1):
                memory.append(memory_now(device))
        step += 1
    return Outcome(
        tokens, step, time.perf_counter() - start_s, engine.scheduler.num_preemptions, (free_before, len(blocks.free)),
        memory,
    )  # fmt: skip


def memory_now(device: str) -> dict[str, int]:
    """Bytes that this process holds, of the host and of the GPU."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {"host_bytes": pages * 4096}
    if device == "cuda":
        held |= {"allocated_bytes": torch.cuda.memory_allocated(), "reserved_bytes": torch.cuda.memory_reserved()}
    return held


def growth(readings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """By how many bytes the highest reading of the second half lies above the highest of the first."""
    half = len(readings) // 2
    return {
        name: max(r[name] for r in readings[half:]) - max(r[name] for r in readings[:half])
        for name in (readings[0] if half else {})
    }


def reference(config: EngineConfig, todo: Sequence[Job]) -> dict[str, tuple[int, ...]]:
    """What nano continues each prompt with when there is room for all."""
    tokens = REFERENCE_AT_ONCE * (LONGEST_PROMPT + LONGEST_OUTPUT + BLOCK_SIZE)
    roomy = EngineConfig(
        config.checkpoint, dtype=config.dtype, device=config.device, max_model_len=config.max_model_len,
        max_num_seqs=REFERENCE_AT_ONCE, kv_cache_tokens=tokens, options=config.options,
    )  # fmt: skip
    engine = Nano(roomy)
    try:
        results = engine.serve([job.request for job in todo])
        assert engine.scheduler.num_preemptions == 0
    finally:
        engine.close()
    return {result.request_id: result.token_ids for result in results}


@dataclass
class Comparison:
    """Tokens that are the reference's, requests that an abort cut short, those that met a tie, those that differ."""

    equal_tokens: int = 0
    aborted: int = 0
    ties: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def compare(
    todo: Sequence[Job],
    tokens: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    config: EngineConfig,
) -> Comparison:
    """Each job's tokens with those that were expected; of jobs that are aborted, as many as came."""
    found = Comparison()
    parted: list[tuple[str, int, tuple[int, ...]]] = []
    for job in todo:
        name = job.request.request_id
        ours, theirs = tuple(tokens[name]), tuple(expected[name])
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        found.equal_tokens += len(ours) if at is None else at
        if at is not None:
            parted.append((name, at, job.request.prompt_token_ids))
        elif len(ours) < len(theirs) and job.abort_after is not None:
            found.aborted += 1
        elif len(ours) != len(theirs):
            found.differing.append(name)
    # The token that follows is fed to nothing: any will do.
    before = [((*prompt, *expected[name][:at]), (0,)) for name, at, prompt in parted]
    logits = teacher_forced_logits(config.checkpoint, before, torch.float32, config.device) if before else []
    for (name, at, _), row in zip(parted, logits, strict=True):
        chosen = row[0, [tokens[name][at], expected[name][at]]]
        close = bool((row.max() - chosen).max() < TIE)
        (found.ties if close else found.differing).append(name)
    return found


def failures(ran: Outcome, found: Comparison, grown: Mapping[str, int]) -> list[str]:
    """Why it did not pass; nothing if it did. `grown` is in bytes (`growth`)."""
    reasons = [
        "no tokens were compared" if not found.equal_tokens else "",
        "tokens differ" if found.differing else "",
        "blocks are lost" if ran.free_blocks[0] != ran.free_blocks[1] else "",
        "memory was not read often enough" if not grown else "",
        *(f"{name} grew" for name in grown if grown[name] > GROWTH[name]),
    ]
    return [reason for reason in reasons if reason]


def record(config: EngineConfig, asked: int, seed: int, ran: Outcome, found: Comparison) -> dict[str, Any]:
    """What the JSON file holds; `asked` requests were to come."""
    grown = growth(ran.memory)
    provenance = machine.provenance()
    device = provenance["gpu"]["name"] if config.device == "cuda" else provenance["cpu"]["model"]
    reasons = failures(ran, found, grown)
    return {
        "passed": not reasons,
        "reasons": reasons,
        "device": device,
        "provenance": provenance,
        "checkpoint": config.checkpoint.name,
        "dtype": config.dtype,
        "seed": seed,
        "limits": {
            name: getattr(config, name) for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")
        },
        "requests": len(ran.tokens),
        "asked": asked,
        "steps": ran.steps,
        "seconds": ran.seconds,
        "preemptions": ran.preemptions,
        **asdict(found),
        "free_blocks": {"start": ran.free_blocks[0], "end": ran.free_blocks[1]},
        "growth": {name: {"bytes": grown[name], "bound_bytes": GROWTH[name]} for name in grown},
        "memory": ran.memory,
    }


def engine_config(device: str) -> EngineConfig:
    """Of the engine that is soaked."""
    return EngineConfig(
        CHECKPOINT, dtype="float32", device=device, max_model_len=512, max_num_seqs=AT_ONCE,
        max_num_batched_tokens=STEP_TOKENS, kv_cache_tokens=CACHE_TOKENS, prefix_caching=True,
        options={"block_size": BLOCK_SIZE},
    )  # fmt: skip


def run(count: int, seed: int, device: str, seconds: float = math.inf) -> dict[str, Any]:
    """Everything; returns what the JSON file holds."""
    config, todo = engine_config(device), jobs(count, seed)
    engine = Fused(config)
    try:
        ran = soak(engine, todo, seconds)
    finally:
        engine.close()
    came = todo[: len(ran.tokens)]
    print(f"{len(came)} of {count} requests in {ran.steps} steps, {ran.seconds:.0f} s; now nano", flush=True)
    return record(config, count, seed, ran, compare(came, ran.tokens, reference(config, came), config))


def show(made: Mapping[str, Any]) -> None:
    """The outcome in a few lines."""
    free = made["free_blocks"]
    came = f"{made['requests']} of {made['asked']} requests"
    print(f"{came} ({made['aborted']} aborted), {made['preemptions']} preemptions")
    print(f"tokens equal to nano's: {made['equal_tokens']}; ties: {made['ties']}; differing: {made['differing'][:9]}")
    print(f"free blocks: {free['start']} at the start, {free['end']} at the end")
    for name, grown in made["growth"].items():
        print(f"{name}: {grown['bytes']:+,} in the second half (bound {grown['bound_bytes']:,})")
    print("passed" if made["passed"] else f"FAILED: {', '.join(made['reasons'])}")


def main() -> int:
    """Exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no more requests come")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    arguments = parser.parse_args()
    try:
        made = run(arguments.requests, arguments.seed, device_of(arguments.device), arguments.seconds)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    show(made)
    if arguments.json:
        write_json(arguments.json, made)
    return 0 if made["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
