"""prefill_gate_up and prefill_qkv_rope against float64: odd shapes, all launches, loads by descriptor and pointer."""

import sys

import pytest
import torch
from torch import Tensor

from kernels import FUSIONS, prefill_gate_up, prefill_qkv_rope
from kernels.choices import chosen, none_chosen
from kernels.prefill_linear import Launch, best_launch, can_describe

EPS = 1e-6
MAX_POS = 50
LINEAR = sys.modules["kernels.prefill_linear"]
GATE_UP, QKV_ROPE = sys.modules["kernels.prefill_gate_up"], sys.modules["kernels.prefill_qkv_rope"]


@pytest.fixture(autouse=True)
def defaults():
    """What was measured for the GPU that runs the tests must not stand in for the defaults."""
    with none_chosen():
        yield


@pytest.fixture(params=[True, False], ids=["described", "pointers"])
def described(request, monkeypatch):
    """Whether loads by descriptor are allowed; where a row is no multiple of 16 bytes they are not possible."""
    if not request.param:
        for module in (GATE_UP, QKV_ROPE):
            monkeypatch.setattr(module, "can_describe", lambda *tensors: False)
    return request.param


def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


# (rows, hidden, inter): a part of a tile, several tiles, sizes that no block divides, rows of no multiple of 16 bytes
GATE_UPS = [(1, 32, 16), (37, 72, 40), (150, 64, 72), (9, 33, 21)]
SMALL = Launch(32, 16, 32, 4, 2, group_m=2)
LAUNCHES = [
    SMALL, Launch(16, 32, 16, 4, 3, group_m=1, per_sm=0), Launch(64, 16, 64, 4, 2, group_m=8, per_sm=2, pieces=2),
]  # fmt: skip


@pytest.mark.parametrize("shape", GATE_UPS, ids=str)
def test_gate_up(shape, dtype, described, randn, assert_close):
    rows, hidden, inter = shape
    x, weight = randn(rows, hidden, dtype=dtype), randn(2 * inter, hidden, dtype=dtype, scale=2 * hidden**-0.5)
    kept = x.clone(), weight.clone()
    y = prefill_gate_up(x, weight, SMALL)
    assert y.shape == (rows, inter) and y.dtype == dtype and y.is_contiguous()
    assert_close(y, gated(x, weight))
    assert torch.equal(x, kept[0]) and torch.equal(weight, kept[1])
    assert_close(FUSIONS["prefill_gate_up"].reference(x, weight), gated(x, weight))


@pytest.mark.parametrize("launch", [*LAUNCHES, None], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_every_launch_of_gate_up(launch, kind, described, randn, assert_close):
    x, weight = randn(90, 48, dtype=kind), randn(112, 48, dtype=kind, scale=0.3)
    assert_close(prefill_gate_up(x, weight, launch), gated(x, weight))


def angles(head_dim: int, device: torch.device) -> Tensor:
    frequency = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(MAX_POS, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float().to(device)


def turned(heads: Tensor, gamma: Tensor | None, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Norm, then the rotation as multiplication of complex numbers (a + ib) e^{i angle}."""
    if gamma is not None:
        heads = heads / torch.sqrt((heads**2).mean(-1, keepdim=True) + EPS) * gamma.double()
    half = heads.shape[-1] // 2
    table = cos_sin[positions].double()[:, None]
    value = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(table[..., :half], table[..., half:])
    return torch.cat((value.real, value.imag), dim=-1)


class Case:
    """Random arguments, and what float64 makes of them."""

    def __init__(self, randn, device, rows, hidden, heads, kv_heads, dim, dtype, norm=True, bias=False) -> None:
        out = (heads + 2 * kv_heads) * dim
        self.sizes = (heads, kv_heads, dim, EPS)
        self.x, self.weight = randn(rows, hidden, dtype=dtype), randn(out, hidden, dtype=dtype, scale=2 * hidden**-0.5)
        self.bias = randn(out, dtype=dtype) if bias else None
        self.gammas = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if norm else (None, None)
        self.cos_sin = angles(dim, device)
        self.positions = torch.randint(0, MAX_POS, (rows,), device=device)
        blocks = rows // 16 + 3
        self.slots = torch.randperm(blocks * 16)[:rows].to(device=device, dtype=torch.int32)
        self.slots[1::3] = -1
        self.noise = randn(2, blocks, 16, kv_heads, dim, dtype=dtype)
        wide = self.x.double() @ self.weight.double().T + (0 if self.bias is None else self.bias.double())
        q, k, self.v = wide.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
        self.q = turned(q, self.gammas[0], self.cos_sin, self.positions)
        self.k = turned(k, self.gammas[1], self.cos_sin, self.positions)

    def run(self, function, return_kv=True, **options):
        """(what it returns, k_cache, v_cache)"""
        caches = self.noise[0].clone(), self.noise[1].clone()
        kept = [t.clone() for t in (self.x, self.weight, self.cos_sin, self.positions, self.slots)]
        result = function(
            self.x, self.weight, *self.gammas, self.cos_sin, self.positions, self.slots, *caches, *self.sizes,
            bias=self.bias, return_kv=return_kv, **options,
        )  # fmt: skip
        now = (self.x, self.weight, self.cos_sin, self.positions, self.slots)
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
        return result, *caches

    def check(self, assert_close, result, k_cache, v_cache) -> None:
        q, k, v = result
        for ours, theirs in ((q, self.q), (k, self.k), (v, self.v)):
            assert ours.is_contiguous()
            assert_close(ours, theirs)
        self.check_caches(k_cache, v_cache, k, v)

    def check_caches(self, k_cache, v_cache, k, v) -> None:
        """What was written is k and v, bit for bit, and nothing but the slots was written."""
        _, kv_heads, dim, _ = self.sizes
        for cache, before, value in ((k_cache, self.noise[0], k), (v_cache, self.noise[1], v)):
            after = before.clone().view(-1, kv_heads, dim)
            after[self.slots[self.slots >= 0].long()] = value[self.slots >= 0]
            assert torch.equal(cache.view(-1, kv_heads, dim), after)


# (rows, hidden, heads, kv_heads, head_dim)
QKVS = [(1, 32, 4, 2, 16), (37, 72, 6, 2, 32), (70, 33, 3, 1, 16)]


@pytest.mark.parametrize("shape", QKVS, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_qkv_rope(shape, family, dtype, described, device, randn, assert_close):
    case = Case(randn, device, *shape, dtype, norm=family == "qwen3", bias=family == "qwen2")
    case.check(assert_close, *case.run(prefill_qkv_rope, launch=Launch(32, shape[-1], 32, 4, 2, group_m=2)))
    case.check(assert_close, *case.run(FUSIONS["prefill_qkv_rope"].reference))


@pytest.mark.parametrize("launch", [
    Launch(16, 64, 16, 4, 3, group_m=1, per_sm=0), Launch(64, 32, 64, 4, 2, per_sm=2), Launch(32, 64, 32, 4, 2), None,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_every_launch_of_qkv_rope(launch, kind, described, device, randn, assert_close):
    """Tiles of one head and of two; several tiles of rows, the last of them not full."""
    case = Case(randn, device, 90, 48, 4, 2, 32, kind, bias=True)
    case.check(assert_close, *case.run(prefill_qkv_rope, launch=launch))


def test_only_q_is_returned_by_default(device, randn, assert_close):
    case = Case(randn, device, 20, 32, 2, 2, 16, torch.float32)
    q, k_cache, v_cache = case.run(prefill_qkv_rope, return_kv=False)
    assert_close(q, case.q)
    written = case.slots >= 0
    for cache, before, value in ((k_cache, case.noise[0], case.k), (v_cache, case.noise[1], case.v)):
        slots = case.slots[written].long()
        assert_close(cache.view(-1, 2, 16)[slots], value[written])
        assert (cache != before).view(-1, 32).any(1).sum() == len(slots)


def test_large_eps_counts(device, randn, assert_close):
    case = Case(randn, device, 5, 32, 2, 1, 16, torch.float32)
    case.sizes = (*case.sizes[:3], 1e6)
    (q, _, v), *_ = case.run(prefill_qkv_rope)
    assert q.abs().max() < 0.1
    assert_close(v, case.v)


def test_rows_of_odd_length_have_no_descriptors(randn):
    """Nor has a place that is no multiple of 16 bytes."""
    x, odd, shifted = randn(4, 32), randn(4, 33), randn(133)[1:129].view(4, 32)
    assert can_describe(x, x) == (LINEAR.INTERPRETED or torch.cuda.get_device_capability() >= (9, 0))
    assert not can_describe(x, odd) and not can_describe(shifted)


def test_one_row_may_have_any_stride(randn, assert_close):
    """Torch calls it contiguous, and a descriptor wants a multiple of 16 bytes."""
    x, weight = randn(32, 1).t(), randn(16, 32)
    assert x.is_contiguous() and x.stride() == (1, 1)
    assert_close(prefill_gate_up(x, weight, SMALL), gated(x, weight))


def test_unmeasured_gpus_have_no_best_launch(monkeypatch):
    """cuBLAS and separate kernels run there."""
    cpu, shape = torch.device("cpu"), (6144, 1024, 4000)
    assert chosen("prefill_gate_up", "6144x1024 rows 4096", cpu) is None
    assert best_launch("prefill_gate_up", *shape, torch.bfloat16, cpu) is None
    table = {"prefill_gate_up": {"6144x1024 rows 4096": {"launch": {
        "block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3, "per_sm": 2,
    }}}, "prefill_qkv_rope": {"6144x1024 rows 4096": {"path": "cublas"}}}  # fmt: skip
    monkeypatch.setattr(LINEAR, "chosen", lambda kernel, key, device: table[kernel].get(key))
    assert best_launch("prefill_gate_up", *shape, torch.bfloat16, cpu) == Launch(128, 64, 64, 4, 3, per_sm=2)
    assert best_launch("prefill_gate_up", 6144, 1024, 4097, torch.bfloat16, cpu) is None
    assert best_launch("prefill_gate_up", *shape, torch.float32, cpu) is None
    assert best_launch("prefill_qkv_rope", *shape, torch.bfloat16, cpu) is None


def test_no_rows(device, randn):
    assert prefill_gate_up(randn(0, 32), randn(8, 32)).shape == (0, 4)
    case = Case(randn, device, 0, 32, 2, 1, 16, torch.float32)
    (q, k, v), *_ = case.run(prefill_qkv_rope)
    assert q.shape == (0, 2, 16) and k.shape == v.shape == (0, 1, 16)


def test_wrong_arguments(device, randn):
    x = randn(4, 32)
    with pytest.raises(ValueError, match="as many gate rows as up rows"):
        prefill_gate_up(x, randn(7, 32))
    with pytest.raises(ValueError, match="weight must have shape"):
        prefill_gate_up(x, randn(8, 31))
    with pytest.raises(ValueError, match="x must be contiguous"):
        prefill_gate_up(randn(32, 4).T, randn(8, 32))
    with pytest.raises(ValueError, match="1 or 2 pieces, not 3"):
        prefill_gate_up(x, randn(8, 32), Launch(16, 16, 16, 4, 2, pieces=3))
    for change, message in (
        ({"weight": randn(60, 32)}, "weight must have shape"),
        ({"gammas": (randn(16), None)}, "both be given, or neither"),
        ({"bias": randn(63)}, r"bias must have shape \(64,\)"),
        ({"sizes": (2, 1, 24, EPS)}, "power of two from 16 to 256, not 24"),
        ({"slots": torch.zeros(3, dtype=torch.int32, device=device)}, "slot_mapping must have shape"),
        ({"positions": randn(4)}, "positions must be int32 or int64"),
    ):
        case = Case(randn, device, 4, 32, 2, 1, 16, torch.float32)
        for name, value in change.items():
            setattr(case, name, value)
        with pytest.raises(ValueError, match=message):
            case.run(prefill_qkv_rope)
    case = Case(randn, device, 4, 32, 2, 1, 16, torch.float32)
    case.x, case.weight = randn(4, 0), randn(64, 0)
    with pytest.raises(ValueError, match="at least one column"):
        case.run(prefill_qkv_rope)
    case = Case(randn, device, 4, 32, 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="hold no whole heads of 16 of one kind"):
        case.run(prefill_qkv_rope, launch=Launch(16, 32, 16, 4, 2))
