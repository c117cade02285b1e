"""Logits of each sampled token, taken where vLLM computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.base import Step
from engines.vllm import package


class LogitsTap:
    """Keeps the logits of the last step through a hook on the model's `logits_processor`.

    That module is called outside vLLM's compiled code and graphs, once per step, with one row per request of the batch.
    """

    def __init__(self, runner: Any) -> None:
        processor = package.reach(package.reach(runner, "get_model")(), "logits_processor")
        self._kept: list[Tensor] = []
        self._handle = processor.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _args: Any, output: Tensor) -> None:
        # A copy: samplers change logits in place.
        self._kept.append(output.detach().to("cpu", torch.float32, copy=True))

    def take(self, step: Step, rows: list[str]) -> dict[str, Tensor]:
        """Logits [vocab] of each request that produced a token in `step`; `rows` are request ids in batch order."""
        kept, self._kept = self._kept, []
        if not step.tokens:
            return {}
        if len(kept) != 1 or kept[0].shape[0] != len(rows):
            raise RuntimeError(f"vLLM computed logits {[tuple(k.shape) for k in kept]} for {len(rows)} sequences.")
        row_of = {request_id: row for row, request_id in enumerate(rows)}
        found = {}
        for request_id, token in step.tokens:
            logits = kept[0][row_of[request_id]]
            # Not argmax: in bfloat16 several tokens may share the largest logit.
            if logits[token] != logits.max():
                raise RuntimeError(f"vLLM's token {token} of {request_id!r} is not the largest of its row of logits.")
            found[request_id] = logits.clone()
        return found

    def close(self) -> None:
        self._handle.remove()
