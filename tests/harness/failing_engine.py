"""An engine whose process ends in the middle of its work, as a crash of the driver would end it."""

from __future__ import annotations

import os

from engines.nano import LLM

WORKS_FOR = 3
"""Calls of `serve` that return."""


class Dies(LLM):
    name = "dies"

    def serve(self, *args, **kwargs):
        self.served = getattr(self, "served", 0) + 1
        if self.served > WORKS_FOR:
            os._exit(3)
        return super().serve(*args, **kwargs)
