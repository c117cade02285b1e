"""Launches measured on a GPU, as data: `choices/<gpu>.json`, written by `python -m kernels.tune`.

One file per GPU holds, per kernel, shape keys and what ran fastest there: the fields of that kernel's `Launch`, or
`{"path": "cublas"}` where a library's product and separate kernels won; of a decode step's product also
`{"path": "prefill"}` with a launch of `prefill_gate_up`. A GPU without a file, or a shape without an entry, gets the
kernel's own default, or a library's where that default is known to be slow. Each entry has its date. `none_chosen()`
makes every GPU such a GPU, for tests of the defaults.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from kernels._triton import power_of_two

Launch = TypeVar("Launch")
FOLDER = Path(__file__).with_name("choices")
BETWEEN = (48, 96, 192)
"""Numbers of a decode step's rows that are measured beside the powers of two, which are far from one another there."""
_ignored = False


def gpu_slug(device: torch.device) -> str:
    """The GPU's name as a file name: "NVIDIA H200" → "nvidia-h200"."""
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def fingerprint(device: torch.device) -> str:
    """Of the choices that hold on `device`: the first half of the file's SHA-256; "" where there are none."""
    file = FOLDER / f"{gpu_slug(device)}.json" if device.type == "cuda" else None
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32] if file and file.exists() else ""


@lru_cache
def _table(device: torch.device) -> dict[str, dict[str, dict[str, Any]]]:
    file = FOLDER / f"{gpu_slug(device)}.json"
    return json.loads(file.read_text(encoding="utf-8"))["choices"] if file.exists() else {}


def chosen(kernel: str, key: str, device: torch.device) -> dict[str, Any] | None:
    """What was measured fastest for `kernel` at shape `key` on this GPU; None where nothing was measured."""
    if _ignored or device.type != "cuda":
        return None
    return _table(device).get(kernel, {}).get(key)


def rows_measured(rows: int) -> tuple[int, ...]:
    """Numbers of rows whose measurements may serve a decode step of `rows`, the nearest first."""
    power = power_of_two(rows)
    return (*(count for count in BETWEEN if rows <= count < power), power)


def chosen_for(kernel: str, rows: int, key: Callable[[int], str], device: torch.device) -> dict[str, Any] | None:
    """`chosen` for a decode step of `rows`; `key`: of a number of rows that may have been measured."""
    entries = (chosen(kernel, key(count), device) for count in rows_measured(rows))
    return next((entry for entry in entries if entry is not None), None)


def launch_of(kind: type[Launch], values: Mapping[str, Any], device: torch.device) -> Launch:
    """A measured launch. ValueError: it has fields of another version of the kernels."""
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(
            f"choices/{gpu_slug(device)}.json holds launches of another version of the kernels ({error}): remove it, "
            "or measure again with python -m kernels.tune."
        ) from error


def fields_of(launch: Any) -> dict[str, Any]:
    """As a table keeps a launch: its fields that differ from their defaults."""
    values = {f.name: getattr(launch, f.name) for f in fields(launch) if getattr(launch, f.name) != f.default}
    return {name: fields_of(value) if is_dataclass(value) else value for name, value in values.items()}


@contextmanager
def none_chosen() -> Iterator[None]:
    """Inside the `with` block no measured choice is used, in the whole process."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


def save(device: torch.device, choices: dict[str, dict[str, dict[str, Any]]], facts: dict[str, Any]) -> Path:
    """Merge `choices`, as of today, into this GPU's file, under `facts` (its name, versions); the path of the file."""
    file = FOLDER / f"{gpu_slug(device)}.json"
    merged = json.loads(file.read_text(encoding="utf-8"))["choices"] if file.exists() else {}
    for kernel, entries in choices.items():
        dated = {key: {**entry, "date": time.strftime("%Y-%m-%d")} for key, entry in entries.items()}
        merged.setdefault(kernel, {}).update(dated)
    lines = []
    for kernel, entries in sorted(merged.items()):
        inside = ",\n".join(f"      {json.dumps(key)}: {json.dumps(entries[key])}" for key in entries)
        lines.append(f"    {json.dumps(kernel)}: {{\n{inside}\n    }}")
    text = ",\n".join(lines)
    FOLDER.mkdir(exist_ok=True)
    file.write_text(f'{{\n  "facts": {json.dumps(facts)},\n  "choices": {{\n{text}\n  }}\n}}\n', encoding="utf-8")
    _table.cache_clear()
    return file
