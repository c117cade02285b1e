"""The tuner without a GPU: what it offers, what it rejects, and that its table comes back as launches.

How it chooses in the chain: test_tune_chain.py.
"""

import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from engines.nano.graphs import BATCH_SIZES
from kernels import (
    _timing,
    _tune_attention,
    _tune_causal,
    _tune_chain,
    _tune_compile,
    _tune_prefill,
    choices,
    decode_linear,
    tune,
    use,
)
from kernels import _tune_products as products
from kernels._timing import checked
from kernels._triton import triton
from kernels._tune_attention import Timed
from kernels._tune_candidates import candidates, head_candidates
from kernels._tune_models import MODELS, Model, Op
from kernels.decode_attention_launch import Launch as AttentionLaunch
from kernels.decode_attention_launch import best_launch as best_attention
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import best_launch as best_head
from kernels.decode_head import default_launch as default_head
from kernels.decode_head import shape_key as head_key
from kernels.decode_linear_launch import Launch, best_launch, best_prefill_gate_up, default_launch, shape_key
from kernels.prefill_linear import Launch as PrefillLaunch
from kernels.prefill_linear import best_launch as best_prefill
from kernels.sample import TILE

OPS = MODELS["qwen3-0.6b"].ops()
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> torch.device:
    """A device that counts as a GPU of its own kind, with an empty folder of choices."""
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    monkeypatch.setattr(choices, "gpu_slug", lambda device: "some-gpu")
    choices._table.cache_clear()
    yield torch.device("cuda", 0)
    choices._table.cache_clear()


def test_ops_have_the_models_sizes():
    """Layer weights of Qwen3-0.6B: 31.5 MB of the four products."""
    assert [(op.name, op.weight_rows, op.k) for op in OPS] == [
        ("qkv", 4096, 1024), ("o", 1024, 2048), ("gate_up", 6144, 1024), ("down", 1024, 3072),
    ]  # fmt: skip


@pytest.mark.parametrize("rows", tune.ROWS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_candidates_can_run(op, rows):
    """The default is among them; registers for W, shared memory for the stages; whole parts of the sum over K."""
    found = candidates(op, rows, quick=False)
    assert found[0] == default_launch(rows, op.out, op.k, op.gated, 2)
    assert len(set(found)) == len(found) > 3
    assert any(isinstance(launch, PrefillLaunch) for launch in found) == (op.gated and rows >= 128)
    for launch in found:
        if isinstance(launch, PrefillLaunch):
            stage = (launch.block_n * 2 + launch.block_m) * launch.block_k * 2
            assert stage * launch.num_stages <= 227 * 1024 // max(1, launch.per_sm)
            assert launch.block_m * launch.block_n * 2 / (launch.num_warps * 32) <= 128
            assert launch.block_m >= 16 * launch.num_warps  # a warp group takes 64 rows
        elif launch.kernel == "vector":
            assert launch.block_n * op.k * 2 * (1 + op.gated) <= launch.num_warps * 32 * 128 * 4
        else:
            stage = (launch.block_n * (1 + op.gated) + launch.block_m) * launch.block_k * 2
            assert stage * launch.num_stages <= 227 * 1024
            assert launch.kernel == "matrix" or op.k % (launch.split_k * launch.block_k) == 0


@pytest.mark.parametrize("rows", tune.ROWS)
def test_candidates_of_the_head_can_run(rows):
    """Tiles from 8 rows on, and nothing else from 17 on; stages and a tile's end fit into shared memory."""
    found = head_candidates(rows, 1024, quick=False)
    tiles = [launch.tiles for launch in found if launch.tiles]
    assert len(set(found)) == len(found)
    assert any(launch in found for launch in head_candidates(rows, 1024, quick=True) if launch.tiles) == (rows >= 8)
    assert (10 <= len(tiles) <= 16) == (rows >= 8) and (len(found) == len(tiles)) == (rows > 16)
    assert rows > 16 or found[0] == default_head(1024, 2)
    for launch in tiles:
        assert launch.block_n in (TILE, 2 * TILE) and launch.block_m <= max(16, triton.next_power_of_2(rows))
        shared = (launch.block_n + launch.block_m) * launch.block_k * 2 * launch.num_stages + launch.block_m * TILE * 2
        assert shared <= 210 * 1024 // launch.per_sm
        assert launch.block_m * launch.block_n / (launch.num_warps * 32) <= 128  # sums in each thread's registers


def test_choices_of_the_head_come_back(gpu):
    """In one kernel, as a product, behind a norm, or by cuBLAS."""
    entry = products.Found("head", 0, "", 0, [(70.0, None)], cublas_us=90.0).choice
    product = HeadLaunch(product=Launch("matrix", 16, 128, 4, block_m=16))
    tiles = HeadLaunch(tiles=PrefillLaunch(64, 128, 64, 4, 7, per_sm=2))
    launches = {1: HeadLaunch(128, 8, 3), 16: product, 64: tiles, 128: None}
    table = {head_key(rows, 99, 16): entry(launch) for rows, launch in launches.items()}
    choices.save(gpu, {"decode_head": table}, {"gpu": "Some GPU"})
    assert {rows: best_head(rows, 99, 16, 2, gpu) for rows in launches} == launches
    assert best_head(33, 99, 16, 2, gpu) == tiles and best_head(32, 99, 16, 2, gpu) == default_head(16, 2)


def test_a_wrong_candidate_is_reported_and_not_timed(monkeypatch):
    """One candidate leaves an element unwritten, another is the slowest."""
    monkeypatch.setattr(products, "time_graph_us", lambda calls: len(calls) * 5.0)
    op = Op("o", 24, 32, residual=True)
    bad, good = Launch("vector", 1, 32, 1), Launch("vector", 2, 32, 1)
    monkeypatch.setattr(products, "candidates", lambda *_: [bad, good])

    def product(x, weight, *, launch, dependent, residual, **options):
        out = decode_linear(x, weight, residual=residual, **options)
        if launch == bad:
            out[0, 0] = float("nan")
        return out

    monkeypatch.setattr(products, "decode_linear", product)
    failures = []
    with use("reference"):
        found = products.time_op(products.Bench(op, 3, CPU), 2, False, failures)
    assert found.timed == [(5.0, good)]
    assert len(failures) == 1 and "block_n=1" in failures[0]


class Tried:
    """Its launches are what comes of them: an error, or an exception."""

    def error(self, launch):
        if isinstance(launch, Exception):
            raise launch
        return launch


def test_what_is_left_out_is_named_unless_it_is_too_large(monkeypatch, capsys):
    class TooLarge(RuntimeError):
        """As triton's, which needs a GPU to come up."""

    monkeypatch.setattr(_timing, "TOO_LARGE", (TooLarge,))
    failures: list[str] = []
    launches = [0.001, float("nan"), 0.5, TooLarge("shared memory"), RuntimeError("launch failed")]
    kept = [checked(Tried(), launch, "o rows 2", 0.01, failures) for launch in launches]
    assert kept == [True, False, False, False, False]
    assert failures == ["o rows 2 nan: relative error nan", "o rows 2 0.5: relative error 0.5"]
    wrong = [f"WRONG {failure}" for failure in failures]
    assert capsys.readouterr().out.splitlines() == [*wrong, "o rows 2 left out, RuntimeError: launch failed"]
    with pytest.raises(KeyError):  # a mistake of ours
        checked(Tried(), KeyError("x"), "o rows 2", 0.01)


def test_what_is_too_large_is_compiled_for_nobody(monkeypatch):
    """The others are compiled, and it is left out when it is timed."""
    large, small = Launch("vector", 2, 32, 1), Launch("vector", 1, 32, 1)
    done = []

    def product(*arguments, launch, **options):
        if launch == large:
            raise triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")
        done.append(launch)

    monkeypatch.setattr(products, "decode_linear", product)
    op = Op("o", 24, 32, residual=True)
    _tune_compile.run(CPU, [_tune_compile.Job(op, 2, launch) for launch in (large, small)])
    assert done == [small]


def test_choices_come_back(gpu):
    launch = Launch("tiled", 32, 128, 4, block_m=16, num_stages=5)
    entry = products.Found("o", 16, "", 0, [(2.0, launch)], cublas_us=3.0).choice
    key, lost = shape_key(16, 1024, 2048, False), shape_key(64, 1024, 2048, False)
    choices.save(gpu, {"decode_linear": {key: entry(launch), lost: entry(None)}}, {"gpu": "Some GPU"})
    assert best_launch(9, 1024, 2048, False, 2, gpu) == launch  # 9 to 16 rows share an entry
    assert best_launch(40, 1024, 2048, False, 2, gpu) is None  # cuBLAS won
    assert best_launch(17, 1024, 2048, False, 2, gpu) == default_launch(17, 1024, 2048, False, 2)
    assert best_launch(16, 1024, 2048, True, 2, gpu) == default_launch(16, 1024, 2048, True, 2)
    assert best_launch(16, 1024, 2048, False, 4, gpu) == default_launch(16, 1024, 2048, False, 4)
    with choices.none_chosen():
        assert best_launch(40, 1024, 2048, False, 2, gpu) == default_launch(40, 1024, 2048, False, 2)
    apart = replace(launch, halves=False)
    choices.save(gpu, {"decode_linear": {shape_key(128, 1024, 2048, False): entry(apart)}}, {"gpu": "Some GPU"})
    assert best_launch(128, 1024, 2048, False, 2, gpu) == apart and not apart.halves
    before = choices.fingerprint(gpu)
    # A later run of one shape keeps the others.
    choices.save(gpu, {"decode_linear": {lost: entry(launch)}}, {"gpu": "Some GPU"})
    assert before and choices.fingerprint(gpu) not in ("", before)
    assert choices.fingerprint(CPU) == ""
    assert best_launch(40, 1024, 2048, False, 2, gpu) == best_launch(9, 1024, 2048, False, 2, gpu) == launch


def test_rows_between_powers_of_two_may_have_a_measurement_of_their_own(gpu):
    """And have the next power's where there is none, each kernel for itself."""
    between, power = (Launch("tiled", 32, 128, 4, block_m=16, num_stages=stages) for stages in (3, 5))
    measured = {96: between, 128: power}
    entries = {f"1024x2048 rows {rows}": {"launch": choices.fields_of(launch)} for rows, launch in measured.items()}
    choices.save(gpu, {"decode_linear": entries}, {"gpu": "Some GPU"})
    found = {rows: best_launch(rows, 1024, 2048, False, 2, gpu) for rows in (65, 96, 97, 128)}
    assert found == {65: between, 96: between, 97: power, 128: power}
    attention = AttentionLaunch(32, 1, 256, 1, True, 3)
    entries = {"16/8x128 rows 128": {"launch": choices.fields_of(attention)}}
    choices.save(gpu, {"decode_attention": entries}, {"gpu": "Some GPU"})
    assert best_attention(80, 16, 8, 128, 4096, 2, gpu) == attention
    counts = {rows: choices.rows_measured(rows) for rows in (1, 3, 32, 33, 48, 49, 64, 65, 100, 129, 192, 193, 257)}
    assert counts == {
        1: (1,), 3: (4,), 32: (32,), 33: (48, 64), 48: (48, 64), 49: (64,), 64: (64,), 65: (96, 128), 100: (128,),
        129: (192, 256), 192: (192, 256), 193: (256,), 257: (512,),
    }  # fmt: skip


def test_the_slowest_capture_counts(monkeypatch):
    """Of as many graphs as are asked for, all of which are there when the first is timed."""
    alive, paces = [], iter((3.0, 5.0, 4.0))
    monkeypatch.setattr(_timing, "_captured", lambda calls: alive.append(calls) or len(alive))
    monkeypatch.setattr(_timing, "_replay_us", lambda graph: next(paces) + 10 * len(alive))
    assert _timing.time_graph_us([], captures=3) == 35.0


STUB = "import os, sys\ndef zeros(count, device): open(os.environ['SEEN'], 'w').write(device){}\n"
"""Of torch, for the process that stands by."""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts it in place, with something behind its only function; returns where started processes will stand."""

    def put(behind):
        (tmp_path / "torch.py").write_text(STUB.format(behind))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
        monkeypatch.setattr(_timing.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
        return started

    started, popen = [], _timing.subprocess.Popen
    return put


@pytest.mark.parametrize("fails", [False, True])
def test_another_process_stands_by_until_the_end(fails, stub, tmp_path):
    """On the device that was asked for; it is gone afterwards, also where the block fails."""
    started = stub("")
    with suppress(KeyError), _timing.beside_another(torch.device("cuda", 1)):
        assert (tmp_path / "seen").read_text() == "cuda:1" and started[0].poll() is None
        if fails:
            raise KeyError
    assert started[0].returncode is not None


@pytest.mark.parametrize("when", ["at once", "meanwhile"])
def test_who_does_not_stand_by_is_missed(when, stub):
    started = stub("; sys.exit()" if when == "at once" else "")
    with pytest.raises(RuntimeError, match="has ended"), _timing.beside_another(torch.device("cuda")):
        started[0].kill()
        started[0].wait()


def test_prefills_kernel_may_be_decodes_choice(gpu):
    """The entry says so and how; what it says of others is none of decode_linear's launches."""
    launch = PrefillLaunch(64, 64, 64, 4, 3, per_sm=0)
    found = products.Found("gate_up", 256, shape_key(256, 3072, 1024, True), 0, [(7.0, launch)], cublas_us=9.0)
    choices.save(gpu, {"decode_linear": {found.key: found.choice(launch)}}, {"gpu": "Some GPU"})
    shape = 3072, 1024, True, 2, gpu
    assert best_prefill_gate_up(129, *shape) == launch and best_launch(129, *shape) is None
    assert best_prefill_gate_up(128, *shape) is None and best_launch(128, *shape) == default_launch(128, *shape[:-1])
    assert choices.chosen("decode_linear", found.key, gpu)["us"] == 7.0
    choices.save(gpu, {"decode_linear": {found.key: found.choice(None)}}, {"gpu": "Some GPU"})
    assert best_prefill_gate_up(129, *shape) is None and best_launch(129, *shape) is None


@pytest.mark.parametrize(("kernel", "key", "best"), [
    ("decode_attention", "16/8x128 rows 1", lambda gpu: best_attention(1, 16, 8, 128, 4096, 2, gpu)),
    ("decode_linear", "8x16 rows 1", lambda gpu: best_launch(1, 8, 16, False, 2, gpu)),
    ("decode_head", "99x16 rows 1", lambda gpu: best_head(1, 99, 16, 2, gpu)),
    ("prefill_gate_up", "8x16 rows 1", lambda gpu: best_prefill("prefill_gate_up", 8, 16, 1, torch.bfloat16, gpu)),
], ids=["attention", "linear", "head", "prefill"])  # fmt: skip
def test_choices_of_another_version_are_refused_with_the_way_out(gpu, kernel, key, best):
    choices.save(gpu, {kernel: {key: {"launch": {"gone": 1}}}}, {"gpu": "Some GPU"})
    with pytest.raises(ValueError, match=r"some-gpu\.json .* measure again"):
        best(gpu)


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
