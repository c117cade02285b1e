"""Whether an engine decodes at the same pace alone on the GPU and beside another process's context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    doubts = [f"{engine}'s run was {r['status']}" for engine, r in made.items() if r["status"] != "ok"]
    doubts += [f"{engine}: {failure}" for engine, r in made.items() for failure in r["failures"]]
    source = (
        f"{'; '.join(dict.fromkeys(_where(r) for r in made.values()))}: TPOT in ms, medians of up to "
        f"{max(len(row['alone']) for r in made.values() for row in r['tpot_ms'])} blocks with their range. The other "
        f"process holds a context on the GPU and does nothing. {'. '.join([*doubts, ''])}Files: "
        f"{', '.join(f'`{files[engine]}`' for engine in made)}."
    )
    return "\n\n".join([markdown(["engine", "batch", *STATES.values(), "beside / alone"], rows, left=1), source])


def _where(record: Mapping[str, Any]) -> str:
    seen = record["provenance"]
    return f"{(seen['cpu']['model'] if record['device'] == 'cpu' else seen['gpu']['name'])}, {record['model']}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = f"{median(row['beside']) / median(row['alone']):.2f}×" if row["beside"] and row["alone"] else "–"
    return [str(row["batch_size"]), *(_time(row[state]) for state in STATES), ratio]


def _time(blocks: Sequence[float]) -> str:
    return f"{median(blocks):.3f} ({min(blocks):.3f} to {max(blocks):.3f})" if blocks else "–"
