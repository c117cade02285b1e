"""The tuner of prefill's products without a GPU: what it offers, what it rejects, and that its table comes back."""

import pytest
import torch

from kernels import _tune_prefill, choices, prefill_gate_up, prefill_qkv_rope, use
from kernels._tune_models import Model
from kernels._tune_prefill import GATE_UP, QKV, GateUp, QkvRope
from kernels.prefill_linear import Launch, best_launch, shape_key
from kernels.prefill_qkv_rope import fits

TINY = Model(layers=3, hidden=32, inter=16, heads=4, kv_heads=2, head_dim=16, vocab=64)
CPU = torch.device("cpu")


@pytest.fixture
def timer(monkeypatch):
    """Every call takes as long as the entry says that its turn comes."""
    durations: list[float] = []
    monkeypatch.setattr(_tune_prefill, "time_graph_us", lambda calls: len(calls) * durations.pop(0))
    return durations


@pytest.mark.parametrize(("found", "parts"), [(GATE_UP, 2), (QKV, 1)], ids=["gate_up", "qkv"])
def test_candidates_can_run(found, parts):
    """Shared memory for the stages, and where programs share a multiprocessor, for all of them; registers for sums."""
    assert len(set(found)) == len(found) <= 14
    for launch in found:
        stage = (launch.block_n * parts + launch.block_m) * launch.block_k * 2
        assert stage * launch.num_stages <= 227 * 1024 // max(1, launch.per_sm)
        assert launch.block_m * launch.block_n * parts / (launch.num_warps * 32) <= 128
        assert launch.block_m >= 16 * launch.num_warps  # a warp group takes 64 rows, and their whole width
    assert parts == 2 or all(fits(launch, 16, 8, 128) for launch in found)


@pytest.mark.parametrize("kind", [GateUp, QkvRope])
def test_a_wrong_candidate_is_named_and_not_timed(kind, timer, monkeypatch, capsys):
    bad, good, better = Launch(64, 16, 32, 4, 2), Launch(32, 16, 32, 4, 2), Launch(16, 16, 32, 4, 2)
    bench = kind(TINY, TINY.layers, CPU)
    bench.candidates = (bad, good, better)
    function = {GateUp: prefill_gate_up, QkvRope: prefill_qkv_rope}[kind]

    def spoiled(*arguments, launch=None, **options):
        launch = launch or arguments[-1]
        arguments = arguments[:2]
        out = function(*arguments, **options)
        if launch == bad:
            (out if kind is GateUp else options["v_cache"]).view(-1)[0] = float("nan")
        return out

    monkeypatch.setattr(_tune_prefill, function.__name__, spoiled)
    timer += [9.0, 7.0, 6.0, 5.0]
    failures: list[str] = []
    with use("reference"):
        entry = _tune_prefill.measure(bench, 256, float("inf"), failures)
    assert entry["launch"]["block_m"] == 16 and entry["us"] == 5.0 and entry["cublas_us"] == 9.0
    (wrong,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(failures) == 1 and failures[0] in wrong
    assert f"{bench.name} rows 256 Launch(block_m=64" in wrong and wrong.endswith("relative error nan")


def test_cublas_may_win_and_time_may_run_out(timer, capsys):
    bench = GateUp(TINY, TINY.layers, CPU)
    bench.candidates = (Launch(16, 16, 32, 4, 2),)
    timer += [9.0, 7.0, 9.5]
    with use("reference"):
        assert _tune_prefill.measure(bench, 40, float("inf"), []) == {"path": "cublas", "cublas_us": 9.0}
        timer += [9.0, 7.0]
        assert _tune_prefill.measure(bench, 40, 0.0, []) == {}
    assert "no time for 1 candidates" in capsys.readouterr().out


def test_choices_come_back(monkeypatch, tmp_path):
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    monkeypatch.setattr(choices, "gpu_slug", lambda device: "some-gpu")
    choices._table.cache_clear()
    gpu, launch = torch.device("cuda", 0), GATE_UP[7]
    monkeypatch.setattr(choices.time, "strftime", lambda form: "a day")
    choices.save(gpu, {"decode_linear": {"a": {"path": "cublas"}}}, {})
    monkeypatch.setattr(choices.time, "strftime", lambda form: "the day after")
    entry = {"launch": _tune_prefill.asdict(launch), "us": 1.0}
    choices.save(gpu, {"prefill_gate_up": {shape_key(6144, 1024, 4095): entry}}, {})
    assert best_launch("prefill_gate_up", 6144, 1024, 2049, torch.bfloat16, gpu) == launch
    assert best_launch("prefill_gate_up", 6144, 1024, 2048, torch.bfloat16, gpu) is None
    assert choices.chosen("decode_linear", "a", gpu) == {"path": "cublas", "date": "a day"}
    assert choices.chosen("prefill_gate_up", shape_key(6144, 1024, 4095), gpu)["date"] == "the day after"
    choices._table.cache_clear()
