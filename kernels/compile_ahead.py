"""Compiles many kernels at once: a start that meets them one after the other waits for each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import Any

from kernels._triton import HAVE_TRITON, INTERPRETED, triton

MOST_THREADS = 16


@contextmanager
def compiled_ahead(progress: Callable[[int, int], None] = lambda _done, _total: None) -> Iterator[None]:
    """Kernels that are launched inside do not run, but are compiled by many threads when the block ends; `progress` is
    called after each with their number so far and in all.

    What they would have written is left as it was: the block is for steps whose results nobody reads, and what else
    runs inside may compute with anything. Where nothing is compiled (Triton's interpreter, no Triton), it is run as it
    is. A kernel that cannot be compiled is no error here, but one at its launch.
    """
    if not HAVE_TRITON or INTERPRETED:
        yield
        return
    wanted: dict[str, Any] = {}
    runtime, kernel = triton.knobs.runtime, triton.JITFunction
    before, run = runtime.jit_cache_hook, kernel.run

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        wanted.setdefault(compile["specialization_data"], fn.jit_function)
        return True  # it is not compiled now

    def do_not_run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    runtime.jit_cache_hook, kernel.run = keep, do_not_run
    try:
        yield
    finally:
        runtime.jit_cache_hook, kernel.run = before, run
    # Most of a compilation is done without Python's lock. `preload` gives the kernels to the next launches too.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        compiling = [threads.submit(_compile, function, kind) for kind, function in wanted.items()]
        for done, _ in enumerate(as_completed(compiling), 1):
            progress(done, len(wanted))


def _compile(function: Any, specialization: str) -> None:
    with suppress(Exception):
        function.preload(specialization)
