"""Names for runs that stand beside each other: the engine's, and where that is not enough, what sets them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NOT_TOLD = ("engine.name", "engine.target", "results")
_SHORT = ("engine.options.", "engine.", "limits.")
_LIST_KEY = "features"


def labels(runs: Sequence[Mapping[str, Any]], machine_of: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A different label for each run: "nano", or "nano seed=1", or "nano on NVIDIA H100", at last "nano #2"."""
    found = [_label(run, [r for r in runs if r.get("engine") == run.get("engine")], machine_of) for run in runs]
    repeated, seen = Counter(found), Counter[str]()
    for i, label in enumerate(found):
        if repeated[label] > 1:
            seen[label] += 1
            found[i] = f"{label} #{seen[label]}"
    return found


def _label(
    run: Mapping[str, Any], alike: Sequence[Mapping[str, Any]], machine_of: Callable[[Mapping[str, Any]], str]
) -> str:
    engine = str(run.get("engine", "unknown"))
    leaves = [flat(other.get("config") or {}) for other in alike]
    own = flat(run.get("config") or {})
    keys = sorted({key for other in leaves for key in other} - set(_NOT_TOLD))
    differing = [key for key in keys if len({repr(other.get(key)) for other in leaves}) > 1]
    parts = [_part(key, own[key], [other.get(key) for other in leaves]) for key in differing if key in own]
    if len({machine_of(other) for other in alike}) > 1:
        parts.append(f"on {machine_of(run)}")
    return " ".join([engine, *parts])


def _part(key: str, value: Any, others: Sequence[Any]) -> str:
    if key.endswith(_LIST_KEY) and isinstance(value, list | tuple):
        return feature_set(value, [other for other in others if isinstance(other, list | tuple)])
    for prefix in _SHORT:
        key = key.removeprefix(prefix)
    return f"{key}={value}"


def feature_set(features: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    """A set of features in few words, beside the others: "all features", "without head", "only head", "no features"."""
    everything = {name for other in [*others, features] for name in other}
    missing = sorted(everything - set(features))
    if not features:
        return "no features"
    if not missing:
        return "all features"
    return f"only {'+'.join(features)}" if len(features) < len(missing) else f"without {'+'.join(missing)}"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's leaves by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
