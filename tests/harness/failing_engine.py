"""Engines that end in the middle of their work, as a crash of the driver would end them, or never start."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from engines.nano import LLM

WORKS_FOR = 2 + 2 * 6 + 3
"""Calls of `serve` that return: two warm-ups, two blocks of six, half of the third."""


class Dies(LLM):
    name = "dies"

    def serve(self, *args, **kwargs):
        self.served = getattr(self, "served", 0) + 1
        if self.served > WORKS_FOR:
            os._exit(3)
        return super().serve(*args, **kwargs)


class Hangs(LLM):
    """Starts a process of its own and waits for ever; both are told in the file that HANGS names."""

    def __init__(self, _config) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["HANGS"]).write_text(f"{os.getpid()} {child.pid}\n")
        time.sleep(1000)
