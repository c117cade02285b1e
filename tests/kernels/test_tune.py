"""The tuner without a GPU: what it offers, what it rejects, and that its table comes back as launches."""

import pytest
import torch

from kernels import choices, decode_linear, tune, use
from kernels.decode_attention import best_launch as best_attention
from kernels.decode_head import best_launch as best_head
from kernels.decode_linear import Launch, best_launch, default_launch, shape_key
from kernels.prefill_linear import best_launch as best_prefill

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
    """The default is among them; registers for W, shared memory for the stages; whole parts of the sum over K."""
    found = tune.candidates(op, rows, quick=False)
    assert found[0] == default_launch(rows, op.out, op.k, op.gated, 2)
    assert len(set(found)) == len(found) > 3
    for launch in found:
        if launch.kernel == "vector":
            assert launch.block_n * op.k * 2 * (1 + op.gated) <= launch.num_warps * 32 * 128 * 4
        else:
            stage = (launch.block_n * (1 + op.gated) + launch.block_m) * launch.block_k * 2
            assert stage * launch.num_stages <= 227 * 1024
            assert launch.kernel == "matrix" or op.k % (launch.split_k * launch.block_k) == 0


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
    entry = tune.Found("o", 16, "", 0, [(2.0, launch)], cublas_us=3.0).choice
    key, lost = shape_key(16, 1024, 2048, False), shape_key(64, 1024, 2048, False)
    choices.save(gpu, {"decode_linear": {key: entry(launch), lost: entry(None)}}, {"gpu": "Some GPU"})
    assert best_launch(9, 1024, 2048, False, 2, gpu) == launch  # 9 to 16 rows share an entry
    assert best_launch(40, 1024, 2048, False, 2, gpu) is None  # cuBLAS won
    assert best_launch(17, 1024, 2048, False, 2, gpu) == default_launch(17, 1024, 2048, False, 2)
    assert best_launch(16, 1024, 2048, True, 2, gpu) == default_launch(16, 1024, 2048, True, 2)
    assert best_launch(16, 1024, 2048, False, 4, gpu) == default_launch(16, 1024, 2048, False, 4)
    with choices.none_chosen():
        assert best_launch(40, 1024, 2048, False, 2, gpu) == default_launch(40, 1024, 2048, False, 2)
    before = choices.fingerprint(gpu)
    # A later run of one shape keeps the others.
    choices.save(gpu, {"decode_linear": {lost: entry(launch)}}, {"gpu": "Some GPU"})
    assert before and choices.fingerprint(gpu) not in ("", before)
    assert choices.fingerprint(torch.device("cpu")) == ""
    assert best_launch(40, 1024, 2048, False, 2, gpu) == best_launch(9, 1024, 2048, False, 2, gpu) == launch


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


def test_pairs_are_chosen_together():
    """Both tiled, with the norm in halves; else each as it is alone, where a tiled one pays for its norm, or cuBLAS."""
    tiled, matrix = Launch("tiled", 32, 128, 4, block_m=16), Launch("matrix", 8, 128, 4)
    found = lambda name, *timed, norm_us=0.0: tune.Found(name, 32, "", 0, list(timed), 6.0, norm_us)  # noqa: E731
    launches = tune.best_pairs(
        {
            "o": found("o", (3.0, matrix), (3.5, tiled)),
            "gate_up": found("gate_up", (4.0, tiled), (5.0, matrix), norm_us=2.0),
            "down": found("down", (3.0, matrix), (5.0, tiled)),
            "qkv": found("qkv", (4.0, tiled), (5.0, matrix), norm_us=2.0),
        }
    )
    assert launches == {"o": tiled, "gate_up": tiled, "down": matrix, "qkv": matrix}
    assert tune.best_pairs({"qkv": found("qkv", (4.5, tiled), norm_us=2.0)}) == {"qkv": None}


@pytest.mark.parametrize("halves", [False, True])
def test_chain_is_the_layers_products(halves, monkeypatch):
    """The residual stream after two layers, against float32 layer by layer; on halves of norms, and without."""
    monkeypatch.setattr(tune, "HALF_COLUMNS", 16)
    launch = Launch("tiled", 32, 32, 4, block_m=16) if halves else None
    benches = {op.name: tune.Bench(op, 2, torch.device("cpu")) for op in tune.Model(2, 32, 64, 2, 1, 16, 8).ops()}
    chain = tune.Chain(benches, None, 4)
    stream = chain.hidden.float()
    with use("reference"):
        for call in chain.calls(dict.fromkeys(benches, launch)):
            call()
    for i in range(2):
        weights = {name: bench.weights[i].float() for name, bench in benches.items()}
        stream = stream + chain.attended.float() @ weights["o"].T
        normed = torch.nn.functional.rms_norm(stream, (32,), benches["gate_up"].gamma.float(), tune.EPS)
        gate, up = (normed @ weights["gate_up"].T).chunk(2, dim=1)
        stream = stream + (torch.nn.functional.silu(gate) * up) @ weights["down"].T
    assert tune.relative_error(chain.hidden, stream) < 2e-2
