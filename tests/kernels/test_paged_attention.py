"""paged_attention against float64: decode, prefill, chunks, splits; poison wherever nothing may be read."""

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from kernels import FUSIONS, paged_attention

module = import_module("kernels.paged_attention")  # whose name the function has too


@dataclass
class Case:
    """Tensors for sequences of (new tokens, context length): what may not be read is NaN, block order is shuffled."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    max_seqlen_q: int
    scale: float
    keys: list[Tensor]
    values: list[Tensor]

    def arguments(self) -> tuple:
        return (
            self.q, self.k_cache, self.v_cache, self.block_tables, self.cu_seqlens_q, self.seqlens_k,
            self.max_seqlen_q, self.scale,
        )  # fmt: skip

    def expected(self) -> Tensor:
        """Softmax attention query by query, in float64."""
        group = self.q.shape[1] // self.k_cache.shape[2]
        out = torch.zeros_like(self.q, dtype=torch.float64)
        starts = self.cu_seqlens_q.tolist()
        for sequence, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            queries = starts[sequence + 1] - starts[sequence]
            for i in range(queries):
                seen = len(k) - queries + i + 1
                if seen <= 0:
                    continue
                token = starts[sequence] + i
                for head in range(self.q.shape[1]):
                    score = k[:seen, head // group].double() @ self.q[token, head].double() * self.scale
                    out[token, head] = torch.softmax(score, dim=0) @ v[:seen, head // group].double()
        return out


@pytest.fixture
def make_case(randn, device):
    def make(sequences, heads, kv_heads, head_dim, block_size, dtype, max_blocks=None) -> Case:
        needed = [-(-length // block_size) for _, length in sequences]
        width = max_blocks or max(*needed, 1) + 2
        order = iter((torch.randperm(sum(needed) + 2)).tolist())
        cache = torch.full((2, sum(needed) + 2, block_size, kv_heads, head_dim), float("nan")).to(device, dtype)
        tables = torch.full((len(sequences), width), 2**30, dtype=torch.int32)  # an unused entry leads out of memory
        keys, values = [], []
        for row, (_, length) in enumerate(sequences):
            kv = randn(2, length, kv_heads, head_dim, dtype=dtype)
            keys.append(kv[0])
            values.append(kv[1])
            for column in range(needed[row]):
                block = next(order)
                tables[row, column] = block
                part = kv[:, column * block_size : (column + 1) * block_size]
                cache[:, block, : part.shape[1]] = part
        new = torch.tensor([queries for queries, _ in sequences])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), new.cumsum(0))).to(torch.int32)
        return Case(
            q=randn(int(new.sum()), heads, head_dim, dtype=dtype), k_cache=cache[0], v_cache=cache[1],
            block_tables=tables.to(device), cu_seqlens_q=starts.to(device),
            seqlens_k=torch.tensor([length for _, length in sequences], dtype=torch.int32, device=device),
            max_seqlen_q=int(new.max()), scale=head_dim**-0.5, keys=keys, values=values,
        )  # fmt: skip

    return make


# (heads, kv_heads, head_dim, block_size)
LAYOUTS = [(4, 2, 16, 16), (6, 1, 32, 64), (8, 1, 20, 256), (3, 3, 64, 32), (2, 1, 128, 128)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("splits", [None, 3, 4, 32])
def test_decode(layout, splits, dtype, make_case, assert_close):
    case = make_case([(1, 1), (1, 64), (1, 129)], *layout, dtype)
    out = paged_attention(*case.arguments(), num_splits=splits)
    assert_close(out, case.expected())
    assert_close(out, FUSIONS["paged_attention"].reference(*case.arguments()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prefill_and_chunks(layout, dtype, make_case, assert_close):
    """A whole prompt, later chunks of a prompt and a decode step in one batch."""
    case = make_case([(19, 19), (1, 50), (3, 133), (35, 70)], *layout, dtype)
    out = paged_attention(*case.arguments())
    assert_close(out, case.expected())
    assert_close(out, FUSIONS["paged_attention"].reference(*case.arguments()))


def test_prefill_in_splits(dtype, make_case, assert_close):
    """Some splits hold no key at all; in some a tile's first queries see none, its last do."""
    case = make_case([(9, 9), (1, 70), (16, 41), (16, 70)], 2, 2, 16, 16, dtype)
    assert_close(paged_attention(*case.arguments(), num_splits=4), case.expected())


def test_a_prompt_of_many_row_blocks(dtype, make_case, assert_close):
    case = make_case([(130, 150), (3, 3)], 3, 1, 16, 32, dtype)
    assert_close(paged_attention(*case.arguments()), case.expected())


@pytest.mark.parametrize("splits", [1, 8])
def test_padding_rows_of_a_graph_give_zeros(splits, dtype, make_case, assert_close):
    case = make_case([(1, 40), (1, 0), (1, 0)], 4, 2, 16, 16, dtype)
    out = paged_attention(*case.arguments(), num_splits=splits)
    assert_close(out, case.expected())
    assert not out[1:].any()


@pytest.mark.parametrize("splits", [1, 2])
def test_queries_without_keys_give_zeros(splits, make_case, assert_close):
    case = make_case([(5, 2), (2, 2)], 2, 1, 16, 16, torch.float32)
    out = paged_attention(*case.arguments(), num_splits=splits)
    assert_close(out, case.expected())
    assert not out[:3].any()
    assert_close(FUSIONS["paged_attention"].reference(*case.arguments()), case.expected())


def test_more_tokens_than_sequences_own(make_case, assert_close):
    """Rows beyond the last sequence are left alone; a sequence without queries is passed over."""
    case = make_case([(1, 20), (0, 9), (1, 33)], 2, 1, 16, 16, torch.float32)
    case.q = torch.cat((case.q, torch.full_like(case.q, float("nan"))))
    out = paged_attention(*case.arguments(), num_splits=1)
    assert_close(out[:2], case.expected()[:2])
    assert torch.isnan(out[2:]).all()


def test_large_scores_do_not_overflow(make_case, assert_close):
    case = make_case([(1, 50), (20, 50)], 2, 1, 16, 16, torch.float32)
    case.q *= 300
    assert_close(paged_attention(*case.arguments()), case.expected())


class Noting:
    """In place of a kernel: what it would be compiled for."""

    def __init__(self) -> None:
        self.seen: set[tuple] = set()

    def __getitem__(self, _grid):
        return lambda *arguments, **constants: self.seen.add(
            (*sorted(constants.items()), *(argument is None for argument in arguments))
        )


@pytest.mark.parametrize("group", [1, 2, 6, 16])
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32], ids=str)
def test_a_few_steps_run_all_kernels_that_any_step_may(group, of, monkeypatch):
    """Those of an engine's start: decode graphs, the largest prompt, one token, and `tile_tokens` at a short and at the
    longest context."""
    kernel = Noting()
    monkeypatch.setattr(module, "paged_attention_kernel", kernel)
    monkeypatch.setattr(module, "paged_attention_combine_kernel", Noting())
    monkeypatch.setattr(module, "runs_triton", lambda _: True)
    monkeypatch.setattr(module, "_multiprocessors", lambda _: 132)

    def run(sequences: int, tokens: int, context: int) -> None:
        cache, numbers = torch.zeros(1, 256, 8, 16, dtype=of), torch.zeros(sequences + 1, dtype=torch.int32)
        tables = torch.zeros(sequences, -(-context // 256), dtype=torch.int32)
        q = torch.zeros(sequences * tokens, 8 * group, 16, dtype=of)
        paged_attention(q, cache, cache, tables, numbers, numbers[1:], tokens, 0.1)

    for rows in (1, 2, 4, 8, *range(16, 257, 16)):
        run(rows, 1, 4096)
    run(1, 4096, 4096)
    run(1, 1, 1)
    for tokens in module.tile_tokens(group, of.itemsize):
        run(1, tokens, tokens)
        run(1, tokens, 4096)
    warm = set(kernel.seen)
    assert len(warm) <= 2 * len(module.TILES[of.itemsize]) + 2
    for sequences in (1, 2, 17):
        for tokens in (*range(1, 19), 32, 33, 42, 43, 128, 129, 256, 257):
            for context in {tokens, max(tokens, 512), 4096} if sequences * tokens < 2000 else ():
                run(sequences, tokens, context)
    assert kernel.seen == warm


def test_splits_depend_on_shapes_alone(monkeypatch):
    from kernels.paged_attention import _multiprocessors, _splits

    cpu = torch.device("cpu")
    assert _multiprocessors(cpu) == 1
    assert _splits(8, 40960, True, cpu) == 1
    monkeypatch.setitem(_splits.__globals__, "_multiprocessors", lambda _: 132)
    assert [_splits(programs, 40960, True, cpu) for programs in (8, 64, 256, 1000)] == [32, 4, 1, 1]
    assert [_splits(programs, 40960, False, cpu) for programs in (8, 32, 128)] == [16, 4, 1]
    assert [_splits(8, context, True, cpu) for context in (128, 256, 512, 1100, 4096)] == [1, 1, 2, 4, 16]


def test_wrong_arguments(make_case):
    case = make_case([(1, 20)], 4, 2, 16, 16, torch.float32)
    good = list(case.arguments())
    for index, value, message in (
        (0, case.q.bfloat16(), "k_cache must be torch.bfloat16"),
        (0, torch.cat((case.q, case.q[:, :1]), dim=1), "does not fit a cache with 2 heads of 16"),
        (1, case.k_cache[:, :12], "power of two of at least 16, not 12"),
        (2, case.v_cache[:1], "v_cache must have shape"),
        (3, case.block_tables.float(), "block_tables must be int32"),
        (4, case.cu_seqlens_q[:1], "cu_seqlens_q must have shape"),
        (5, case.seqlens_k.repeat(2), "seqlens_k must have shape"),
        (6, 0, "max_seqlen_q must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(*good[:index], value, *good[index + 1 :])
    with pytest.raises(ValueError, match="num_splits must be from 1 to 32, not 33"):
        paged_attention(*good, num_splits=33)
