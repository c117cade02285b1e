"""Child processes of this one: who is there, and seeing that they go."""

from __future__ import annotations

from typing import Any

GRACE_S = 20.0
"""How long a child may take to end by itself."""


def children() -> list[Any]:
    """All descendants of this process (psutil.Process), without Python's own resource tracker."""
    import psutil  # comes with vLLM

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def end(processes: list[Any], grace_s: float = GRACE_S) -> None:
    """Wait for processes to end, then kill those that do not."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace_s)
