"""A request on its way through the engine."""

from __future__ import annotations

from array import array
from enum import Enum, auto

from engines.base import Request


class Status(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of one request, how many of them are in the cache, and which cache blocks hold them.

    `token_ids` is prompt plus output, int64 in one piece of memory, so that arrays are made of it without a loop.
    `num_cached` tokens have their keys and values in the cache; `num_scheduled` more are computed in the current step.
    In decode exactly one token, the newest, is not cached yet.
    """

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.seed = request.sampling.seed or 0  # what an engine that draws by seeds alone puts another number in for
        self.token_ids = array("q", request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_cached = 0
        self.num_scheduled = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the full blocks hashed so far; they survive preemption
        self.status = Status.WAITING
        self.finish_reason = ""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :].tolist()

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Take the sampled token; sets `finish_reason` when it is the last one."""
        self.token_ids.append(token_id)
        sampling = self.sampling
        if (not sampling.ignore_eos and token_id in eos_token_ids) or token_id in sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output >= sampling.max_tokens:
            self.finish_reason = "length"
