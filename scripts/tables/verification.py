"""How close engines came to the reference before they were timed."""

from __future__ import annotations

from scripts.tables.registry import markdown, table
from scripts.tables.sources import REFERENCE, runs


@table("verification")
def verification(folder: str = REFERENCE, workload: str = "latency", engines: str = "vllm,nano,fused") -> str:
    """Distance of each engine's logits from transformers in float32, and that of transformers in bfloat16."""
    rows = []
    for run in sorted(runs(folder).runs, key=lambda run: engines.find(run["engine"])):
        if run["workload"] != workload or run["engine"] not in engines.split(","):
            continue
        told = run["verification"]
        ours, noise = told["engine"], told["noise"]
        rows.append([
            run["engine"], told["status"], f"{told['positions']}",
            f"{ours['kl']:.2e}", f"{noise['kl']:.2e}", f"{told['kl_ratio']['value']:.2f}",
            f"{ours['nll_delta']:.2e}", f"{noise['nll_delta']:.2e}", f"{told['nll_delta_ratio']['value']:.2f}",
            f"{ours['greedy_agreement']:.1%}",
        ])  # fmt: skip
    head = ["engine", "outcome", "tokens", "KL", "KL of bf16", "ratio", "|ΔNLL|", "|ΔNLL| of bf16", "ratio", "greedy"]
    source = (
        "Means over teacher-forced tokens, against transformers in float32 on the same random weights and tokens; "
        "beside them the same of transformers in bfloat16. Above a ratio of 1.1 more tokens are taken, and an engine "
        f"passes only as long as the interval reaches it. Runs: `{folder}`."
    )
    return "\n\n".join([markdown(head, rows, left=2), source])
