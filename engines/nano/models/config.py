"""The numbers that describe a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.base import InputError

SHARED = {
    "num_heads": "number of query heads",
    "num_kv_heads": "number of key/value heads",
    "intermediate_size": "intermediate size",
    "vocab_size": "vocabulary",
}
"""What the ranks of a model share out evenly, in words."""


@dataclass(frozen=True)
class ModelConfig:
    """What config.json of a checkpoint says, in our names. `rope_scaling` is None or holds `rope_type` and its numbers;
    `eos_token_ids` also counts those of generation_config.json. With several
    `ranks` these are the numbers of one rank's share."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tied_head: bool
    eos_token_ids: frozenset[int]
    rank: int = 0
    ranks: int = 1

    @classmethod
    def from_json(cls, raw: dict[str, Any], checkpoint: Path) -> ModelConfig:
        """From the parsed file, in the form of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        try:
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            return cls(
                hidden_size=raw["hidden_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                intermediate_size=raw["intermediate_size"],
                vocab_size=raw["vocab_size"],
                max_position=raw["max_position_embeddings"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=rope.get("rope_theta") or raw["rope_theta"],
                rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
                tied_head=raw.get("tie_word_embeddings", False),
                eos_token_ids=_eos(raw) | _eos(_generation_config(checkpoint)),
            )
        except KeyError as error:
            raise InputError(f"config.json in {checkpoint} has no {error}.") from None

    def share(self, rank: int, ranks: int) -> ModelConfig:
        """What rank `rank` of `ranks` holds; InputError where they cannot share evenly.

        Nothing is padded or held twice: vocabularies are multiples of 64 in practice, and with more ranks than
        key/value heads each rank's cache would shrink no further.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        for name, number in shared.items():
            if number % ranks:
                raise InputError(f"tensor_parallel_size {ranks} does not divide the model's {SHARED[name]}, {number}.")
        return replace(self, rank=rank, ranks=ranks, **{name: number // ranks for name, number in shared.items()})


def _generation_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _eos(raw: dict[str, Any]) -> frozenset[int]:
    eos = raw.get("eos_token_id")
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
