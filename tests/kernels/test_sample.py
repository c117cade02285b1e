"""Sampling against published random numbers, float64 statistics and the exact softmax."""

from dataclasses import dataclass

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import kernels
from kernels import FUSIONS, INTERPRETED, choose_token, tile_stats
from kernels._triton import tl, triton
from kernels.sample import TILE, Launch, _first_beyond, philox_reference, uniform, uniform_reference

KERNEL_DRAWS = 60 if INTERPRETED else 50_000
"""The interpreter takes tens of milliseconds for one."""
REFERENCE_DRAWS = 20_000
LIMIT = 1e-4

with pytest.MonkeyPatch.context() as patch:
    # Kernels of the tests' own run as the package's do, and Triton looks at the variable when it decorates them.
    patch.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))

    @triton.jit
    def uniform_kernel(seeds, positions, out, ROWS: tl.constexpr):
        at = tl.arange(0, ROWS)
        tl.store(out + at, uniform(tl.load(seeds + at), tl.load(positions + at)))

    @triton.jit
    def first_beyond_kernel(weights, targets, out):
        row = tl.program_id(0)
        index, rest = _first_beyond(tl.load(weights + tl.arange(0, 4)), tl.load(targets + row), 4)
        tl.store(out + 2 * row, index.to(tl.float64))
        tl.store(out + 2 * row + 1, rest)


@dataclass
class State:
    """What the engine keeps for each row of a decode step."""

    temperatures: Tensor
    seeds: Tensor
    positions: Tensor
    tokens: Tensor
    ring: Tensor
    steps: Tensor

    @classmethod
    def of(cls, temperatures: list[float], seeds: list[int], positions: list[int], device: torch.device) -> "State":
        """The ring has three slots and one more row than the batch, all poisoned."""
        rows = len(temperatures)
        return cls(
            torch.tensor(temperatures, device=device),
            torch.tensor(seeds, device=device),
            torch.tensor(positions, dtype=torch.int32, device=device),
            torch.full((rows,), -7, dtype=torch.int32, device=device),
            torch.full((3, rows + 1), -7, dtype=torch.int32, device=device),
            torch.arange(rows, device=device) + 4,
        )

    def draw(self, logits: Tensor, embedding: tuple[Tensor, Tensor] | None = None) -> Tensor:
        choose_token(logits, *tile_stats(logits, self.temperatures), *vars(self).values(), embedding)
        return self.tokens


def p_value(tokens: Tensor, logits: Tensor, temperature: float) -> float:
    """Of the tokens being drawn from softmax(logits / T); what is expected fewer than 5 times counts as one token."""
    expected = torch.softmax(logits.double().cpu() / temperature, 0) * len(tokens)
    counts = torch.bincount(tokens.long().cpu(), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0, "a token of no probability was drawn"
    rare = expected < 5
    pooled = [torch.cat([values[~rare], values[rare].sum().view(1)]) for values in (counts, expected)]
    if pooled[1][-1] < 5:
        pooled = [torch.cat([values[:-2], values[-2:].sum().view(1)]) for values in pooled]
    assert len(pooled[1]) >= 6
    return chisquare(*pooled).pvalue


def spread_logits(dtype: torch.dtype, seed: int = 5) -> Tensor:
    """300 logits in three tiles, the last one short; every fifth is cut off, and of the second tile all but one."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    logits[::5] = -torch.inf
    logits[128:256] = -torch.inf
    logits[200] = 1.5
    return logits.to(dtype)


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32, 10 rounds."""
    answers = {
        "00000000 00000000 00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for words, answer in answers.items():
        *counter, k0, k1 = (torch.tensor([int(word, 16)]) for word in words.split())
        out = philox_reference(tuple(counter), (k0, k1))
        assert [int(word) for word in out] == [int(word, 16) for word in answer.split()]


def test_uniform_bits(device):
    """The kernel's numbers are the reference's bit for bit; the first is that of the published words."""
    generator = torch.Generator().manual_seed(11)
    seeds = torch.randint(-(2**63), 2**63 - 1, (256,), generator=generator)
    positions = torch.randint(0, 2**31 - 1, (256,), generator=generator, dtype=torch.int32)
    seeds[:4], positions[:4] = torch.tensor([0, 1 << 32, -1, 1]), torch.tensor([0, 0, 2**31 - 1, 0])
    seeds, positions = seeds.to(device), positions.to(device)
    out = torch.empty((256,), dtype=torch.float64, device=device)
    uniform_kernel[(1,)](seeds, positions, out, ROWS=256)
    assert torch.equal(out, uniform_reference(seeds, positions))
    assert out[0].item() == (((0x6627E8D5 << 20) | (0xE169C58D >> 12)) + 0.5) / 2**52
    assert len(set(out.tolist())) == 256 and out.min() > 0 and out.max() < 1


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 300), (5, 2 * TILE), (2, 2500)], ids=str)
def test_tile_stats(rows, vocab, dtype, device, randn):
    logits = randn(rows, vocab, dtype=dtype, scale=4)
    logits[0, TILE : 2 * TILE] = -torch.inf
    logits[-1, ::3] = -torch.inf
    temperatures = torch.tensor([1.0, 0.0, 0.6, 1.7, 1e-40][:rows], device=device)
    for launch in (None, Launch(2, 1)):
        tile_max, tile_sum = tile_stats(logits, temperatures, launch=launch)
        for row in range(rows):
            divisor = temperatures[row].double() if temperatures[row] > 0 else 1.0
            for tile, z in enumerate(logits[row].double().split(TILE)):
                assert tile_max[row, tile] == z.max()
                weights = ((z - z.max()) / divisor).exp()
                expected = weights.sum() if z.max() > -torch.inf else torch.tensor(0.0)
                assert abs(tile_sum[row, tile] - expected) <= 2e-5 * expected
        expected_max, expected_sum = FUSIONS["tile_stats"].reference(logits, temperatures)
        assert torch.equal(tile_max, expected_max)
        torch.testing.assert_close(tile_sum, expected_sum, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("temperature", "varied"), [(0.6, "positions"), (1.0, "seeds")], ids=str)
def test_reference_draws_from_softmax(temperature, varied, dtype, device):
    """Over positions at one seed, and over neighbouring seeds at one position."""
    logits = spread_logits(dtype).to(device)
    many, one = list(range(REFERENCE_DRAWS)), [3] * REFERENCE_DRAWS
    seeds, positions = (one, many) if varied == "positions" else (many, one)
    state = State.of([temperature] * REFERENCE_DRAWS, seeds, positions, device)
    with kernels.use("reference"):
        tokens = state.draw(logits.expand(REFERENCE_DRAWS, -1).contiguous())
    assert p_value(tokens, logits, temperature) > LIMIT


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_kernel_draws_from_softmax(temperature, device):
    """Few of 300 tokens are likely, so that few draws are enough to tell."""
    logits = spread_logits(torch.float32).to(device) - 6
    logits[[1, 2, 127, 200, 257, 299]] = torch.tensor([0.0, 0.3, 0.6, 0.2, 0.5, -0.1], device=device)
    state = State.of([temperature] * KERNEL_DRAWS, [42] * KERNEL_DRAWS, list(range(KERNEL_DRAWS)), device)
    tokens = state.draw(logits.expand(KERNEL_DRAWS, -1).contiguous())
    assert p_value(tokens, logits, temperature) > LIMIT


@pytest.mark.parametrize("vocab", [50, 300, 40_000], ids=str)
def test_same_tokens_as_one_running_sum(vocab, dtype, device):
    """Tiles and groups of tiles must not show: the reference runs over the vocabulary once, in float64."""
    rows = 8 if INTERPRETED else 2000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[:, 7::11] = -torch.inf
    logits = logits.to(device, dtype)
    temperatures = ([0.0, 0.6, 1.0, 1.3] * rows)[:rows]
    arguments = (temperatures, list(range(rows)), list(range(5, rows + 5)), device)
    tokens = State.of(*arguments).draw(logits)
    with kernels.use("reference"):
        expected = State.of(*arguments).draw(logits)
    # Float32 weights may move a border by 1e-6 of the whole, which one draw in many thousands could notice.
    assert (tokens != expected).sum() <= (0 if INTERPRETED else 1)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("hidden", [1, 24, 1030], ids=str)
def test_drawn_tokens_are_embedded(path, hidden, dtype, device, randn):
    """Bit for bit, padding rows as token 0, and nothing beyond the rows; tokens are those drawn without it."""
    logits, table = randn(4, 300, scale=3), randn(300, hidden, dtype=dtype)
    arguments = ([1.0, 0.0, 0.7, 1.3], [3, 4, 5, 6], [7, 8, -1, 9], device)
    expected, state = State.of(*arguments), State.of(*arguments)
    memory = torch.full((5, hidden), torch.nan, dtype=dtype, device=device)
    with kernels.use(path):
        expected.draw(logits)
        state.draw(logits, (table, memory[:4]))
    for name, value in vars(expected).items():
        assert torch.equal(getattr(state, name), value), name
    tokens = state.tokens.tolist()
    assert tokens[2] == 0
    assert torch.equal(memory[:4], table[tokens])
    assert memory[4].isnan().all()


def test_equal_rows_draw_equal_tokens(device):
    """Seed, position and logits decide: not the row, nor the batch, nor what else is in it."""
    logits = spread_logits(torch.bfloat16).to(device)
    noise = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    alone = [State.of([0.8], [9], [at], device).draw(logits[None].clone()).item() for at in (100, 101, 102)]
    rows = torch.stack([noise[0], logits, noise[1], logits, logits])
    state = State.of([0.0, 0.8, 1.0, 0.8, 0.8], [1, 9, 9, 9, 9], [0, 102, 100, 100, 101], device)
    tokens = state.draw(rows).tolist()
    assert [tokens[3], tokens[4], tokens[1]] == alone
    other_seed = [State.of([0.8], [seed], [100], device).draw(logits[None].clone()).item() for seed in range(6)]
    assert len({*alone}) > 1 and len({*other_seed}) > 1


def test_greedy_takes_the_first_of_equal_maxima(dtype, device):
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(1)).clamp_max(2).to(device, dtype)
    maxima = ([130, 131, 690], [5, 640], [699], [0, 1])
    for row, places in enumerate(maxima):
        logits[row, places] = 3.0
    state = State.of([0.0] * 4, [1, 2, 3, 4], [8] * 4, device)
    assert state.draw(logits).tolist() == [130, 5, 699, 0]
    # The coldest temperature divides by nothing: equal maxima share all probability, and no NaN comes of it.
    state = State.of([1e-44, 1e-30] * 2, [1, 2, 3, 4], [8] * 4, device)
    drawn = state.draw(logits).tolist()
    assert all(token in places for token, places in zip(drawn, maxima, strict=True))


def test_decode_state_advances(device):
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(3)).to(device)
    logits[1, 150] = 9.0  # a padding row would choose this
    state = State.of([1.0, 0.0, 0.0, 0.6], [5, 5, 5, 5], [7, -1, 0, 2_000_000], device)
    first = state.draw(logits).tolist()
    assert state.positions.tolist() == [8, -1, 1, 2_000_001]
    assert state.steps.tolist() == [5, 6, 7, 8]
    second = state.draw(logits).tolist()
    assert first[1] == second[1] == 0 and first[2] == second[2] == logits[2].argmax()
    # Rows had made 4, 5, 6, 7 steps; the slots are those modulo 3, and nothing else of the ring is touched.
    assert state.ring.tolist() == [
        [-7, second[1], first[2], -7, -7],
        [first[0], -7, second[2], first[3], -7],
        [second[0], first[1], -7, second[3], -7],
    ]
    # The second token is that of a request which stands at the next position already.
    assert State.of([1.0], [5], [8], device).draw(logits[:1]).item() == second[0]


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered in divide")
def test_no_token_outside_the_vocabulary(device):
    """Whatever the logits are: all cut off, or spoilt."""
    logits = torch.zeros(4, 130, device=device)
    logits[:2] = -torch.inf
    logits[2] = float("nan")
    logits[3, 4] = float("nan")
    tokens = State.of([0.0, 1.0, 1.0, 1.0], [1, 2, 3, 4], [5, 6, 7, 8], device).draw(logits)
    assert tokens[:3].tolist() == [0, 0, 0] and 0 <= tokens[3] < 130


def test_borders_of_the_search(device):
    """Entries without weight are never found, not even where the target is 0 or rounding puts it at the very end."""
    weights = torch.tensor([0.0, 2.0, 3.0, 0.0], dtype=torch.float64, device=device)
    targets = torch.tensor([-1e-16, 0.0, 1.9, 2.0, 4.9, 5.0, 5.1], dtype=torch.float64, device=device)
    out = torch.empty((7, 2), dtype=torch.float64, device=device)
    first_beyond_kernel[(7,)](weights, targets, out)
    assert out[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(out[:, 1], targets - torch.tensor([0, 0, 0, 2, 2, 2, 2], device=device))


def test_wrong_arguments(device):
    logits = torch.zeros(2, 130, device=device)
    state = State.of([1.0, 1.0], [1, 2], [0, 0], device)
    stats = tile_stats(logits, state.temperatures)
    with pytest.raises(ValueError, match="at least one column"):
        tile_stats(logits[:, :0].contiguous(), state.temperatures)
    with pytest.raises(ValueError, match="temperatures must be torch.float32"):
        tile_stats(logits, state.temperatures.double())

    def choose(logits=logits, stats=stats, **changed):
        arguments = vars(state) | changed
        choose_token(logits, *stats, *arguments.values())

    with pytest.raises(ValueError, match=r"tile_max must have shape \(2, 1\)"):
        choose(logits[:, :128].contiguous())
    with pytest.raises(ValueError, match="seeds must be torch.int64"):
        choose(seeds=state.seeds.int())
    with pytest.raises(ValueError, match=r"ring must have shape \(slots, at least 2\)"):
        choose(ring=state.ring[:, :1].contiguous())
    with pytest.raises(ValueError, match="ring must be contiguous int32"):
        choose(ring=state.ring[:, :2])
    table = torch.zeros(130, 8, device=device)
    with pytest.raises(ValueError, match="a row for each of 130 tokens"):
        choose(embedding=(table[:129], table[:2]))
    with pytest.raises(ValueError, match=r"stream must have shape \(2, 8\)"):
        choose(embedding=(table, table))
    with pytest.raises(ValueError, match=r"stream must be torch.float32"):
        choose(embedding=(table, table[:2].half()))
    assert state.tokens.tolist() == [-7, -7]


def test_saved_bytes():
    """One row of Qwen3's vocabulary in bfloat16."""
    assert FUSIONS["tile_stats"].saved_bytes(rows=1, vocab=151_936, element_bytes=2) == 303_872
    assert FUSIONS["choose_token"].saved_bytes(rows=1, vocab=151_936) == 8 * 151_936
