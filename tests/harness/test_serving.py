"""Requests that arrive over time: what is drawn, what is made of the times that come back, and a whole run."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from engines.base import InputError, RequestResult
from harness.config import Config, SloConf, WorkloadConf, compose
from harness.limits import Work
from harness.progress import Reporter
from harness.results import load, request_row
from harness.rounds import items
from harness.runner import run
from harness.serving import Traced, draw_lengths, load_record, loads, meets, read_trace, unfinished, unit_arrivals

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"


def workload(**changes: Any) -> WorkloadConf:
    settings: dict[str, Any] = {
        "name": "serving", "kind": "serving", "arrivals": "poisson", "rates": [2.0, 8.0], "cpu_rates": [1.0],
        "num_requests": 40, "cpu_num_requests": 4, "prompt_len": [10, 50], "output_len": [5, 20],
    }  # fmt: skip
    return WorkloadConf(**(settings | changes))


def row(arrival_s: float, token_times_s: list[float]) -> dict[str, Any]:
    tokens = (0,) * len(token_times_s)
    return request_row("nano", "default", RequestResult("r", 10, tokens, arrival_s, tuple(token_times_s), "length"), 0)


# What arrives


def test_poisson_gaps_are_exponential_and_the_same_for_every_rate() -> None:
    slow, fast = loads(workload(num_requests=2000), "cuda", 260, seed=0)
    for one in (slow, fast):
        assert one.arrivals_s[0] == 0
        assert stats.kstest(np.diff(one.arrivals_s), stats.expon(scale=1 / one.rate).cdf).pvalue > 0.05
    assert [4 * t for t in fast.arrivals_s] == pytest.approx(slow.arrivals_s)
    assert np.corrcoef(np.diff(slow.arrivals_s)[:-1], np.diff(slow.arrivals_s)[1:])[0, 1] == pytest.approx(0, abs=0.06)


def test_bursts_come_in_groups_whose_mean_rate_is_the_rate() -> None:
    _, fast = loads(workload(arrivals="burst", burst_size=4, num_requests=10), "cuda", 260, seed=0)
    assert fast.arrivals_s == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]


def test_all_at_once_is_one_pass_without_a_rate() -> None:
    (one,) = loads(workload(arrivals="all", rates=[], cpu_rates=[]), "cuda", 260, seed=0)
    assert (one.rate, set(one.arrivals_s), len(one.requests)) == (None, {0.0}, 40)


def test_everything_follows_from_the_seed_and_nothing_else() -> None:
    slow, fast = loads(workload(), "cuda", 260, seed=3)
    assert [slow, fast] == loads(workload(), "cuda", 260, seed=3)
    other, _ = loads(workload(), "cuda", 260, seed=4)
    assert other.arrivals_s != slow.arrivals_s and sizes(other) != sizes(slow)
    # At each rate the same lengths, and prompts of its own.
    assert sizes(slow) == sizes(fast)
    assert not {r.prompt_token_ids for r in slow.requests} & {r.prompt_token_ids for r in fast.requests}
    bursts, _ = loads(workload(arrivals="burst"), "cuda", 260, seed=3)
    assert bursts.requests == slow.requests
    (on_cpu,) = loads(workload(), "cpu", 260, seed=3)
    assert (on_cpu.rate, len(on_cpu.requests)) == (1.0, 4)


def sizes(one: Any) -> list[tuple[int, int]]:
    return [(len(r.prompt_token_ids), r.sampling.max_tokens) for r in one.requests]


def test_uniform_lengths_reach_both_ends() -> None:
    drawn = draw_lengths("uniform", 3, 7, 4000, np.random.default_rng(0))
    counts = [drawn.count(n) for n in range(3, 8)]
    assert sum(counts) == 4000 and stats.chisquare(counts).pvalue > 0.05


def test_lognormal_lengths_are_normal_in_their_logarithm_between_the_ends() -> None:
    drawn = draw_lengths("lognormal", 100, 100_000, 4000, np.random.default_rng(0))
    assert len(drawn) == 4000 and min(drawn) >= 100 and max(drawn) <= 100_000
    middle, sigma = math.log(math.sqrt(100 * 100_000)), math.log(1000) / 4
    assert stats.kstest(np.log(drawn), stats.truncnorm(-2, 2, middle, sigma).cdf).pvalue > 0.05
    assert draw_lengths("lognormal", 9, 9, 3, np.random.default_rng(0)) == [9, 9, 9]


# Traces


def trace(folder: Path, *lines: Any) -> str:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_trace_gives_lengths_and_arrivals_at_the_rate(tmp_path: Path) -> None:
    names = trace(
        tmp_path,
        {"prompt_len": 7, "output_len": 3, "timestamp": 1000},
        {"input_length": 20, "output_length": 4, "timestamp": 1000, "hash_ids": [1]},
        "",
        {"input_length": 5, "output_length": 9, "timestamp": 4000},
        {"input_length": 6, "output_length": 2, "timestamp": 7000},
    )
    given = {"trace": names, "num_requests": 0, "cpu_num_requests": 3, "prompt_len": [], "output_len": []}
    slow, fast = loads(workload(arrivals="trace", **given), "cuda", 260, seed=0)
    assert sizes(slow) == sizes(fast) == [(7, 3), (20, 4), (5, 9), (6, 2)]
    assert slow.arrivals_s == [0, 0, 0.5, 1.0]  # two more in a second
    assert fast.arrivals_s == [0, 0, 0.125, 0.25]
    (on_cpu,) = loads(workload(arrivals="trace", **given), "cpu", 260, seed=0)
    assert (sizes(on_cpu), on_cpu.arrivals_s) == ([(7, 3), (20, 4), (5, 9)], [0, 0, 1.0])
    poisson, _ = loads(workload(**given), "cuda", 260, seed=0)
    assert sizes(poisson) == sizes(slow) and poisson.arrivals_s != slow.arrivals_s


GOOD = {"prompt_len": 1, "output_len": 1, "timestamp": 5}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "has no requests"),
        ([GOOD, "{"], "line 2: "),
        ([[1]], "line 1 is no JSON object"),
        ([{"prompt_len": 4}], "line 1: output_len or output_length must be a number of tokens from 1 on, not None"),
        ([GOOD | {"prompt_len": 0}], "prompt_len or input_length must be .*, not 0"),
        ([GOOD | {"output_len": True}], "not True"),
        ([GOOD | {"timestamp": "now"}], "timestamp must be a number, not 'now'"),
        ([GOOD, {"prompt_len": 1, "output_len": 1}], "needs a timestamp in each line"),
        ([GOOD, GOOD | {"timestamp": 4}], "in order"),
        ([GOOD, GOOD], "not all equal"),
        ([GOOD], "has 1 requests, and the workload asks for 2"),
    ],
)
def test_a_bad_trace_is_named(lines: list[Any], says: str, tmp_path: Path) -> None:
    conf = workload(arrivals="trace", trace=trace(tmp_path, *lines), num_requests=2)
    with pytest.raises(InputError, match=says):
        loads(conf, "cuda", 260, seed=0)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    assert unit_arrivals(workload(arrivals="trace", trace="x"), 2, [Traced(1, 1, 3), Traced(1, 1, 9)],
                         np.random.default_rng(0)).tolist() == [0, 1]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arrivals": "sometimes"}, "workload.arrivals must be one of poisson, burst, all, trace"),
        ({"lengths": "gamma"}, "workload.lengths must be one of uniform, lognormal"),
        ({"rates": []}, "workload.rates must be a list of requests per second above 0"),
        ({"cpu_rates": [1.0, 0.0]}, "workload.cpu_rates must be"),
        ({"burst_size": 0}, "workload.burst_size must be at least 1"),
        ({"num_requests": 0}, "workload.num_requests must be at least 1"),
        ({"output_len": []}, "workload.output_len must be a range"),
        ({"arrivals": "trace"}, "workload.trace must be a file"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        workload(**changes)
    with pytest.raises(InputError, match="workload.slo.ttft_ms must be above 0"):
        SloConf(ttft_ms=0)


# What came of it


def test_a_queue_of_known_length() -> None:
    """D/D/1: 10 ms of service, a request each 8 ms. Request k takes 10 + 2k ms."""
    rows = [row(k * 0.008, [(k + 1) * 0.010]) for k in range(204)]
    found = load_record(125.0, rows, SloConf(ttft_ms=101, tpot_ms=1))
    for name in ("ttft_ms", "e2el_ms"):  # linear between the samples of k = 0 ... 203
        assert [found[f"{name}_p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([213, 375.4, 395.7, 411.94])
    assert not any(key.startswith(("tpot", "itl")) for key in found)  # with one token there are none
    assert (found["duration_s"], found["achieved_rate"], found["offered_rate"]) == pytest.approx((2.04, 100, 125))
    assert (found["goodput_share"], found["goodput_rate"]) == pytest.approx((46 / 204, 46 / 2.04))  # k up to 45
    assert (found["unfinished_at_quarter"], found["unfinished_at_last"]) == (52 - 40, 204 - 162)
    assert found["still_growing"] is True
    keeps_up = load_record(80.0, [row(k * 0.0125, [k * 0.0125 + 0.010]) for k in range(204)], SloConf())
    assert (keeps_up["still_growing"], keeps_up["unfinished_at_last"]) == (False, 1)
    assert keeps_up["goodput_share"] == 1


def test_every_number_by_hand() -> None:
    rows = [
        row(0.0, [0.100, 0.110, 0.140]),  # TTFT 100, TPOT 20, gaps 10 and 30
        row(1.0, [1.300, 1.305]),  # TTFT 300, TPOT 5
        row(1.5, [1.550]),  # TTFT 50, no TPOT
        row(2.0, [2.010, 2.050]),  # TTFT 10, TPOT 40
    ]
    found = load_record(1.0, rows, SloConf(ttft_ms=100.001, tpot_ms=20.001))
    assert [found[f"ttft_ms_p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([75, 240, 270, 294])
    assert [found[f"tpot_ms_p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([20, 36, 38, 39.6])
    assert [found[f"itl_ms_p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([20, 37, 38.5, 39.7])  # 5, 10, 30, 40
    assert [found[f"e2el_ms_p{p}"] for p in (50, 99)] == pytest.approx([95, 300.05])  # 50, 50, 140, 305
    assert (found["requests"], found["prompt_tokens"], found["output_tokens"]) == (4, 40, 8)
    assert found["duration_s"] == pytest.approx(2.05)
    assert (found["offered_rate"], found["achieved_rate"]) == pytest.approx((3 / 2, 4 / 2.05))
    assert found["output_tok_s"] == pytest.approx(8 / 2.05)
    assert (found["goodput_share"], found["goodput_rate"]) == pytest.approx((0.5, 2 / 2.05))  # the first and the third
    assert [load_record(1.0, rows, slo)["goodput_share"] for slo in (SloConf(ttft_ms=60), SloConf(tpot_ms=10))] == [
        0.5,
        0.5,
    ]


def test_a_request_without_tokens_is_never_good_and_never_finished() -> None:
    rows = [row(0.0, [0.1]), row(0.2, [])]
    assert [meets(r, SloConf()) for r in rows] == [True, False]
    assert [unfinished(rows, at) for at in (0.0, 0.15, 0.2, 9.0)] == [1, 0, 1, 1]
    found = load_record(5.0, rows, SloConf())
    assert (found["achieved_rate"], found["goodput_share"]) == (pytest.approx(5.0), 0.5)


def test_all_at_once_has_no_offered_rate_and_no_growth() -> None:
    found = load_record(None, [row(1.0, [1.5]), row(1.0, [2.0])], SloConf())
    assert (found["offered_rate"], found["still_growing"]) == (None, None)
    assert (found["duration_s"], found["achieved_rate"]) == (1.0, 2.0)


@pytest.mark.parametrize(("load_share", "lowest", "highest"), [(0.7, 0.0, 0.05), (1.25, 0.9, 1.0)])
def test_growth_is_told_from_chance(load_share: float, lowest: float, highest: float) -> None:
    """256 Poisson arrivals at 16 servers with uniform service times, over and over."""
    rng = np.random.default_rng(0)
    told = [load_record(1.0, _multi_server_queue(rng, load_share), SloConf())["still_growing"] for _ in range(100)]
    assert lowest <= np.mean(told) <= highest


def _multi_server_queue(rng: np.random.Generator, load_share: float, servers: int = 16) -> list[dict[str, Any]]:
    free_s = [0.0] * servers
    rows = []
    for arrival_s in np.cumsum(rng.exponential(1 / load_share, size=256)):
        server = int(np.argmin(free_s))
        free_s[server] = max(arrival_s, free_s[server]) + servers * rng.uniform(0.2, 1.8)
        rows.append(row(float(arrival_s), [free_s[server]]))
    return rows


# Runs


def config(engine: str, *overrides: str) -> Config:
    small = ["workload.cpu_num_requests=6", "workload.prompt_len=[4,40]", "workload.output_len=[5,12]"]
    return compose([f"engine={engine}", "model=tiny", f"weights={TINY}", "device=cpu", "workload=serving", *small,
                    "workload.cpu_rates=[10,100]", "verify=false", *overrides])  # fmt: skip


def silent() -> Reporter:
    return Reporter(Console(file=io.StringIO()))


def test_engines_get_the_same_arrivals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = loads(config("hf").workload, "cpu", 260, seed=0)
    for engine in ("hf", "nano"):
        record = run(config(engine), tmp_path / engine, silent())
        requests = load(tmp_path / engine).requests
        assert [r["rate"] for r in record["serving"]] == [10.0, 100.0]
        assert "steps" not in record and load(tmp_path / engine).steps.empty and record["failures"] == []
        for one, told in zip(expected, record["serving"], strict=True):
            rows = (
                requests[requests["rate"] == one.rate].set_index("request_id").loc[[r.request_id for r in one.requests]]
            )
            assert list(zip(rows["prompt_tokens"], rows["output_tokens"], strict=True)) == sizes(one)
            since_first = rows["arrival_s"] - rows["arrival_s"].iloc[0]
            assert since_first.tolist() == pytest.approx(one.arrivals_s, abs=1e-6)
            assert 0 <= rows["arrival_s"].iloc[0] < 0.1
            assert told["ttft_ms_p50"] == pytest.approx(rows["ttft_ms"].median())
            assert told["itl_ms_p99"] == pytest.approx(np.percentile(np.concatenate(rows["itl_ms"].tolist()), 99))
            assert told["offered_rate"] == pytest.approx(5 / one.arrivals_s[-1])
            assert told["arm"] == "default"
        shown = capsys.readouterr().out
        assert all(word in shown for word in ("TTFT", "TPOT", "ITL", "end to end", "goodput", "p95"))
        for told in record["serving"]:
            assert f"{told['e2el_ms_p95']:.2f}" in shown


def test_progress_goes_to_the_last_request_and_names_each(tmp_path: Path) -> None:
    shown = io.StringIO()
    run(config("nano"), tmp_path, Reporter(Console(file=shown)))
    served = [line for line in shown.getvalue().splitlines() if line.startswith("serving")]
    for rate in (10, 100):
        told = [line.partition(f"serving {rate}/s ")[2] for line in served if f" {rate}/s " in line]
        assert [line.partition(": ")[0] for line in told] == [f"{done}/6" for done in range(1, 7)]
        assert {line.partition(": ")[2] for line in told} == {f"request {name}" for name in range(1, 7)}


def test_interrupted_it_keeps_what_it_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.hf import HF

    advance, seen = HF._advance, []

    def stopping(self: HF) -> Any:
        done = advance(self)
        seen.extend(done)
        if len(seen) == 4 + 6 + 3:  # the warm-up, the first rate, half of the second
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(HF, "_advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(config("hf", "limits.max_num_seqs=1"), tmp_path, silent())
    runs = load(tmp_path)
    assert runs.requests["rate"].value_counts().to_dict() == {10.0: 6, 100.0: 2}
    assert (runs.runs[0]["status"], [r["rate"] for r in runs.runs[0]["serving"]]) == ("interrupted", [10.0])


def test_limits_come_from_the_requests(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"Request \d+ of the workload needs \d+ positions.* limits.max_model_len is 20"
    ):
        run(config("hf", "limits.max_model_len=20"), tmp_path / "run", silent())
    with pytest.raises(InputError, match="no rounds"):
        items(Work.of(config("hf"), "cpu"))
    assert not (tmp_path / "run").exists()
