"""Tensor parallelism: one process per GPU, each with its share of the heads, the feed-forward block, the vocabulary.

Rank 0 is the process the engine was made in: it schedules and samples. It sends each step's inputs, as numpy arrays,
down a pipe to the followers, and then all compute the step, meeting in the layers of `layers/parallel.py` over NCCL
(gloo without GPUs). A follower lives as long as rank 0 holds the pipe's other end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engines.base import EngineConfig, InputError
from engines.nano.model_runner import ModelRunner
from engines.nano.models import read_model
from engines.nano.options import Options
from engines.nano.prefill import PrefillInputs
from engines.nano.sequence import Sequence
from engines.nano.utils import compile as compilation

GRACE_S = 10.0
"""How long a follower may take to end by itself, and to be seen as ended once it no longer answers."""


class RankLost(RuntimeError):
    """The process of another rank ended; the engine can only be closed."""


class ParallelRunner(ModelRunner):
    """What all ranks do alike, each in its own process: load, meet, warm up, agree on the cache, capture."""

    def __init__(
        self, config: EngineConfig, options: Options, prepare: Callable[[ModelRunner], None], rank: int, meeting: str
    ) -> None:
        self.meeting = meeting
        if config.device == "cuda":
            torch.cuda.set_device(rank)
        super().__init__(config, options, prepare, rank)

    def _meet(self) -> None:
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{self.meeting}", rank=self.rank, world_size=self.ranks,
            device_id=torch.device("cuda", self.rank) if on_gpu else None,
        )  # fmt: skip

    def _fit_cache(self) -> int:
        blocks = torch.tensor(super()._fit_cache(), device=self.device)
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
        return int(blocks)


class LeadingRunner(ParallelRunner):
    """Rank 0. A step that cannot end because a follower did raises `RankLost`."""

    def __init__(self, config: EngineConfig, options: Options, prepare: Callable[[ModelRunner], None]) -> None:
        check(config, options)
        self.serving = False  # until the engine is complete, followers know by themselves what comes next
        self.followers = Followers(config, options)
        try:
            super().__init__(config, options, prepare, 0, self.followers.meeting)
        except BaseException as error:
            own = isinstance(error, RankLost) or not isinstance(error, RuntimeError)
            lost = None if own else self.followers.lost(GRACE_S)
            self.followers.end(at_once=True)
            if lost is None:
                raise
            raise lost from error
        self.serving = True

    def run(self, sequences: list[Sequence], is_prefill: bool) -> list[int]:
        try:
            tokens = super().run(sequences, is_prefill)
        except (RuntimeError, OSError) as error:
            lost = self.followers.lost(GRACE_S)
            if lost is None:
                raise
            raise lost from error
        if self.followers.broken:  # what came back is not what the model says
            raise self.followers.lost(GRACE_S) or RankLost("A rank was lost.")
        return tokens

    def close(self) -> None:
        super().close()  # graphs first: they use the communicator
        self.followers.end()

    def _meet(self) -> None:
        self.followers.await_loaded()
        super()._meet()

    def _prefill(self, inputs: PrefillInputs) -> Tensor:
        if self.serving:
            self.followers.send("prefill", inputs)
        return super()._prefill(inputs)

    def _decode(self, rows: int, longest: int) -> Tensor:
        if self.serving:
            self.followers.send("decode", *self.buffers.written(rows, -(-longest // self.block_size)), longest)
        return super()._decode(rows, longest)


class FollowingRunner(ParallelRunner):
    """Any other rank: computes what rank 0 sends."""

    def __init__(self, config: EngineConfig, options: Options, rank: int, meeting: str, leader: Connection) -> None:
        self.leader = leader
        super().__init__(config, options, lambda _runner: None, rank, meeting)

    @torch.inference_mode()
    def follow(self) -> None:
        """Returns when rank 0 closes the pipe."""
        while True:
            try:
                step = self.leader.recv()
            except EOFError:
                return
            match step:
                case ("prefill", inputs):
                    self._prefill(inputs)
                case ("decode", numbers, tables, longest):
                    self._decode(self.buffers.take(numbers, tables), longest)

    def _meet(self) -> None:
        self.leader.send("")  # loaded, no error
        super()._meet()

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        return []


class Followers:
    """The processes of ranks 1 and up, as rank 0 sees them."""

    def __init__(self, config: EngineConfig, options: Options) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="nano-ranks-")
        self.meeting = str(Path(self.folder.name, "meeting"))
        self.broken = self.ended = False
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        for rank in range(1, options.tensor_parallel_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=follow, args=(config, options, rank, self.meeting, theirs), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
            Thread(target=self._watch, args=(process,), daemon=True).start()

    def send(self, *step: Any) -> None:
        for pipe in self.pipes:
            pipe.send(step)

    def await_loaded(self) -> None:
        """Returns when every follower has loaded its share of the model; RankLost if one fails."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            wait([pipe, process.sentinel])
            told = _told(pipe)
            if told != "":
                raise _loss({process: told})

    def lost(self, timeout_s: float) -> RankLost | None:
        """What became of the followers that ended, waiting for the first up to `timeout_s`; None if all live."""
        wait([process.sentinel for process in self.processes], timeout_s)
        pairs = zip(self.pipes, self.processes, strict=True)
        ended = {process: _told(pipe) for pipe, process in pairs if not process.is_alive()}
        self.broken = self.broken or bool(ended)
        return _loss(ended) if ended else None

    def end(self, at_once: bool = False) -> None:
        """Let the followers end, or kill them; nothing of them is left when this returns."""
        if self.ended:
            return
        self.ended = True
        for pipe in self.pipes:
            pipe.close()
        if at_once:
            for process in self.processes:
                process.kill()
        if dist.is_initialized():
            if at_once or self.broken:
                _abort()
            dist.destroy_process_group()
        for process in self.processes:
            process.join(GRACE_S)
            process.kill()
            process.join()
        self.folder.cleanup()

    def _watch(self, process: Any) -> None:
        wait([process.sentinel])
        if process.exitcode not in (0, None):
            self.broken = True
            _abort()


def follow(config: EngineConfig, options: Options, rank: int, meeting: str, leader: Connection) -> None:
    """A follower's life, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; rank 0 decides
    Thread(target=_end_with_parent, daemon=True).start()
    compilation.enabled = options.compile
    if config.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // options.tensor_parallel_size))
    try:
        runner = FollowingRunner(config, options, rank, meeting, leader)
        runner.follow()
        runner.close()
        dist.destroy_process_group()
    except BaseException:
        with suppress(OSError):  # rank 0 may be gone too
            leader.send(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # the interpreter's own end takes seconds, and after an error could wait for other ranks


def check(config: EngineConfig, options: Options) -> None:
    """InputError if the model or the machine cannot be shared by so many ranks."""
    ranks = options.tensor_parallel_size
    if config.device == "cuda" and torch.cuda.device_count() < ranks:
        raise InputError(f"tensor_parallel_size {ranks} needs as many GPUs; there are {torch.cuda.device_count()}.")
    if dist.is_initialized():
        raise InputError("This process is in a torch.distributed group already: close the engine that made it first.")
    read_model(Path(config.checkpoint))[0].share(0, ranks)


def _end_with_parent() -> None:
    """Rank 0 may die while this process is deep in a collective; that must not be what it waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _abort() -> None:
    """NCCL waits for ever for a rank that is gone; gloo sees the closed connection by itself."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        group: Any = dist.group.WORLD
        group.abort()


def _told(pipe: Connection) -> str | None:
    """A follower's message: "" when it has loaded its share, a traceback when it fails; None: there is none."""
    try:
        return pipe.recv() if pipe.poll() else None
    except (EOFError, OSError):
        return None


def _loss(ended: dict[Any, str | None]) -> RankLost:
    reasons = [
        f"{process.name} failed: {told.strip()}" if told else f"{process.name} ended with exit code {process.exitcode}."
        for process, told in ended.items()
    ]
    return RankLost("\n".join(reasons))
