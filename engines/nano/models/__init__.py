"""The model families: one decoder, and what each family does differently."""

from __future__ import annotations

from pathlib import Path

from engines.base import InputError
from engines.nano.models.config import ModelConfig
from engines.nano.models.decoder import Decoder, Family
from engines.nano.models.llama import LLAMA
from engines.nano.models.qwen2 import QWEN2
from engines.nano.models.qwen3 import QWEN3
from engines.nano.utils.loader import read_config

FAMILIES: dict[str, Family] = {"qwen3": QWEN3, "qwen2": QWEN2, "llama": LLAMA}


def read_model(checkpoint: Path) -> tuple[ModelConfig, Family]:
    """The model that a checkpoint folder describes; InputError if it is of no family we know."""
    raw = read_config(checkpoint)
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise InputError(f"{checkpoint} holds a {raw.get('model_type')!r} model; known are {', '.join(FAMILIES)}.")
    return ModelConfig.from_json(raw, checkpoint), family


__all__ = ["FAMILIES", "Decoder", "Family", "ModelConfig", "read_model"]
