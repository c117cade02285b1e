"""The tuner without a GPU: what it offers, what it rejects, and that its table comes back as launches."""

import pytest
import torch

from kernels import choices, decode_linear, tune, use
from kernels.decode_linear import Launch, best_launch, default_launch, shape_key

OPS = tune.MODELS["qwen3-0.6b"].ops()


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
    """The default is among them; registers for W, shared memory for the stages; no sums shared under a norm."""
    found = tune.candidates(op, rows, quick=False)
    assert found[0] == default_launch(rows, op.out, op.k, op.gated, 2)
    assert len(set(found)) == len(found) > 3
    for launch in found:
        if launch.kernel == "vector":
            assert launch.block_n * op.k * 2 * (1 + op.gated) <= launch.num_warps * 32 * 128 * 4
        else:
            stage = (launch.block_n * (1 + op.gated) + launch.block_m) * launch.block_k * 2
            assert stage * launch.num_stages <= 227 * 1024
            assert launch.split_k == 1 or not (op.norm or op.gated)


def test_a_wrong_candidate_is_reported_and_not_timed(monkeypatch):
    """One candidate leaves an element unwritten, another is the slowest."""
    monkeypatch.setattr(tune, "time_graph_us", lambda calls: len(calls) * 5.0)
    op = tune.Op("o", 24, 32, residual=True)
    bad, good = Launch("vector", 1, 32, 1), Launch("vector", 2, 32, 1)
    monkeypatch.setattr(tune, "candidates", lambda *_: [bad, good])

    def product(x, weight, *, launch, dependent, residual, **options):
        out = decode_linear(x, weight, residual=residual, **options)
        if launch == bad:
            out[0, 0] = float("nan")
        return out

    monkeypatch.setattr(tune, "decode_linear", product)
    failures = []
    with use("reference"):
        found = tune.time_op(tune.Bench(op, 3, torch.device("cpu")), 2, False, failures)
    assert found.timed == [(5.0, good)]
    assert len(failures) == 1 and "block_n=1" in failures[0]


def test_choices_come_back(gpu):
    launch = Launch("tiled", 32, 128, 4, block_m=16, num_stages=5)
    entry = tune.Found("o", 16, "", 0, [], cublas_us=3.0, earlier_us=None).choice
    key, lost = shape_key(16, 1024, 2048, False), shape_key(64, 1024, 2048, False)
    choices.save(gpu, {"decode_linear": {key: entry(launch, 2.0), lost: entry(launch, 4.0)}}, {"gpu": "Some GPU"})
    assert best_launch(9, 1024, 2048, False, 2, gpu) == launch  # 9 to 16 rows share an entry
    assert best_launch(40, 1024, 2048, False, 2, gpu) is None  # cuBLAS won
    assert best_launch(17, 1024, 2048, False, 2, gpu) == default_launch(17, 1024, 2048, False, 2)
    assert best_launch(16, 1024, 2048, True, 2, gpu) == default_launch(16, 1024, 2048, True, 2)
    assert best_launch(16, 1024, 2048, False, 4, gpu) == default_launch(16, 1024, 2048, False, 4)
    with choices.none_chosen():
        assert best_launch(40, 1024, 2048, False, 2, gpu) == default_launch(40, 1024, 2048, False, 2)
    # A later run of one shape keeps the others.
    choices.save(gpu, {"decode_linear": {lost: entry(launch, 1.0)}}, {"gpu": "Some GPU"})
    assert best_launch(40, 1024, 2048, False, 2, gpu) == best_launch(9, 1024, 2048, False, 2, gpu) == launch
