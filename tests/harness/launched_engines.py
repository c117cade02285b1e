"""Engines for runs that a launcher starts: two that work, one of which notes its GPU, and three that end badly."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from engines.base import InputError
from engines.nano import LLM


class Works(LLM):
    """Leaves in the folder that NOTES names which GPUs it saw, and from when to when."""

    def __init__(self, config) -> None:
        self.start_s = time.time()
        super().__init__(config)

    def close(self) -> None:
        super().close()
        if "NOTES" in os.environ:
            note = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "start_s": self.start_s, "end_s": time.time()}
            Path(os.environ["NOTES"], f"{os.getpid()}-{self.start_s}.json").write_text(json.dumps(note))


class Fine(LLM):
    pass


class Refuses(LLM):
    def __init__(self, config) -> None:
        raise InputError("It cannot do this.")


class Breaks(LLM):
    def __init__(self, config) -> None:
        raise RuntimeError("boom")


class Dies(LLM):
    def __init__(self, config) -> None:
        os._exit(3)
