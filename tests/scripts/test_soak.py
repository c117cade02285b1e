"""The soak with few requests on the CPU: it passes, and sees lost blocks, wrong tokens, ties and growing memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engines.fused import LLM as Fused
from engines.nano.block_manager import BlockManager
from scripts import soak
from scripts.tables import validation
from tests.engines import reference

FEW = 24


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The command's exit code, and its JSON file."""
    file = tmp_path_factory.mktemp("soak") / "soak.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "PAUSE_STEPS", 4)  # little time to recover
        patch.setattr(soak, "CACHE_TOKENS", 512)
        patch.setattr(sys, "argv", ["soak", "--requests", str(FEW), "--device", "cpu", "--json", str(file)])
        return soak.main(), file


def test_it_passes_and_the_table_shows_it(outcome):
    code, file = outcome
    made = json.loads(file.read_text())
    assert code == 0 and made["passed"]
    assert made["preemptions"] > 0 and made["aborted"] > 0
    assert made["requests"] == made["asked"] == FEW
    assert made["free_blocks"] == {"start": 32, "end": 32}
    shown = validation.soak(str(file))
    assert f"| tokens equal to nano's | {made['equal_tokens']:,} |" in shown
    assert "| free blocks at the start and at the end | 32, 32 |" in shown
    assert f"| requests | {FEW}, " in shown
    file.write_text(json.dumps(made | {"asked": 10_000}))
    assert f"| requests | {FEW} of 10,000 in the time there was, " in validation.soak(str(file))
    assert validation.soak("nothing.json").startswith("Not measured yet")


class Instant:
    """An engine that finishes each request with its first step."""

    def __init__(self) -> None:
        self.config = soak.engine_config("cpu")
        self.scheduler = SimpleNamespace(blocks=SimpleNamespace(free=[1]), num_preemptions=0)
        self.added, self.did = [], None

    def add(self, request):
        self.added.append(request.request_id)

    def abort(self, names): ...

    def has_unfinished(self):
        return bool(self.added)

    def advance(self):
        self.did = SimpleNamespace(tokens=[(name, 7) for name in self.added], finished=self.added)
        self.added = []

    def last_step(self):
        return self.did


def test_none_come_after_their_time_and_those_that_came_are_finished(monkeypatch):
    todo = [soak.Job(job.request, arrival, None) for arrival, job in enumerate(soak.jobs(9, 0))]
    monkeypatch.setattr(soak.time, "perf_counter", iter(range(100)).__next__)
    ran = soak.soak(Instant(), todo, seconds=4.5)  # a second a step, the first after 1
    assert ran.tokens == {f"{n}": [7] for n in range(4)}
    assert len(soak.soak(Instant(), todo).tokens) == 9


def test_jobs_are_the_same_for_the_same_seed():
    assert soak.jobs(50, 3) == soak.jobs(50, 3) != soak.jobs(50, 4)
    arrivals = [job.arrival for job in soak.jobs(200, 0)]
    assert arrivals == sorted(arrivals)


def test_a_lost_block_is_seen(monkeypatch):
    release, lost = BlockManager.release, []

    def forgetful(self, sequence):
        if not lost and len(sequence.block_table) > 1:
            lost.append(sequence.block_table.pop())
        release(self, sequence)

    monkeypatch.setattr(BlockManager, "release", forgetful)
    engine = Fused(soak.engine_config("cpu"))
    ran = soak.soak(engine, soak.jobs(3, 0))
    assert ran.free_blocks == (192, 191)


def jobs_and_tokens():
    """Two jobs that are not aborted, one that is, and what transformers continues their prompts with."""
    todo = [replace(job, abort_after=None) for job in soak.jobs(3, 1)]
    todo[2] = replace(todo[2], abort_after=1)
    continued = reference.greedy([list(job.request.prompt_token_ids) for job in todo], 5)
    return todo, {job.request.request_id: tokens for job, tokens in zip(todo, continued, strict=True)}


def test_wrong_and_missing_tokens_are_seen():
    todo, expected = jobs_and_tokens()
    config = soak.engine_config("cpu")
    assert soak.compare(todo, expected, expected, config) == soak.Comparison(15, 0, [], [])
    wrong = {**expected, "0": [*expected["0"][:3], (expected["0"][3] + 1) % 256, expected["0"][4]]}
    assert soak.compare(todo, wrong, expected, config) == soak.Comparison(13, 0, [], ["0"])
    short = {**expected, "1": expected["1"][:2], "2": expected["2"][:2]}  # the third was aborted
    assert soak.compare(todo, short, expected, config) == soak.Comparison(9, 1, [], ["1"])


@pytest.mark.parametrize(("gap", "ties", "differing"), [(0.5 * soak.TIE, ["0"], []), (2 * soak.TIE, [], ["0"])])
def test_a_tie_is_either_tokens(monkeypatch, gap, ties, differing):
    todo, expected = jobs_and_tokens()
    other = {**expected, "0": [expected["0"][0] ^ 1, *expected["0"][1:]]}

    def logits(checkpoint, sequences, dtype, device):
        ((prompt, _),) = sequences
        assert prompt == todo[0].request.prompt_token_ids
        row = torch.zeros(1, 260)
        row[0, expected["0"][0]], row[0, expected["0"][0] ^ 1] = 9.0, 9.0 - gap
        return [row]

    monkeypatch.setattr(soak, "teacher_forced_logits", logits)
    found = soak.compare(todo, other, expected, soak.engine_config("cpu"))
    assert (found.equal_tokens, found.ties, found.differing) == (10, ties, differing)


def test_memory_that_was_hardly_read_is_not_flat():
    """One reading has no second half: too few requests came in the time there was."""
    todo, expected = jobs_and_tokens()
    config = soak.engine_config("cpu")
    same = soak.compare(todo, expected, expected, config)
    for readings, passed in (([], False), ([{"host_bytes": 7}], False), ([{"host_bytes": 7}] * 2, True)):
        ran = soak.Outcome(expected, 5, 1.0, 0, (9, 9), readings)
        assert soak.record(config, 10_000, 0, ran, same)["passed"] is passed


@pytest.mark.parametrize(("found", "ran", "reasons"), [
    ({}, {}, []),
    ({"equal_tokens": 0}, {}, ["no tokens were compared"]),
    ({"differing": ["0"]}, {"free_blocks": (9, 8)}, ["tokens differ", "blocks are lost"]),
    ({}, {"memory": []}, ["memory was not read often enough"]),
    ({}, {"memory": [{"host_bytes": 0}, {"host_bytes": soak.GROWTH["host_bytes"]}]}, []),
    ({}, {"memory": [{"host_bytes": 0}, {"host_bytes": soak.GROWTH["host_bytes"] + 1}]}, ["host_bytes grew"]),
])  # fmt: skip
def test_the_record_says_why_it_failed_and_so_does_the_terminal(found, ran, reasons, capsys):
    good = soak.Outcome({"0": [7]}, 5, 1.0, 0, (9, 9), [{"host_bytes": 7}] * 2)
    made = soak.record(
        soak.engine_config("cpu"), 1, 0, replace(good, **ran), replace(soak.Comparison(equal_tokens=1), **found)
    )
    soak.show(made)
    assert (made["passed"], made["reasons"]) == (not reasons, reasons)
    assert capsys.readouterr().out.splitlines()[-1] == (f"FAILED: {', '.join(reasons)}" if reasons else "passed")


def test_growth_is_of_the_second_half_over_the_first():
    flat = [{"host_bytes": held} for held in (100, 900, 400, 500, 800, 850)]
    assert soak.growth(flat) == {"host_bytes": -50}
    leaking = [{"host_bytes": 1000 * n, "allocated_bytes": 7} for n in range(10)]
    assert soak.growth(leaking) == {"host_bytes": 5000, "allocated_bytes": 0}
