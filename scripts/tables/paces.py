"""Whether an engine decodes at the same pace alone on the GPU and beside another process's context."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT

STATES = {"alone": "alone", "beside": "beside another process", "after": "after it has ended"}


@table("paces")
def paces(engines: str = "nano,fused", folder: str = REFERENCE) -> str:
    """Of scripts/paces.py: a row for each engine and batch size."""
    files = {engine: f"{folder}/paces-{engine}.json" for engine in engines.split(",")}
    made = {engine: json.loads((ROOT / f).read_text()) for engine, f in files.items() if (ROOT / f).is_file()}
    if not made:
        return "Not measured yet (`scripts/reference_checks.sh paces`)."
    rows = [[engine, *_cells(row)] for engine, record in made.items() for row in record["tpot_ms"]]
    first = next(iter(made.values()))
    blocks = len(first["tpot_ms"][0]["alone"])
    source = (
        f"{first['provenance']['gpu']['name']}, {first['model']}: TPOT in ms, medians of {blocks} blocks with their "
        "range. The other process holds a context on the GPU and does nothing. Files: "
        f"{', '.join(f'`{files[engine]}`' for engine in made)}."
    )
    return "\n\n".join([markdown(["engine", "batch", *STATES.values(), "beside / alone"], rows, left=1), source])


def _cells(row: dict[str, Any]) -> list[str]:
    times = [f"{median(row[s]):.3f} ({min(row[s]):.3f} to {max(row[s]):.3f})" for s in STATES]
    return [str(row["batch_size"]), *times, f"{median(row['beside']) / median(row['alone']):.2f}×"]
