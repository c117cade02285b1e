"""The whole tuner without a GPU: from the command line to its table, and what it chooses where parts work together."""

import random
from dataclasses import replace

import pytest
import torch

from engines.nano.graphs import BATCH_SIZES
from kernels import _tune_attention, _tune_causal, _tune_chain, _tune_compile, _tune_prefill, choices, tune, use
from kernels import _tune_products as products
from kernels._tune_attention import Timed
from kernels._tune_models import Model
from kernels.decode_attention_launch import Launch as AttentionLaunch
from kernels.decode_attention_launch import best_launch as best_attention
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import best_launch as best_head
from kernels.decode_head import shape_key as head_key
from kernels.decode_linear_launch import Launch, best_launch, best_prefill_gate_up, shape_key
from kernels.prefill_linear import Launch as PrefillLaunch

CPU = torch.device("cpu")
TINY = Model(layers=2, hidden=64, inter=128, heads=4, kv_heads=2, head_dim=16, vocab=256)
OFFERED = [
    Launch("tiled", 32, 32, 4, block_m=16, num_stages=2),
    Launch("tiled", 16, 64, 4, block_m=16, split_k=1),
    Launch("matrix", 8, 128, 4, block_m=8),
]
HEADS = [
    HeadLaunch(64, 4, 3),
    HeadLaunch(product=Launch("matrix", 16, 128, 4, block_m=16, registers=255)),
    HeadLaunch(tiles=PrefillLaunch(16, 128, 64, 4, 2)),
]


@pytest.fixture
def made_up(monkeypatch, gpu):
    """A tuner that runs here, on the references: few candidates, and times made up after the first call has run."""
    times = random.Random(7)

    def time_graph_us(calls, captures=1):
        calls[0]()
        return len(calls) * times.uniform(2.0, 3.0)

    for module in (products, _tune_attention, _tune_causal, _tune_chain, _tune_prefill):
        monkeypatch.setattr(module, "time_graph_us", time_graph_us)
    for module in (products, _tune_compile):
        monkeypatch.setattr(
            module, "candidates", lambda op, rows, quick: OFFERED + [PrefillLaunch(64, 64, 64, 4, 3)] * op.gated
        )
    attention = [AttentionLaunch(16, splits, 16, 4, False) for splits in (1, 2)]
    monkeypatch.setattr(_tune_attention, "candidates", lambda *shape: attention)
    monkeypatch.setattr(_tune_compile, "attention_candidates", lambda *shape: attention)
    monkeypatch.setattr(products, "head_candidates", lambda *shape: HEADS)
    monkeypatch.setattr(_tune_compile, "head_candidates", lambda *shape: HEADS)
    monkeypatch.setattr(tune, "compile_all", lambda jobs: _tune_compile.run(CPU, jobs) or len(jobs))
    monkeypatch.setattr(_tune_prefill, "compile_all", lambda model, benches: 0)
    monkeypatch.setattr(_tune_prefill, "ROWS", (40,))
    monkeypatch.setattr(_tune_causal, "shapes", lambda: [(40, 20)])
    monkeypatch.setattr(_tune_attention, "CACHE_BYTES", 0)
    monkeypatch.setattr(_tune_attention, "LAYERS", 1)
    monkeypatch.setattr(tune, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ops", ["all", "qkv,o,gate_up,down", "o,attention"])
def test_the_whole_tuner(made_up, gpu, monkeypatch, capsys, ops):
    """From the command line to the table, and what of it comes back."""
    named = [] if ops == "all" else ["--ops", ops]
    monkeypatch.setattr("sys.argv", ["tune", "--model", "tiny", "--rows", "16,40", *named])
    with use("reference"):
        tune.main()
    printed = capsys.readouterr().out
    table = choices._table(gpu)
    chained = ops != "o,attention"
    names = set(["qkv", "o", "gate_up", "down", "head", "attention", "prefill"] if ops == "all" else ops.split(","))
    assert set(table["decode_linear"]) == {
        shape_key(rows, op.out, op.k, op.gated) for op in TINY.ops() if op.name in names for rows in (16, 40)
    }
    kinds = ["", " short"] if "attention" in names else []
    assert set(table["decode_attention"]) == {f"4/2x16 rows {rows}{kind}" for rows in (16, 48) for kind in kinds}
    assert all(entry["launch"]["block_n"] == 16 for entry in table["decode_attention"].values())
    assert len(table.get("prefill_gate_up", {})) == len(table.get("causal_attention", {})) == ("prefill" in names)
    heads = {rows: best_head(rows, TINY.vocab, TINY.hidden, 2, gpu) for rows in (16, 40) if "head" in names}
    assert set(table["decode_head"]) == {head_key(rows, TINY.vocab, TINY.hidden) for rows in heads}
    assert set(heads.values()) <= {*HEADS, None}
    for rows in (16, 40):
        assert (f"{rows:5} chain: " in printed) == chained
        for op in (op for op in TINY.ops() if op.name in names):
            shape = rows, op.out, op.k, op.gated, 2, gpu
            entry = table["decode_linear"][shape_key(*shape[:4])]
            launch = best_launch(*shape) or best_prefill_gate_up(*shape)
            assert (launch is None) == (entry.get("path") == "cublas") and entry["us"] > 0 < entry["cublas_us"]
            assert launch is None or isinstance(launch, PrefillLaunch) or replace(launch, halves=True) in OFFERED
    assert "WRONG" not in printed and "left out" not in printed and "cannot run" not in printed


def test_a_choice_is_tried_at_the_least_and_the_most_rows_that_it_serves():
    """Of the sizes that decode graphs are captured for, and by what else has been measured."""
    assert list(tune.SIZES) == list(BATCH_SIZES)
    for count in tune.ROWS:
        sizes = [rows for rows in BATCH_SIZES if choices.rows_measured(rows)[0] == count]
        assert tune.served(count, tune.ROWS) == tuple(dict.fromkeys((count, sizes[0])))
    powers = [count for count in tune.ROWS if count & (count - 1) == 0]
    assert [tune.served(count, powers) for count in (32, 64, 128, 256)] == [(32,), (64, 48), (128, 80), (256, 144)]
    assert tune.served(40, [48]) == (40,)


def test_attention_of_long_contexts_is_what_the_step_is_fastest_with_there(made_up, gpu, monkeypatch):
    """By itself the first is the better one; in the chain at long contexts the other."""
    ops = "--ops qkv,o,gate_up,down,attention"
    slow, fast = attention = [AttentionLaunch(16, splits, 16, 4, False) for splits in (1, 2)]
    longest = []

    def time_us(chain, launches):
        longest.append(int(chain.contexts.lengths.max()))
        return 1.0 + (launches["attention"] == (slow if longest[-1] > 256 else fast))

    monkeypatch.setattr(tune.Chain, "time_us", time_us)
    timed = lambda *arguments, **options: [Timed(launch, 1.0, 1.0, 1.0, 0.0) for launch in attention]  # noqa: E731
    monkeypatch.setattr(_tune_attention, "measure", timed)
    monkeypatch.setattr("sys.argv", ["tune", "--model", "tiny", "--rows", "16", *ops.split()])
    with use("reference"):
        tune.main()
    assert best_attention(16, 4, 2, 16, 4096, 2, gpu) == fast
    assert best_attention(16, 4, 2, 16, 256, 2, gpu) == slow
    assert max(longest) == 2048


def test_what_was_chosen_before_stays_where_no_single_step_leads_to_it(made_up, gpu, monkeypatch):
    """All four products together are fast, any other step is equally slow."""
    names = {op.name: shape_key(16, op.out, op.k, op.gated) for op in TINY.ops()}
    before = {name: replace(OFFERED[1], halves=name != "o") for name in names}
    entries = {names[name]: {"launch": choices.fields_of(launch)} for name, launch in before.items()}
    choices.save(gpu, {"decode_linear": entries}, {"gpu": "Some GPU"})
    fast = lambda chain, launches: 2.0 - all(launches[name] == launch for name, launch in before.items())  # noqa: E731
    monkeypatch.setattr(tune.Chain, "time_us", fast)
    monkeypatch.setattr(tune, "best_linear", lambda *shape: best_launch(*shape[:-1], gpu))  # the tuner runs on the CPU
    monkeypatch.setattr("sys.argv", ["tune", "--model", "tiny", "--rows", "16", "--ops", "qkv,o,gate_up,down"])
    with use("reference"):
        tune.main()
    chosen = {op.name: best_launch(16, op.out, op.k, op.gated, 2, gpu) for op in TINY.ops()}
    assert chosen == before


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 2 and "there is none here" in capsys.readouterr().err


def test_what_is_chosen_is_kept_when_the_next_rows_fail(made_up, gpu, monkeypatch):
    settled = tune.Tuner._settled

    def fails(tuner, count, start):
        if count == 40:
            raise torch.OutOfMemoryError("made up")
        return settled(tuner, count, start)

    monkeypatch.setattr(tune.Tuner, "_settled", fails)
    monkeypatch.setattr("sys.argv", ["tune", "--model", "tiny", "--rows", "16,40", "--ops", "qkv,o,gate_up,down"])
    with use("reference"), pytest.raises(torch.OutOfMemoryError):
        tune.main()
    names = {shape_key(16, op.out, op.k, op.gated) for op in TINY.ops()}
    assert set(choices._table(gpu)["decode_linear"]) == names


def test_a_dry_run_writes_nothing(made_up, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["tune", "--model", "tiny", "--rows", "16", "--ops", "o", "--dry-run"])
    with use("reference"):
        tune.main()
    assert list(tmp_path.iterdir()) == []
