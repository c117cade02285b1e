"""Who takes part in a comparison, and with which config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engines.base import InputError
from harness.config import Config
from harness.engine_classes import check_options
from harness.overrides import combinations

GPU_SHARE = 0.9
"""Of the GPU's memory, for all contestants together, unless limits.gpu_memory_utilization says what each may take."""
_LIMITS = "limits."
_SHARE_KEY = f"{_LIMITS}gpu_memory_utilization"


@dataclass(frozen=True)
class Contestant:
    """An engine with options of its own. `label` is what was asked for, like `vllm:serve_arm=inproc_async`."""

    label: str
    config: Config

    @property
    def waits(self) -> bool:
        """Whether it sizes its cache by what is free, so that nobody else may start meanwhile."""
        return self.config.limits.kv_cache_tokens is None

    @property
    def folder(self) -> str:
        return folder_name(self.label)


def _config(overrides: list[str]) -> Config:
    configs = combinations(overrides, multirun=False)
    return configs[0]


def folder_name(label: str) -> str:
    """A label as the name of the folder of its runs."""
    return re.sub(r"[^\w.=-]+", "-", label)


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """A name to show for each label: as much of it, option by option, as begins no other label."""
    found = {}
    for label in labels:
        others = [other.split(":") for other in labels if other != label]
        parts = label.split(":")
        shown = next((n for n in range(1, len(parts)) if all(o[:n] != parts[:n] for o in others)), len(parts))
        found[label] = ":".join(parts[:shown])
    return found


def contestants(labels: Sequence[str], overrides: Sequence[str]) -> list[Contestant]:
    """The contestants of `labels` ("ENGINE" or "ENGINE:option=value:limits.name=value..."), all with `overrides`.

    InputError: none, the same one twice, or what Hydra or an engine does not take.
    """
    if not labels:
        raise InputError("engines names no engine, as in engines=[vllm,nano,fused].")
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"engines names {sorted(twice)[0]} twice.")
    common = list(overrides)
    if not any(override.lstrip("+").startswith(f"{_SHARE_KEY}=") for override in common):
        common.append(f"{_SHARE_KEY}={GPU_SHARE / len(labels):.3f}")
    found = []
    for label in labels:
        engine, *options = label.split(":")
        own = [o if o.startswith(_LIMITS) else f"++engine.options.{o}" for o in options]
        config = _config([f"engine={engine}", *common, *own])
        check_options(config.engine)
        found.append(Contestant(label, config))
    return found
