"""Command-line overrides, checked before Hydra acts on them.

Hydra reports a wrong override in several lines and exit code 1, some of them only after it made a run folder. Here each
combination of a sweep is composed first, and whatever is wrong becomes one `InputError` with the near matches.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines.base import InputError
from harness.config import CONF_DIR, CONFIG_NAME, GROUPS, Config, register, to_config

FREE_DICTS = ("engine.options.", "model.rope_scaling.")
"""Keys under these are not known here: the engine, or the rope type, checks them."""
NEAR = 0.5
"""How alike (difflib's ratio) a name must be to be offered as a near match."""


def near_matches(wrong: str, names: Iterable[str]) -> list[str]:
    """The names that look like `wrong`, best first, at most three; also those that end in or contain it."""
    names = list(names)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=NEAR)
    last = [name for name in names if wrong and wrong in name.split(".")]
    return list(dict.fromkeys([*last, *close]))[:3]


def combinations(arguments: Sequence[str], multirun: bool) -> list[Config]:
    """The checked configs that `arguments` ask for, one per job; InputError for the first thing that is wrong."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3", job_name="harness"):
        loader = GlobalHydra.instance().config_loader()
        overrides = _parse(arguments, loader)
        _check_keys(overrides, loader)
        return [_compose(job) for job in itertools.product(*(_values(o, multirun) for o in overrides))]


def fixed_keys(arguments: Sequence[str]) -> list[str]:
    """The keys that are the same in all runs of a sweep, and so need not be told in the names of their folders."""
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    return [override.key_or_group for override in overrides if not override.is_sweep_override()]


def fixed_overrides(arguments: Sequence[str]) -> list[str]:
    """Those of `arguments` that are the same in all runs of a sweep."""
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    return [str(override.input_line) for override in overrides if not override.is_sweep_override()]


def _parse(arguments: Sequence[str], loader: ConfigLoader) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except HydraException as error:
            raise InputError(f"Cannot read the override {argument!r}; overrides are key=value.") from error
        if not parsed[-1].key_or_group:
            raise InputError(f"Cannot read the override {argument!r}; overrides are key=value.")
    return parsed


def _check_keys(overrides: Sequence[Override], loader: ConfigLoader) -> None:
    """Group choices first, since the keys that exist depend on them."""
    groups = [o for o in overrides if o.key_or_group in GROUPS]
    for override in groups:
        options = sorted(loader.get_group_options(override.key_or_group))
        for choice in _choices(override):
            if choice not in options:
                raise InputError(_unknown(override.key_or_group, choice, options))
    chosen = [f"{o.key_or_group}={_choices(o)[0]}" for o in groups]
    keys = set(_flat_keys(_hydra_compose(chosen)))
    for override in overrides:
        key = override.key_or_group
        if key in GROUPS or key.startswith(("hydra.", "hydra/")):
            continue
        free = key.startswith(FREE_DICTS)
        if override.is_delete() and not free:
            raise InputError(f"{override.input_line}: every key is needed, so none can be left out.")
        if key not in keys and not (free and (override.is_add() or override.is_force_add())):
            raise InputError(_unknown_key(key, keys, free))


def _choices(override: Override) -> list[str]:
    """The names that a group override picks."""
    if override.is_delete() or override.is_add() or override.is_force_add():
        raise InputError(f"{override.input_line}: write {override.key_or_group}=NAME to choose.")
    if override.is_sweep_override() and override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    value = override.value()
    if value is None or isinstance(value, list | dict):
        raise InputError(f"{override.input_line}: {override.key_or_group} takes one name.")
    return [str(value)]


def _unknown(group: str, choice: str, options: Sequence[str]) -> str:
    near = near_matches(choice, options)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"There is no {group} {choice!r}; the choices are {', '.join(options)}.{guess}"


def _unknown_key(key: str, keys: Iterable[str], free: bool) -> str:
    near = near_matches(key, [*GROUPS, *keys])
    guess = f"; did you mean {' or '.join(near)}?" if near else "; `--cfg job` shows all keys."
    if free:
        guess = f"; to add it, write +{key}=VALUE."
    return f"There is no key {key!r}{guess}"


def _flat_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        name = f"{prefix}{key!s}"
        yield name
        child = OmegaConf.select(node, str(key))
        if isinstance(child, DictConfig):
            yield from _flat_keys(child, f"{name}.")


def _values(override: Override, multirun: bool) -> list[str]:
    """`override` once per value that it asks for."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not multirun:
        raise InputError(f"{override.input_line} names several values: add -m to run each of them.")
    if not override.is_discrete_sweep():
        raise InputError(f"{override.input_line}: this sweep takes listed values only.")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _compose(job: Sequence[str]) -> Config:
    try:
        return to_config(_hydra_compose(job))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_sentence(error)) from error
    except (AttributeError, KeyError, TypeError) as error:  # what a value of the wrong shape makes of Hydra's merging
        raise InputError(f"The values in {' '.join(job)!r} do not fit the config: {_sentence(error)}") from error


def _hydra_compose(overrides: Sequence[str]) -> DictConfig:
    return hydra_compose(CONFIG_NAME, overrides=list(overrides))


def _lines(error: BaseException) -> list[str]:
    return str(error).splitlines() or [type(error).__name__]


def _sentence(error: BaseException) -> str:
    """What Hydra or OmegaConf says in several lines and a cause, in one."""
    parts = [_lines(error)[0]]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parts.append(_lines(cause)[0])
    return ": ".join(part.rstrip(".") for part in parts) + "."
