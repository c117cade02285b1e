"""Engines by the dotted paths of their classes: asked about their options, and started."""

from __future__ import annotations

import importlib
from typing import Any

from engines.base import Engine, EngineConfig, InputError
from harness.config import EngineConf


def engine_class(target: str) -> Any:
    """The class at a dotted path. InputError: there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"engine.target {target} cannot be imported: {error}.") from error


def start_engine(target: str, config: EngineConfig) -> Engine:
    """An engine by the dotted path of its class. InputError: there is no such class, or the engine's own."""
    return engine_class(target)(config)


def check_options(conf: EngineConf) -> None:
    """InputError: options that `conf`'s engine takes on no machine.

    An engine that cannot be imported here is not asked: this machine lacks something, as its start will say.
    """
    try:
        engine = engine_class(conf.target)
    except InputError:
        return
    try:
        engine.check_options(conf.options)
    except (AttributeError, TypeError) as error:  # what a value of the wrong type makes of the engine's checks
        raise InputError(f"The options {conf.options} do not fit engine {conf.name}: {error}.") from error
