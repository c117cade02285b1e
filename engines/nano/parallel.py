"""Tensor parallelism: one process per GPU, each with its share of the heads, the feed-forward block, the vocabulary.

Rank 0 is the process the engine was made in: it schedules and samples. It sends each step's inputs, as numpy arrays,
down a pipe to the followers, and then all compute the step, meeting in the layers of `layers/parallel.py` over NCCL
(gloo without GPUs). A follower lives until rank 0 ends it, or ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

END = signal.SIGUSR1
"""What ends followers; nobody else's signal, so that exit codes tell which of them had ended before."""

GRACE_S = 10.0
"""How long a follower may take to end then; a process that was stopped takes for ever."""


class RankLost(RuntimeError):
    """A rank failed, and all were ended; the engine can only be closed."""


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
    """Rank 0. What fails on one rank, this one included, ends all: see `Followers.together`."""

    def __init__(self, config: EngineConfig, options: Options, prepare: Callable[[ModelRunner], None]) -> None:
        check(config, options)
        self.serving = False  # until the engine is complete, followers know by themselves what comes next
        self.followers = Followers(config, options)
        with self.followers.together():
            super().__init__(config, options, prepare, 0, self.followers.meeting)
        self.serving = True

    def run(self, sequences: list[Sequence], is_prefill: bool) -> list[int]:
        with self.followers.together():
            return super().run(sequences, is_prefill)

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
        """Until this process is ended."""
        while True:
            match self.leader.recv():
                case ("prefill", inputs):
                    self._prefill(inputs)
                case ("decode", numbers, tables, longest):
                    self._decode(self.buffers.take(numbers, tables), longest)

    def _meet(self) -> None:
        self.leader.send("loaded")
        super()._meet()

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        return []


class Followers:
    """The processes of ranks 1 and up, as rank 0 sees them."""

    def __init__(self, config: EngineConfig, options: Options) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="nano-ranks-")
        self.meeting = str(Path(self.folder.name, "meeting"))
        self.lost = ""  # why the ranks were ended
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
        Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do at once. They would wait for ever for one that failed, so an error ends them all.

        Raises `RankLost` if a follower failed, and whenever this is entered again; rank 0's own error as it is.
        """
        if self.lost:
            raise RankLost(f"The engine can only be closed. {self.lost}")
        try:
            yield
            if self.broken:
                raise RankLost("What was computed without a follower is not what the model says.")
        except BaseException as error:
            failures = self.end()
            self.lost = failures or f"rank 0 failed: {error!r}"
            own = isinstance(error, InputError | torch.OutOfMemoryError | KeyboardInterrupt)  # maybe all ranks have it
            if failures and not own:
                raise RankLost(failures) from error
            raise

    def await_loaded(self) -> None:
        """Returns when every follower has loaded its share of the model; EOFError if one ends before."""
        for pipe in self.pipes:
            pipe.recv()

    def send(self, *step: Any) -> None:
        for pipe in self.pipes:
            pipe.send(step)

    def end(self) -> str:
        """End the followers; nothing of them is left. Returns why some had ended before, "" if none had."""
        if self.ended:
            return ""
        self.ended = True
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, END)
        if dist.is_initialized():
            _abort()
            dist.destroy_process_group()
        for process in self.processes:
            process.join(GRACE_S)
            process.kill()
            process.join()
        failures = "\n".join(filter(None, map(self._failure, self.processes)))
        self.folder.cleanup()
        return failures

    def _failure(self, process: Any) -> str:
        told = Path(self.folder.name, process.name)
        if told.exists():
            return f"{process.name} failed: {told.read_text().strip()}"
        return "" if process.exitcode == -END else f"{process.name} ended with exit code {process.exitcode}."

    def _watch(self) -> None:
        wait([process.sentinel for process in self.processes])
        if not self.ended:
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
        FollowingRunner(config, options, rank, meeting, leader).follow()
    except BaseException:
        with suppress(OSError):  # rank 0 may be gone, and its folder with it
            Path(meeting).with_name(f"rank {rank}").write_text(traceback.format_exc())
        os._exit(1)  # the interpreter's own end could wait for other ranks


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
