"""Are an engine's decode logits as good at every captured batch size, and where contexts cross blocks and splits?

    python scripts/validate.py --engines fused,nano --json results/reference/h200/validation.json
    python scripts/validate.py --engines fused --models tiny --json FILE

For each case the engine continues random prompts greedily, all at once, so that its decode steps have exactly so many
rows: every size that graphs are captured for, up to 256; and few, some and many rows whose contexts cross 256, 512 and
1024 tokens. Transformers then computes the same tokens' logits in float32 and in the engine's dtype, many sequences in
a batch. Tokens drawn after the prompt itself are left out: only decode steps are judged.

A case passes if the upper end of the one-sided 95 % bootstrap interval (over sequences) of the engine's mean KL over
that of transformers in the same dtype is at most FACTOR, and the same of |dNLL|; in float32, by harness.verify's
absolute bounds. As long as FACTOR lies inside an interval, more prompts are looked at, twice as many in all each time
and up to MOST_TIMES as many; what they do not decide has not passed. Cases with graphs are run again without: logits of
the same tokens must be equal within rounding.

Models: `tiny` is the trained checkpoint of the tests in float32, `tiny-bf16` in bfloat16, others are names of
conf/model with random weights in bfloat16. With --seconds no case begins after that time; the record names those that
are left out, and --resume goes on with them, at the same commit and on a device of the same kind.

Exit codes: 0 all that were judged passed, 1 some did not or none was judged, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.base import EngineConfig, InputError, Request, SamplingParams, Scored
from engines.fused import LLM as Fused
from engines.hf import load_model
from engines.nano import LLM as Nano
from engines.nano.graphs import BATCH_SIZES
from harness import machine
from harness.config import compose
from harness.limits import device_of
from harness.results import write_json
from harness.verify import FLOAT32_KL, FLOAT32_NLL_DELTA, differences, resampled
from harness.weights import resolve
from harness.workloads import Prompts
from scripts.validation_record import Plan, kept, left_of, line, names_of, passed, passed_graphs

ENGINES = {"fused": Fused, "nano": Nano}
TINY = ROOT / "tests" / "assets" / "tiny-qwen3"
FACTOR, CONFIDENCE = 1.1, 0.95
EQUAL = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}
"""Norm of the difference of two runs' logits over the logits' norm: another order of sums, no more."""
LARGEST = 256
SHORTEST, LONGEST, DRAWN = 5, 40, 4
"""Lengths of prompts of the cases by batch size, and tokens drawn after each; the first comes from the prefill."""
BORDERS, BORDER_ROWS, BORDER_DRAWN = (256, 512, 1024), (1, 16, 64), 8
SPREAD = 4
"""Prompts of a border's cases end up to so many tokens apart, so that contexts cross it step by step."""
POSITIONS = 1920
"""Decode positions of a case by batch size at least; those at borders, whose references are long, take a third. Of the
tiny models, where few positions weigh much, TINY_TIMES as many. With a quarter of them the interval of |dNLL| ended
0.08 above its mean, so that a mean of 1.03 was not told from FACTOR."""
TINY_TIMES = 2
MOST_TIMES = 16
"""As many times a case's positions, if need be: where rounding hardly changes the logits, few tokens weigh most."""
FORWARD_TOKENS, SEQUENCES = 16384, 256
"""Tokens of a batch of transformers, and sequences that wait for it at most, with their logits."""


@dataclass(frozen=True)
class Case:
    """`groups` times `rows` prompts at once, of lengths from `shortest` to `longest`, and tokens drawn after each."""

    name: str
    rows: int
    groups: int
    shortest: int
    longest: int
    drawn: int


@dataclass(frozen=True)
class Ratio:
    """Of two means, with the ends of its one-sided intervals."""

    value: float
    low: float
    high: float


def cases(max_rows: int, max_length: int, positions: int) -> list[Case]:
    """Every bucket up to `max_rows`, and the borders that `max_length` reaches."""
    sizes = sorted({size for size in BATCH_SIZES if size < max_rows} | {max_rows})
    made = []
    for rows in sizes:
        groups = -(-positions // (rows * (DRAWN - 1)))
        made.append(Case(f"batch {rows}", rows, groups, SHORTEST, LONGEST, DRAWN))
    for border in BORDERS:
        longest = border - 2
        if longest + BORDER_DRAWN > max_length:
            # The model ends at the border: contexts come up to it and no further.
            longest = max_length - BORDER_DRAWN
            if longest + BORDER_DRAWN < border:
                continue
        for rows in (rows for rows in BORDER_ROWS if rows <= max_rows):
            groups = -(-positions // (3 * rows * (BORDER_DRAWN - 1)))
            made.append(Case(f"context {border}, batch {rows}", rows, groups, longest - SPREAD, longest, BORDER_DRAWN))
    return made


def requests(case: Case, prompts: Prompts) -> list[Request]:
    """One group's; lengths take turns over the case's range."""
    sampling = SamplingParams(0.0, case.drawn, ignore_eos=True)
    span = case.longest - case.shortest + 1
    return [prompts.request(case.shortest + (7 * i) % span, sampling) for i in range(case.rows)]


def decoded(scored: Sequence[Scored]) -> list[Scored]:
    """Without the first token of each, which the prefill has drawn."""
    return [Scored((*s.prompt_token_ids, s.token_ids[0]), s.token_ids[1:], s.logits[1:]) for s in scored]


class Reference:
    """Transformers in one dtype, over batches of whole sequences, padded behind their ends: causal attention does not
    look there."""

    def __init__(self, checkpoint: Path, dtype: str, device: str) -> None:
        self.model: nn.Module = load_model(checkpoint, getattr(torch, dtype), device)
        self.device = device

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Scored]) -> list[Tensor]:
        """[tokens, vocab] float32 of each, on the device."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # engines ask for less
        try:
            found: list[Tensor] = []
            longest = max(len(s.prompt_token_ids) + len(s.token_ids) for s in sequences) - 1
            size = max(1, FORWARD_TOKENS // longest)
            for start in range(0, len(sequences), size):
                found += self._batch(sequences[start : start + size])
            return found
        finally:
            torch.set_float32_matmul_precision(precision)

    def _batch(self, sequences: Sequence[Scored]) -> list[Tensor]:
        ids = [torch.tensor([*s.prompt_token_ids, *s.token_ids[:-1]]) for s in sequences]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)
        hidden = self.model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state  # type: ignore[operator]
        counts = [len(s.token_ids) for s in sequences]
        ends = enumerate(zip(ids, counts, strict=True))
        rows = [hidden[i, len(one) - count : len(one)] for i, (one, count) in ends]
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return list(head(torch.cat(rows)).float().split(counts))


def ratio_of(ours: Sequence[Tensor], noise: Sequence[Tensor], column: int) -> Ratio:
    """Of the means of a column of `differences`."""
    value, ratios = resampled(ours, noise, column)
    low, high = np.quantile(ratios, (1 - CONFIDENCE, CONFIDENCE))
    return Ratio(value, float(low), float(high))


def equality(first: Sequence[Scored], second: Sequence[Scored]) -> tuple[float, int]:
    """Greatest relative difference of logits over positions whose tokens so far are the same, and their number."""
    worst, compared = 0.0, 0
    for one, other in zip(first, second, strict=True):
        for i in range(1, len(one.token_ids)):  # the first is the prefill's
            if one.token_ids[:i] != other.token_ids[:i]:
                break
            error = (one.logits[i] - other.logits[i]).norm() / one.logits[i].norm()
            worst, compared = max(worst, float(error)), compared + 1
            if not error <= worst:  # NaN
                return float("inf"), compared
    return worst, compared


def judge(case: Case, engine: Nano, references: Sequence[Reference], prompts: Prompts) -> dict[str, Any]:
    """One case on one engine; the references are float32 and, unless that is the engine's dtype, the engine's."""
    found = Found(references)
    equal: dict[str, Any] = {}
    groups = 0
    while True:
        more = max(case.groups, groups)
        for group in range(groups, groups + more):
            asked = requests(case, prompts)
            scored = engine.score(asked)
            if group == 0 and engine.runner.graphs is not None:
                worst, compared = equality(scored, without_graphs(engine, asked))
                equal = outcome_of({"graph_against_eager": worst, "graph_positions": compared}, engine.config.dtype)
            found.add(decoded(scored))
        found.flush()
        groups += more
        made = verdict(case, found.ours, found.noise, engine.config.dtype) | equal
        made["undecided"] &= passed_graphs(made)
        if not made["undecided"] or groups >= MOST_TIMES * case.groups:
            return made


class Found:
    """`differences` to float32, of an engine and of transformers in its dtype; sequences are looked at many at once."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self.references = references
        self.ours: list[Tensor] = []
        self.noise: list[Tensor] = []
        self._waiting: list[Scored] = []

    def add(self, sequences: Sequence[Scored]) -> None:
        self._waiting += sequences
        if len(self._waiting) >= SEQUENCES:
            self.flush()

    def flush(self) -> None:
        """Look at all that wait."""
        sequences, self._waiting = self._waiting, []
        if not sequences:
            return
        first, *others = self.references
        truth = first.logits(sequences)
        self.ours += compared(truth, [s.logits.to(first.device) for s in sequences], sequences)
        for other in others:
            self.noise += compared(truth, other.logits(sequences), sequences)


def compared(truth: Sequence[Tensor], other: Sequence[Tensor], sequences: Sequence[Scored]) -> list[Tensor]:
    """`differences` of each sequence, on the CPU."""
    pairs = zip(truth, other, sequences, strict=True)
    return [differences(ref, logits, s.token_ids).cpu() for ref, logits, s in pairs]


def without_graphs(engine: Nano, asked: Sequence[Request]) -> list[Scored]:
    """The same requests by single launches."""
    runner = engine.runner
    graphs, runner.graphs = runner.graphs, None
    try:
        return engine.score(asked)
    finally:
        runner.graphs = graphs


def outcome_of(equal: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`equal` with whether it is: nothing to compare is not."""
    close = equal["graph_positions"] > 0 and equal["graph_against_eager"] <= EQUAL[dtype]
    return {**equal, "graphs_passed": close}


def verdict(case: Case, ours: Sequence[Tensor], noise: Sequence[Tensor], dtype: str) -> dict[str, Any]:
    """Means, ratios and whether the case passes; comparisons are written so that NaN fails."""
    kl, nll, greedy = torch.cat(list(ours)).mean(0).tolist()
    made: dict[str, Any] = {"case": asdict(case), "positions": sum(map(len, ours)), "kl": kl, "nll_delta": nll}
    made |= {"greedy_agreement": greedy}
    if dtype == "float32":
        return made | {"passed": kl <= FLOAT32_KL and nll <= FLOAT32_NLL_DELTA, "undecided": False}
    ratios = ratio_of(ours, noise, 0), ratio_of(ours, noise, 1)
    base = torch.cat(list(noise)).mean(0).tolist()
    made |= {"noise_kl": base[0], "noise_nll_delta": base[1]}
    made |= {"kl_ratio": asdict(ratios[0]), "nll_delta_ratio": asdict(ratios[1])}
    passed = all(r.high <= FACTOR for r in ratios)
    return made | {"passed": passed, "undecided": not passed and all(r.low <= FACTOR for r in ratios)}


def setting(model: str, device: str, max_rows: int) -> tuple[EngineConfig, int]:
    """What an engine is started with for `model`, and the model's vocabulary. InputError: there is no such model."""
    if model in ("tiny", "tiny-bf16"):
        dtype, block, length, vocab, checkpoint = "float32", 16, 1024, 256, TINY
        if model == "tiny-bf16":
            dtype = "bfloat16"
    else:
        conf = compose(["engine=fused", f"model={model}"]).model
        checkpoint = resolve(conf, "random", 0).path
        dtype, block, length, vocab = "bfloat16", 256, 1280, conf.vocab_size
    room = -(-(LONGEST + DRAWN) // block) * block * max_rows
    at_border = -(-length // block) * block * max(rows for rows in BORDER_ROWS if rows <= max_rows)
    config = EngineConfig(
        checkpoint, dtype=dtype, device=device, max_model_len=length, max_num_seqs=max_rows,
        max_num_batched_tokens=16384, kv_cache_tokens=max(room, at_border), options={"block_size": block},
    )  # fmt: skip
    return config, vocab


def validated(
    engine_name: str, model: str, started_with: tuple[EngineConfig, int], device: str, to_do: Sequence[Case],
    deadline_s: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one engine and model, as they are measured, until there is no time for more."""
    if not to_do or time.perf_counter() > deadline_s:
        return
    config, vocab = started_with
    engine = ENGINES[engine_name](config)
    dtypes = ["float32"] if config.dtype == "float32" else ["float32", config.dtype]
    references = [Reference(config.checkpoint, dtype, device) for dtype in dtypes]
    prompts = Prompts(vocab, seed=2)
    try:
        for case in to_do:
            start_s = time.perf_counter()
            if start_s > deadline_s:
                return
            row = {"engine": engine_name, "model": model, "dtype": config.dtype}
            row |= judge(case, engine, references, prompts)
            yield row | {"seconds": time.perf_counter() - start_s}
    finally:
        engine.close()
        references.clear()
        gc.collect()


def planned(
    engines: Sequence[str], settings: Mapping[str, tuple[EngineConfig, int]], rows: int, positions: int
) -> Plan:
    """All cases of batches up to `rows`. InputError: there is no such engine."""
    plan: Plan = {}
    for model, (config, _) in settings.items():
        times = TINY_TIMES if config.checkpoint == TINY else 1
        of_model = [asdict(case) for case in cases(rows, config.max_model_len, times * positions)]
        for engine in engines:
            if engine not in ENGINES:
                raise InputError(f"There is no engine {engine} to validate: {', '.join(ENGINES)}.")
            plan[engine, model] = of_model
    return plan


def main() -> int:
    """Exit code 0, 1 or 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="fused,nano", help="default: %(default)s")
    parser.add_argument("--models", default="tiny,tiny-bf16,qwen3-0.6b", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=LARGEST, help="the largest batch (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of a case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no more cases begin")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the outcome, small enough to commit")
    parser.add_argument("--resume", action="store_true", help="keep what FILE holds, and judge what is missing")
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume goes on from the FILE of --json.")
    provenance = machine.provenance()
    made: dict[str, Any] = {"provenance": provenance, "factor": FACTOR, "equal": EQUAL, "rows": [], "left_out": []}
    deadline_s = time.perf_counter() + arguments.seconds
    try:
        device = device_of(arguments.device)
        name = provenance["gpu"]["name"] if device == "cuda" else provenance["cpu"]["model"]
        made = {"device": name, **made}
        settings = {model: setting(model, device, arguments.rows) for model in arguments.models.split(",")}
        plan = planned(arguments.engines.split(","), settings, arguments.rows, arguments.positions)
        others: list[str] = []
        if arguments.resume:
            made["rows"], others = kept(arguments.json, made, plan)
        for (engine, model), left in left_of(plan, made["rows"]).items():
            to_do = [Case(**case) for case in left]
            for row in validated(engine, model, settings[model], device, to_do, deadline_s):
                made["rows"].append(row)
                made["left_out"] = [*names_of(plan, made["rows"]), *others]
                print(line(row), flush=True)
                if arguments.json:  # whatever comes after, this much is there
                    write_json(arguments.json, made)
        made["left_out"] = [*names_of(plan, made["rows"]), *others]  # also where there was no time for any
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        write_json(arguments.json, made)
    failed = [row for row in made["rows"] if not passed(row)]
    print(f"{len(made['rows']) - len(failed)} of {len(made['rows'])} cases passed")
    if made["left_out"]:
        print(f"left out for want of time: {', '.join(made['left_out'])}")
    return 1 if failed or not made["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
