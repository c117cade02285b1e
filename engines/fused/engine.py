"""nano's scheduler and memory management over fused layers."""

from __future__ import annotations

from typing import Any

from torch import nn

import kernels
from engines.fused.features import FusedOptions, fallbacks
from engines.fused.layers import FusedLayer
from engines.nano.engine import LLM as NanoLLM
from engines.nano.model_runner import ModelRunner


class LLM(NanoLLM):
    """Takes the same calls as `engines.nano.LLM`; its options are `FusedOptions`."""

    name = "fused"
    options_class = FusedOptions
    options: FusedOptions

    def prepare(self, runner: ModelRunner) -> None:
        """Put the fused layers in place of nano's, once the weights are there."""
        self.fallbacks = {
            feature: reason
            for feature, reason in fallbacks(runner.model_config, runner.device).items()
            if feature in self.options.features
        }
        self.features = frozenset(self.options.features) - self.fallbacks.keys()
        max_rows = (self.options.max_fused_decode_rows, self.options.max_fused_prefill_rows)
        runner.model.model.layers = nn.ModuleList(
            FusedLayer(layer, self.features, max_rows) for layer in runner.model.layers
        )
        self.kernels = "triton" if kernels.runs_triton(runner.model.lm_head.matrix) else "reference"

    @property
    def notes(self) -> dict[str, Any]:
        return super().notes | {
            "features": sorted(self.features),
            "fallbacks": self.fallbacks,
            "kernels": self.kernels,
            "max_fused_decode_rows": self.options.max_fused_decode_rows,
            "max_fused_prefill_rows": self.options.max_fused_prefill_rows,
        }
