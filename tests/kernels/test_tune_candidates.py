"""Candidates of the tuner: which it offers, and how they are checked, compiled and timed."""

from contextlib import suppress

import pytest
import torch

from kernels import _timing, _tune_compile, decode_linear, tune, use
from kernels import _tune_products as products
from kernels._timing import checked
from kernels._triton import triton
from kernels._tune_candidates import candidates, head_candidates
from kernels._tune_models import MODELS, Op
from kernels.decode_head import default_launch as default_head
from kernels.decode_linear_launch import Launch, default_launch
from kernels.prefill_linear import Launch as PrefillLaunch
from kernels.sample import TILE

OPS = MODELS["qwen3-0.6b"].ops()
CPU = torch.device("cpu")


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
