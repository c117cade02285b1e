"""Tables of the cache's size and of the memory beside it, worked out by hand."""

from pathlib import Path

import pytest

from engines.base import InputError
from scripts.tables import cache
from tests.scripts.table_runs import cells, made_up_run, write


def test_cache_bytes() -> None:
    row = next(r for r in cells(cache.cache_bytes()) if r[0] == "llama-3.2-1b")
    # 2 × 16 layers × 8 heads × 64 × 2 B = 32,768; × 256 = 8 MiB; × 4096 = 128 MiB; a GiB holds 32,768
    assert row == ["llama-3.2-1b", "16 × 8 × 64", "32,768", "8.00", "128", "32,768"]


def test_cache_size(tmp_path: Path) -> None:
    write(tmp_path / "run", made_up_run())
    # half of 1000 MiB; 2560 tokens × 114,688 B = 280 MiB
    assert cells(cache.cache_size(str(tmp_path))) == [
        ["the GPU's memory", "1,000"],
        ["50% of it", "500"],
        ["cache: 10 blocks × 256 tokens × 114,688 bytes", "280"],
        ["left for weights, the largest step, graphs and CUDA itself", "220"],
    ]
    with pytest.raises(InputError, match="no latency run of engine fused"):
        cache.cache_size(str(tmp_path), "fused")


def test_memory_beside_by_hand(tmp_path: Path) -> None:
    """Of qwen3-0.6b a layer's matrices have 15,728,640 elements, the head 151,936 × 1,024."""
    known = (28 * 15_728_640 + 151_936 * 1024) * 2 + 2560 * 114_688

    def memory(allocated: int, peak: int, reserved: int, device: int) -> dict[str, int]:
        sizes = {"allocated": allocated, "peak_allocated": peak, "reserved": reserved, "device_used": device}
        return {f"{name}_bytes": known + size * 2**20 for name, size in sizes.items()}

    shapes = [
        {"timed": {"status": "ok", "memory": memory(10, 30, 40, 70)}},
        {"timed": {"status": "ok", "memory": memory(10, 20, 50, 60)}},
        {"timed": {"status": "out of memory"}},
    ]
    write(tmp_path / "run", made_up_run(shapes=shapes))
    assert cells(cache.memory_beside(str(tmp_path), "nano")) == [["nano", "2,560", "10", "30", "50", "70"]]
