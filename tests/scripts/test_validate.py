"""Validation of decode logits: rows of its steps, its reference, its bounds, and that it sees an engine that is off."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from engines.base import Scored
from engines.fused import LLM as Fused
from engines.hf import teacher_forced_logits
from scripts import validate
from scripts.tables import validation
from scripts.validate import Case, Reference
from tests.engines import reference

ROWS = 4


def config(dtype: str = "float32"):
    return validate.setting("tiny" if dtype == "float32" else "tiny-bf16", "cpu", ROWS)[0]


def test_every_bucket_and_every_border_that_the_model_reaches():
    found = validate.cases(256, 1280, 480)
    sizes = [case.rows for case in found if case.name.startswith("batch")]
    assert sizes == [1, 2, 4, 8, *range(16, 257, 16)]
    assert all(c.groups * c.rows * (c.drawn - 1) >= 480 for c in found if c.name.startswith("batch"))
    borders = {(case.longest, case.rows) for case in found if case.name.startswith("context")}
    assert borders == {(border - 2, rows) for border in (256, 512, 1024) for rows in (1, 16, 64)}
    for case in found:
        if case.name.startswith("context"):  # contexts of decode steps lie on both sides of the border
            border = case.longest + 2
            assert case.longest + 1 < border < case.shortest + case.drawn - 1
    tiny = [case for case in validate.cases(4, 1024, 480) if case.name.startswith("context 1024")]
    assert [case.longest + case.drawn for case in tiny] == [1024]


def test_decode_steps_have_exactly_so_many_rows(monkeypatch):
    engine, seen = Fused(config()), []
    decode = engine.runner._decode
    monkeypatch.setattr(engine.runner, "_decode", lambda rows, longest: seen.append(rows) or decode(rows, longest))
    case = Case("batch 3", 3, 2, 5, 9, 4)
    prompts = validate.Prompts(256, 0)
    lengths = []
    for _ in range(case.groups):
        asked = validate.requests(case, prompts)
        lengths += [len(request.prompt_token_ids) for request in asked]
        engine.score(asked)
    assert seen == [3] * (3 + 3)  # the first of four tokens comes from the prefill
    assert set(lengths) <= set(range(5, 10)) and len(set(lengths)) > 1


def test_the_padded_reference_is_the_one_by_one(monkeypatch):
    monkeypatch.setattr(validate, "FORWARD_TOKENS", 64)  # several batches
    asked = reference.requests(reference.text_prompts((3, 40, 17, 29, 5)), 4)
    scored = validate.decoded(Fused(config()).score(asked))
    assert [len(s.token_ids) for s in scored] == [3] * 5
    found = Reference(reference.TINY, "float32", "cpu").logits(scored)
    sequences = [(s.prompt_token_ids, s.token_ids) for s in scored]
    expected = teacher_forced_logits(reference.TINY, sequences, torch.float32, "cpu")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_the_ends_are_those_of_the_normal_theory():
    """Sums of 400 sequences with a known spread: the mean's ratio has a standard error that can be written down."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.full((1, 1), 1.0) for _ in range(400)]
    ours = [torch.full((1, 1), 1.0 + 0.5 * float(torch.randn((), generator=generator))) for _ in range(400)]
    found = validate.ratio_of(ours, noise, 0)
    values = torch.cat(ours)
    assert found.value == pytest.approx(float(values.mean()))
    error = float(values.std(correction=0)) / 20
    assert found.high - found.value == pytest.approx(1.645 * error, rel=0.1)
    assert found.value - found.low == pytest.approx(1.645 * error, rel=0.1)


def scored(logits: torch.Tensor, tokens: tuple[int, ...]) -> Scored:
    return Scored((1,), tokens, logits)


def test_graphs_are_compared_as_far_as_tokens_are_the_same():
    logits = torch.ones(4, 9)
    other = logits.clone()
    other[2] *= 1.5
    other[3] *= 100.0
    assert validate.equality([scored(logits, (1, 2, 3, 4))], [scored(other, (1, 2, 9, 4))]) == (pytest.approx(0.5), 2)
    assert validate.equality([scored(logits, (1, 2, 3, 4))], [scored(other, (8, 2, 3, 4))]) == (0.0, 0)
    other[1] = float("nan")
    assert validate.equality([scored(logits, (1, 2, 3, 4))], [scored(other, (1, 2, 3, 4))])[0] == float("inf")
    assert not validate.outcome_of({"graph_against_eager": 0.0, "graph_positions": 0}, "float32")["graphs_passed"]
    assert validate.outcome_of({"graph_against_eager": 1e-5, "graph_positions": 3}, "float32")["graphs_passed"]
    assert not validate.outcome_of({"graph_against_eager": 1e-3, "graph_positions": 3}, "float32")["graphs_passed"]


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.01), ("bfloat16", 0.5)])
def test_an_engine_that_is_off_fails(dtype, off, monkeypatch):
    monkeypatch.setattr(validate, "MOST_TIMES", 1)
    engine = Fused(config(dtype))
    references = [Reference(reference.TINY, name, "cpu") for name in dict.fromkeys(("float32", dtype))]
    case = Case("batch 4", 4, 12, 5, 20, 4)
    right = validate.judge(case, engine, references, validate.Prompts(256, 0))
    assert right["positions"] == 4 * 12 * 3
    if dtype == "float32":
        assert right["passed"]
    score, generator = engine.score, torch.Generator().manual_seed(0)

    def worse(asked):
        return [
            replace(s, logits=s.logits + off * torch.randn(s.logits.shape, generator=generator)) for s in score(asked)
        ]

    monkeypatch.setattr(engine, "score", worse)
    wrong = validate.judge(case, engine, references, validate.Prompts(256, 0))
    assert not wrong["passed"]
    assert wrong["kl"] > 10 * right["kl"]


@pytest.mark.parametrize(("decided_at", "times"), [(1, 1), (3, 4), (16, 16), (99, 16)])
def test_undecided_cases_are_looked_at_with_more_prompts(decided_at, times, monkeypatch):
    """Two times as many in all each time; what is still undecided in the end has not passed."""

    def verdict(case, ours, noise, dtype):
        decided = sum(map(len, ours)) >= decided_at * 2 * 3
        return {"positions": sum(map(len, ours)), "passed": decided, "undecided": not decided}

    monkeypatch.setattr(validate, "verdict", verdict)
    references = [Reference(reference.TINY, "float32", "cpu")]
    made = validate.judge(Case("batch 2", 2, 1, 5, 9, 4), Fused(config()), references, validate.Prompts(256, 0))
    assert made["positions"] == times * 2 * 3
    assert made["passed"] == (decided_at <= 16) != made["undecided"]


def test_graphs_that_differ_are_no_question_of_more_prompts(monkeypatch):
    monkeypatch.setattr(validate, "verdict", lambda *_: {"passed": False, "undecided": True})
    monkeypatch.setattr(validate, "without_graphs", lambda *_: [])
    monkeypatch.setattr(validate, "equality", lambda *_: (1.0, 3))
    engine = Fused(config())
    captured = SimpleNamespace(score=engine.score, config=engine.config, runner=SimpleNamespace(graphs=True))
    references = [Reference(reference.TINY, "float32", "cpu")]
    made = validate.judge(Case("batch 2", 2, 1, 5, 9, 4), captured, references, validate.Prompts(256, 0))
    assert not made["graphs_passed"] and not made["undecided"]


def test_a_verdict_is_open_where_the_bound_lies_in_an_interval():
    generator = torch.Generator().manual_seed(0)
    case = Case("batch 2", 2, 1, 5, 9, 4)
    noise = [torch.ones(3, 3) for _ in range(100)]

    def judged(mean: float, spread: float) -> tuple[bool, bool]:
        ours = [torch.ones(3, 3) * (mean + spread * float(torch.randn((), generator=generator))) for _ in range(100)]
        found = validate.verdict(case, ours, noise, "bfloat16")
        return found["passed"], found["undecided"]

    assert judged(1.0, 0.1) == (True, False)
    assert judged(1.0, 2.0) == (False, True)
    assert judged(1.5, 0.1) == (False, False)


def test_the_command_writes_what_the_table_shows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "validation.json"
    monkeypatch.setattr(validate, "BORDERS", ())
    monkeypatch.setattr(validate, "TINY_TIMES", 1)
    arguments = ["--engines", "fused,nano", "--models", "tiny", "--rows", "2", "--positions", "6", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["validate", *arguments, "--json", str(file)])
    assert validate.main() == 0
    assert "4 of 4 cases passed" in capsys.readouterr().out
    made = json.loads(file.read_text())
    assert [(row["engine"], row["case"]["rows"], row["positions"]) for row in made["rows"]] == [
        ("fused", 1, 6), ("fused", 2, 6), ("nano", 1, 6), ("nano", 2, 6)
    ]  # fmt: skip
    made["rows"][1] |= {
        "kl_ratio": {"value": 0.5, "high": 0.75}, "nll_delta_ratio": {"value": 1.0, "high": 1.2}, "passed": False,
        "graph_against_eager": 2e-3,
    }  # fmt: skip
    made["left_out"] = ["nano tiny batch 9"]
    file.write_text(json.dumps(made))
    shown = validation.validation(str(file))
    worst = max(row["kl"] for row in made["rows"][:2])
    row = f"| fused | tiny | float32 | batch sizes | 2 | 1 | 12 | {worst:.1e} | 0.50 – 0.50 (≤ 0.75) |"
    assert f"{row} 1.00 – 1.00 (≤ 1.20) | 2.0e-03 |" in shown
    assert "Failed: fused tiny batch 2. Left out for want of time: nano tiny batch 9. File" in shown
    assert validation.validation("nothing.json").startswith("Not measured yet")


@pytest.mark.parametrize(("times", "cases", "left_out"), [
    ([0, 1, 1, 11, 11, 11], [1], ["fused tiny batch 2", "all of nano tiny"]),
    ([0, 11, 11], [], ["all of fused tiny", "all of nano tiny"]),
])  # fmt: skip
def test_no_case_begins_after_its_time_and_those_left_out_have_names(
    tmp_path, monkeypatch, capsys, times, cases, left_out
):
    """The clock is asked: at the start; of each engine; of each case when it begins and when it has ended."""
    file, clock = tmp_path / "validation.json", iter(times)
    monkeypatch.setattr(validate, "BORDERS", ())
    monkeypatch.setattr(validate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(validate, "judge", lambda case, *_: {"case": asdict(case),
                        "positions": 3, "kl": 0.0, "passed": True})  # fmt: skip
    monkeypatch.setattr(validate, "ENGINES", dict.fromkeys(validate.ENGINES, lambda _: SimpleNamespace(close=int)))
    monkeypatch.setattr(validate, "Reference", lambda *_: None)
    arguments = ["--models", "tiny", "--rows", "2", "--seconds", "10", "--device", "cpu", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["validate", *arguments])
    assert validate.main() == (0 if cases else 1)
    made = json.loads(file.read_text())
    assert [row["case"]["rows"] for row in made["rows"]] == cases
    assert made["left_out"] == left_out
    assert "left out for want of time: " + ", ".join(left_out) in capsys.readouterr().out


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """Runs the command on the tiny model with --resume and batches up to `rows`; what it judged, its exit code and the
    file. It is interrupted at the case of `stop` rows. `code` is the state of the checkout."""
    file, judged = tmp_path / "validation.json", []
    code = {"git": {"commit": "one", "dirty": False}}

    def run(rows: int, *more: str, engines: str = "fused", stop: int = 0, positions: int = 9):
        def judge(case, *_):
            if case.rows == stop:
                raise KeyboardInterrupt
            judged.append(case.rows)
            return {"case": asdict(case), "positions": 3, "kl": 0.0, "passed": True}

        arguments = ["--models", "tiny", "--device", "cpu", "--rows", str(rows), "--positions", str(positions)]
        monkeypatch.setattr(sys, "argv", ["validate", *arguments, "--engines", engines, *more])
        monkeypatch.setattr(validate, "judge", judge)
        judged.clear()
        try:
            outcome = validate.main()
        except KeyboardInterrupt:
            outcome = 130
        return list(judged), outcome, json.loads(file.read_text()) if file.exists() else None

    monkeypatch.setattr(validate, "BORDERS", ())
    monkeypatch.setattr(validate, "ENGINES", dict.fromkeys(validate.ENGINES, lambda _: SimpleNamespace(close=int)))
    monkeypatch.setattr(validate, "Reference", lambda *_: None)
    provenance = validate.machine.provenance
    monkeypatch.setattr(validate.machine, "provenance", lambda: provenance() | {"git": code["git"]})
    return run, file, code


def test_what_is_missing_can_be_judged_later(resume):
    run, file, _ = resume
    again = ("--resume", "--json", str(file))
    assert run(1, *again)[:2] == ([1], 0)  # there is nothing to go on from yet
    judged, outcome, made = run(4, *again, engines="fused,nano", stop=4)
    assert (judged, outcome) == ([2], 130)
    assert made["left_out"] == ["fused tiny batch 4", "all of nano tiny"]  # an interrupt does not hide it
    judged, outcome, made = run(4, *again)
    assert (judged, outcome) == ([4], 0) and made["left_out"] == ["all of nano tiny"]  # nor do others' cases
    judged, outcome, made = run(4, *again, engines="fused,nano")
    assert (judged, outcome) == ([1, 2, 4], 0) and made["left_out"] == []
    assert [(row["engine"], row["case"]["rows"]) for row in made["rows"]] == [
        ("fused", 1), ("fused", 2), ("fused", 4), ("nano", 1), ("nano", 2), ("nano", 4)
    ]  # fmt: skip
    assert run(4, *again, engines="fused,nano") == ([], 0, made)
    judged, _, made = run(4, *again, positions=99)  # other cases by the same names
    assert judged == [1, 2, 4] and len(made["rows"]) == 6
    assert run(1, "--json", str(file))[:2] == ([1], 0)


@pytest.mark.parametrize(("git", "device", "said"), [
    ({"commit": "another", "dirty": False}, None, "at commit one, this is"),
    ({"commit": "one", "dirty": True}, None, "at commit one, this is"),
    ({"commit": "one", "dirty": False}, "another GPU", "is of another GPU at commit one"),
    (None, None, "this is"),
])  # fmt: skip
def test_only_the_same_code_on_the_same_device_is_resumed(resume, capsys, git, device, said):
    run, file, code = resume
    made = run(1, "--json", str(file))[2]
    if device:
        file.write_text(json.dumps(made | {"device": device}))
    code["git"] = git
    assert run(2, "--resume", "--json", str(file))[:2] == ([], 2)
    assert said in capsys.readouterr().err


def test_uncommitted_code_and_no_file_cannot_be_resumed(resume, capsys):
    run, file, code = resume
    code["git"] = {"commit": "one", "dirty": True}
    run(1, "--json", str(file))
    assert run(2, "--resume", "--json", str(file))[:2] == ([], 2) and "is of no commit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(2, "--resume")
    assert "goes on from the FILE of --json" in capsys.readouterr().err
