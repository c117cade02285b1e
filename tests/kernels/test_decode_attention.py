"""decode_attention against float64: every path of the launch, the cache afterwards, what must stay unread."""

from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import FUSIONS, choices, decode_attention
from kernels.decode_attention import workspace
from kernels.decode_attention_launch import (
    PART_ROWS,
    SHORT_CONTEXT,
    Launch,
    best_launch,
    candidates,
    default_launch,
    has_short_launch,
)

EMPTY = torch.empty
EPS = 1e-6
MAX_POS = 700
SUM = Launch(block_n=64, splits=1, piece=64, num_warps=4, dot=False)
DOT = Launch(block_n=32, splits=1, piece=32, num_warps=1, dot=True, num_stages=3)
HELD = Launch(block_n=64, splits=1, piece=64, num_warps=2, dot=True, fragments=1)


def split(launch: Launch, splits: int) -> Launch:
    return replace(launch, splits=splits)


def angles(head_dim: int, device: torch.device) -> Tensor:
    frequency = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(MAX_POS, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float().to(device)


@dataclass
class Case:
    """Rows that have `cached` tokens (-1: a padding row); what may not be read is NaN, block order is shuffled."""

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos_sin: Tensor
    positions: Tensor
    block_tables: Tensor
    k_cache: Tensor
    v_cache: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    keys: list[Tensor]
    values: list[Tensor]

    def arguments(self) -> tuple:
        return (
            self.qkv, self.q_weight, self.k_weight, self.cos_sin, self.positions, self.block_tables,
            self.k_cache, self.v_cache, self.heads, self.kv_heads, self.head_dim, EPS, self.head_dim**-0.5,
        )  # fmt: skip

    def workspace(self):
        return workspace(len(self.positions), self.heads, self.head_dim, self.qkv.device)

    def run(self, launch: Launch | None, space=None) -> Tensor:
        return decode_attention(*self.arguments(), workspace=space or self.workspace(), launch=launch)

    def head(self, row: int, index: int, gamma: Tensor | None) -> Tensor:
        """One normed and rotated head, the rotation as multiplication of complex numbers."""
        x = self.qkv[row].view(-1, self.head_dim)[index].double()
        if gamma is not None:
            x = x / torch.sqrt((x**2).mean() + EPS) * gamma.double()
        half = self.head_dim // 2
        table = self.cos_sin[self.positions[row].item()].double()
        turned = torch.complex(x[:half], x[half:]) * torch.complex(table[:half], table[half:])
        return torch.cat((turned.real, turned.imag))

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """o; the new k and v [rows, kv_heads, head_dim] (zeros in padding rows), in float64."""
        rows, group = len(self.positions), self.heads // self.kv_heads
        o = torch.zeros(rows, self.heads, self.head_dim, dtype=torch.float64, device=self.qkv.device)
        new_k = torch.zeros(rows, self.kv_heads, self.head_dim, dtype=torch.float64, device=self.qkv.device)
        new_v = torch.zeros_like(new_k)
        for row, position in enumerate(self.positions.tolist()):
            if position < 0:
                continue
            for kv_head in range(self.kv_heads):
                new_k[row, kv_head] = self.head(row, self.heads + kv_head, self.k_weight)
                new_v[row, kv_head] = self.qkv[row].view(-1, self.head_dim)[self.heads + self.kv_heads + kv_head]
                k = torch.cat((self.keys[row][:, kv_head].double(), new_k[row, kv_head][None]))
                v = torch.cat((self.values[row][:, kv_head].double(), new_v[row, kv_head][None]))
                for head in range(kv_head * group, (kv_head + 1) * group):
                    weights = torch.softmax(k @ self.head(row, head, self.q_weight) * self.head_dim**-0.5, dim=0)
                    o[row, head] = weights @ v
        return o.flatten(1), new_k, new_v


@pytest.fixture
def make_case(randn, device):
    def make(cached, heads, kv_heads, head_dim, block_size, dtype, norm=True) -> Case:
        needed = [max(length, 0) // block_size + 1 if length >= 0 else 0 for length in cached]
        order = iter(torch.randperm(sum(needed) + 2).tolist())
        cache = torch.full((2, sum(needed) + 2, block_size, kv_heads, head_dim), float("nan")).to(device, dtype)
        tables = torch.full((len(cached), max(needed) + 2), 2**30, dtype=torch.int32)  # unused: out of memory
        keys, values = [], []
        for row, length in enumerate(cached):
            kv = randn(2, max(length, 0), kv_heads, head_dim, dtype=dtype)
            keys.append(kv[0])
            values.append(kv[1])
            for column in range(needed[row]):
                block = next(order)
                tables[row, column] = block
                part = kv[:, column * block_size : (column + 1) * block_size]
                cache[:, block, : part.shape[1]] = part
        qkv = randn(len(cached), (heads + 2 * kv_heads) * head_dim, dtype=dtype, scale=2)
        qkv[[row for row, length in enumerate(cached) if length < 0]] = float("nan")
        gammas = [randn(head_dim, dtype=dtype) if norm else None for _ in range(2)]
        return Case(
            qkv, *gammas, angles(head_dim, device), torch.tensor(cached, dtype=torch.int32, device=device),
            tables.to(device), cache[0], cache[1], heads, kv_heads, head_dim, keys, values,
        )  # fmt: skip

    return make


# (heads, kv_heads, head_dim, block_size): groups of 1, 2, 4, 7
LAYOUTS = [(4, 2, 128, 256), (7, 1, 64, 16), (2, 2, 24, 16), (8, 2, 16, 64)]


LAUNCHES = {
    "sum": SUM, "dot": DOT, "held": HELD, "sum8": split(SUM, 8), "dot2": split(DOT, 2),
    "held2": replace(HELD, splits=2, fragments=2), "first": replace(DOT, held=True),
    "first2": replace(DOT, splits=2, held=True),
}  # fmt: skip
PAIRS = [(layout, launch, torch.float32) for layout in LAYOUTS for launch in LAUNCHES]
PAIRS += [
    (layout, launch, dtype)
    for dtype in (torch.float16, torch.bfloat16)
    for layout, launch in zip(LAYOUTS, ("sum", "dot", "dot2", "sum8"), strict=True)
]
PAIRS += [(layout, "held2", torch.bfloat16) for layout in LAYOUTS]


@pytest.mark.parametrize(("layout", "launch", "dtype"), PAIRS, ids=str)
def test_values_and_cache(layout, launch, dtype, make_case, assert_close):
    """Lengths below, at and past the borders of tiles, blocks and splits; the first token of all; a padding row."""
    launch = LAUNCHES[launch]
    case = make_case([0, 64, -1, 131], *layout, dtype, norm=layout[2] != 64)
    before = case.k_cache.clone(), case.v_cache.clone()
    o, new_k, new_v = case.expected()
    out = case.run(launch)
    assert_close(out, o)
    assert not out[2].any()

    block_size = layout[3]
    for row, position in enumerate(case.positions.tolist()):
        if position < 0:
            continue
        place = case.block_tables[row, position // block_size].item(), position % block_size
        assert_close(case.k_cache[place], new_k[row])
        assert torch.equal(case.v_cache[place].double(), new_v[row])
        case.k_cache[place], case.v_cache[place] = before[0][place], before[1][place]
    for cache, kept in zip((case.k_cache, case.v_cache), before, strict=True):
        assert torch.equal(cache.view(torch.uint8), kept.view(torch.uint8)), "another place of the cache was written"


@pytest.mark.parametrize("splits", [1, 4])
def test_query_heads_apart(splits, make_case, assert_close):
    """Each query head's program finds its key/value head; one of them writes the cache."""
    case = make_case([0, -1, 131], 6, 2, 24, 16, torch.float32)
    o, new_k, _ = case.expected()
    assert_close(case.run(replace(SUM, splits=splits, heads=1)), o)
    assert_close(case.k_cache[case.block_tables[2, 8].item(), 3], new_k[2])
    with pytest.raises(ValueError, match="must divide the 3 of a group, not 2"):
        case.run(replace(SUM, heads=2))


@pytest.mark.parametrize("launch", [SUM, DOT, HELD], ids=["sum", "dot", "held"])
@pytest.mark.parametrize("splits", [2, 8])
def test_a_workspace_is_used_again(launch, splits, make_case, assert_close):
    """Rows of one piece, of some and of all; the counters are zero after each launch."""
    case = make_case([40, 65, 150, 330], 2, 1, 32, 32, torch.float32)
    space = case.workspace()
    o, _, _ = case.expected()
    for _ in range(2):
        assert_close(case.run(split(launch, splits), space), o)
        assert not space.counters.any()
        space.parts.fill_(float("nan"))
        space.lse.fill_(float("nan"))


def test_splits_follow_the_length(make_case):
    """A context of one piece touches no workspace; a longer one is parted into as few pieces as fit."""
    case = make_case([64, 65, 129, 400], 2, 1, 16, 16, torch.float32)
    space = case.workspace()
    case.run(split(SUM, 4), space)
    used = [part.isfinite().all().item() for part in space.lse[: 4 * 4]]
    assert not space.counters.any()
    assert used == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 3 + [False] + [True] * 4


@pytest.mark.parametrize("launch", [SUM, DOT, HELD, split(SUM, 4)], ids=["sum", "dot", "held", "sum4"])
def test_large_scores_do_not_overflow(launch, make_case, assert_close):
    case = make_case([150], 2, 1, 16, 16, torch.float32)
    case.q_weight *= 60  # far beyond 88, where exp overflows; scores still larger lose digits of their own
    assert_close(case.run(launch), case.expected()[0])


def test_reference_and_default_launch(dtype, make_case, assert_close):
    case = make_case([0, 70, -1, 300], 4, 2, 32, 32, dtype)
    o, _, _ = case.expected()
    assert_close(FUSIONS["decode_attention"].reference(*case.arguments()), o)
    assert_close(case.run(None), o)


def test_default_launches_fit_their_workspace():
    cpu = torch.device("cpu")
    for rows in (1, 3, 16, 64, 256, 512):
        for heads, kv_heads, head_dim in ((16, 8, 128), (32, 8, 64), (14, 2, 64), (28, 4, 128), (8, 8, 256)):
            parts = workspace(rows, heads, head_dim, cpu).parts.shape[0]
            assert parts <= PART_ROWS
            for element_bytes in (2, 4):
                found = candidates(rows, heads, kv_heads, head_dim, 4096, element_bytes)
                assert default_launch(rows, heads, kv_heads, head_dim, 4096, element_bytes) in found
                assert all(launch.splits == 1 or launch.splits * rows <= parts for launch in found)
    launches = [default_launch(rows, 16, 8, 128, 4096) for rows in (1, 4, 16, 256)]
    assert [launch.splits for launch in launches] == [16, 8, 2, 1]
    assert default_launch(1, 16, 8, 128, 300).splits == 1


def test_wrong_arguments(make_case):
    case = make_case([20], 4, 2, 16, 16, torch.float32)
    space = case.workspace()
    good = list(case.arguments())
    for index, value, message in (
        (0, case.qkv[:, 1:].contiguous(), "columns for its heads"),
        (2, None, "both be given, or neither"),
        (3, case.cos_sin.bfloat16(), "cos_sin must be torch.float32"),
        (4, case.positions.float(), "positions must be int32 or int64"),
        (5, case.block_tables.repeat(2, 1), "block_tables must have shape"),
        (6, case.k_cache[:, :12], "power of two of at least 16, not 12"),
        (7, case.v_cache[:1], "v_cache must have shape"),
        (8, 3, "multiple of kv_heads"),
        (10, 15, "head_dim must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*good[:index], value, *good[index + 1 :], workspace=space)
    with pytest.raises(ValueError, match="1 rows in 32 splits need 32 of"):
        decode_attention(*good, workspace=workspace(1, 4, 8, case.qkv.device), launch=split(SUM, 32))
    for change, message in (
        ({"block_n": 48}, "block_n must be a power of two"),
        ({"splits": 64}, "at most 32"),
        ({"piece": 100}, "multiple of block_n"),
        ({"piece": 128}, "piece must be block_n, 64, not 128"),
        ({"dot": True, "heads": 1}, "for launches without dot"),
        ({"fragments": 1}, "fragments must be 1 or 2, and dot true"),
        ({"dot": True, "fragments": 1, "num_warps": 8}, "16 keys for each of 8 warps, not 64"),
        ({"held": True}, "held is for a stream"),
    ):
        with pytest.raises(ValueError, match=message):
            Launch(**({"block_n": 64, "splits": 1, "piece": 64, "num_warps": 4, "dot": False} | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "launch",
    [replace(SUM, splits=8, heads=1, registers=128), replace(DOT, splits=4), DOT, replace(DOT, splits=4, held=True),
     replace(HELD, splits=4)],
    ids=["sum8", "dot4", "dot", "first4", "held4"],
)  # fmt: skip
def test_dependent_launches_of_a_graph(launch, make_case, device, monkeypatch):
    """Launches that share a workspace, two and two with nothing between: replays equal ordinary ones, bit for bit."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    monkeypatch.setattr(torch, "empty", EMPTY)  # a fill between two launches would keep them apart
    case = make_case([0, 64, 65, 300, 640, -1] * 8, 4, 2, 64, 64, torch.bfloat16)
    space = case.workspace()
    width = case.heads * case.head_dim

    def layers(dependent: bool) -> Tensor:
        qkv = case.qkv.nan_to_num()
        for _ in range(12):
            first, out = (
                decode_attention(qkv, *case.arguments()[1:], workspace=space, dependent=dependent, launch=launch)
                for _ in range(2)
            )
            qkv = torch.cat((first - out / 2, qkv[:, width:]), dim=1)
        return out

    expected = layers(dependent=False).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(dependent=True)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
        assert not space.counters.any()


def test_short_contexts_may_have_a_launch_of_their_own(monkeypatch):
    general, short = Launch(64, 1, 256, 4, True, 3), Launch(32, 2, 128, 2, True, 3)
    measured = {"16/8x128 rows 32": general, "16/8x128 rows 32 short": short, "16/8x128 rows 128": general}
    measured |= {"16/8x128 rows 64": general, "16/8x128 rows 64 short": general, "16/8x128 rows 48 short": short}
    entries = {key: {"launch": asdict(launch)} for key, launch in measured.items()}
    monkeypatch.setattr(choices, "chosen", lambda kernel, key, device: entries.get(key))
    shape, device = (16, 8, 128), torch.device("cpu")
    assert best_launch(32, *shape, SHORT_CONTEXT, 2, device) == best_launch(17, *shape, 130, 2, device) == short
    assert best_launch(32, *shape, SHORT_CONTEXT + 1, 2, device) == general
    assert best_launch(128, *shape, 130, 2, device) == general  # where short ones were not measured
    assert best_launch(8, *shape, 130, 2, device) == default_launch(8, *shape, 130, 2)
    assert best_launch(32, *shape, 130, 4, device) == default_launch(32, *shape, 130, 4)
    apart = [rows for rows in (1, 16, 17, 32, 33, 48, 64, 128) if has_short_launch(rows, *shape, 2, device)]
    assert apart == [17, 32, 33, 48]
    assert not has_short_launch(32, *shape, 4, device) and not has_short_launch(32, 8, 8, 128, 2, device)
