"""Compiles the launches that `python -m kernels.tune` tries, by many processes, into Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from kernels._timing import CANNOT_RUN
from kernels._tune_attention import MAX_CONTEXT, Contexts, Heads
from kernels._tune_attention import candidates as attention_candidates
from kernels._tune_candidates import candidates, compiled_for, head_candidates
from kernels._tune_models import Model, Op
from kernels._tune_products import HEAD_ROWS, Bench, HeadBench
from kernels.decode_attention_launch import Launch as AttentionLaunch
from kernels.decode_head import Launch as HeadLaunch
from kernels.sample import TILE

WORKERS = 14


class Job(NamedTuple):
    """One launch of an op, of the head (by its hidden size) or of attention, for so many rows."""

    subject: Op | int | Heads
    rows: int
    launch: Any

    def key(self) -> Any:
        """Equal for jobs that leave the same kernel."""
        of_rows: Any = 0  # attention's is compiled for no number of rows
        if isinstance(self.launch, HeadLaunch):
            product = self.launch.product or self.launch.tiles
            of_rows = compiled_for(product, self.rows) if product else int(self.rows > 1)
        elif not isinstance(self.launch, AttentionLaunch):
            of_rows = compiled_for(self.launch, self.rows)
        return self.subject, self.launch, of_rows


def jobs_of(
    model: Model, ops: Sequence[Op], rows: Sequence[int], with_head: bool, with_attention: bool, quick: bool
) -> list[Job]:
    """All candidates."""
    jobs = []
    for count in rows:
        jobs += [Job(op, count, launch) for op in ops for launch in candidates(op, count, quick)]
        if with_attention:
            heads = model.attention()
            jobs += [Job(heads, 1, launch) for launch in attention_candidates(count, *heads, MAX_CONTEXT)]
        if with_head and count <= HEAD_ROWS:
            jobs += [Job(model.hidden, count, launch) for launch in head_candidates(count, model.hidden, quick)]
    return jobs


def compile_all(jobs: Sequence[Job]) -> int:
    """Fill Triton's cache from several processes at once; how many kernels were asked for."""
    work = list({job.key(): job for job in jobs}.values())
    workers = min(WORKERS, len(work), max(1, (os.cpu_count() or 2) - 2))
    if work:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(partial(run, torch.device("cuda")), [work[i::workers] for i in range(workers)], chunksize=1)
    return len(work)


def run(device: torch.device, jobs: Sequence[Job]) -> None:
    """Launch each job once, which leaves its kernel in Triton's cache."""
    for subject, rows, launch in jobs:
        bench: Any
        if isinstance(subject, Heads):
            contexts = Contexts(device, rows, (1, 1), subject, MAX_CONTEXT, 1)
            width = (subject.heads + 2 * subject.kv_heads) * subject.head_dim
            qkv = torch.zeros(rows, width, device=device, dtype=torch.bfloat16)
            call = partial(contexts.attend, qkv, contexts.caches[0], launch)
        elif isinstance(subject, Op):
            bench = Bench(subject, 1, device)
            bench.prepare(rows)
            call = partial(bench.fused, bench.weights[0], launch, bench.stream)
        else:
            bench = HeadBench(subject, 16 * TILE, device)
            bench.prepare(rows)
            call = partial(bench.fused, launch)
        with suppress(*CANNOT_RUN):  # found again, and left out, when it is timed
            call()
    if device.type == "cuda":
        torch.cuda.synchronize()
