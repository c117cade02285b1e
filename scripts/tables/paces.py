"""Whether an engine runs at the same pace alone on the GPU and beside another process's context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from harness.compare.table import KEY, Row
from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, ROOT

STATES = {"alone": "alone", "beside": "beside another process", "after": "after it has ended"}


@table("paces")
def paces(engines: str = "nano,fused", folder: str = REFERENCE) -> str:
    """Of scripts/paces.py: a row for each engine and call."""
    files = {engine: f"{folder}/paces-{engine}.json" for engine in engines.split(",")}
    made = {engine: json.loads((ROOT / f).read_text()) for engine, f in files.items() if (ROOT / f).is_file()}
    if not made:
        return "Not measured yet (`scripts/reference_checks.sh paces`)."
    rows = [[engine, *_cells(call)] for engine, record in made.items() for call in record["calls"]]
    doubts = [f"{engine}'s run was {r['status']}" for engine, r in made.items() if r["status"] != "ok"]
    doubts += [f"{engine}: {failure}" for engine, r in made.items() for failure in r["failures"]]
    source = (
        f"{'; '.join(dict.fromkeys(_where(r) for r in made.values()))}: medians of up to "
        f"{' and '.join(_counts(made))} with their range. The other "
        f"process holds a context on the GPU and does nothing. {'. '.join([*doubts, ''])}Files: "
        f"{', '.join(f'`{files[engine]}`' for engine in made)}."
    )
    return "\n\n".join([markdown(["engine", "call", *STATES.values(), "beside / alone"], rows, left=2), source])


def _counts(made: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many values a cell has at most, by what was measured."""
    calls = [call for record in made.values() for call in record["calls"]]
    found = []
    for metric, name in (("generate_ms", "prompts"), ("tpot_ms", "TPOT")):
        if most := max((len(call["alone"]) for call in calls if call["metric"] == metric), default=0):
            found.append(f"{most} values of {name}")
    return found


def _where(record: Mapping[str, Any]) -> str:
    seen = record["provenance"]
    return f"{(seen['cpu']['model'] if record['device'] == 'cpu' else seen['gpu']['name'])}, {record['model']}"


def _cells(call: Mapping[str, Any]) -> list[str]:
    name = Row(**{part: call[part] for part in KEY}).name
    ratio = f"{median(call['beside']) / median(call['alone']):.2f}×" if call["beside"] and call["alone"] else "–"
    return [name, *(_time(call[state]) for state in STATES), ratio]


def _time(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "–"
