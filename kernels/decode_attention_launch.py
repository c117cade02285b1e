"""How `decode_attention` is launched: what can be chosen, what every GPU can run, what is worth measuring."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels._triton import power_of_two
from kernels.choices import chosen_for, launch_of, rows_measured

MAX_SPLITS = 32
PART_ROWS = 512
"""Rows times splits of a launch with more than one split: bounds the workspace."""
SPLIT_TOKENS = 256
"""Part a context into pieces of at least about so many keys: merging the parts costs more than it gains below."""
FULL_PROGRAMS = 256
"""Split until about so many programs run: a large GPU's multiprocessors have one or two each."""
REGISTER_ROWS = 4
"""Up to here launches without tensor cores are tried, in types of 2 bytes."""
STREAMS = (
    (64, 2, 3, True), (32, 1, 7, True), (64, 2, 5, True), (32, 1, 3, True), (32, 1, 5, False), (32, 1, 7, False),
    (64, 2, 3, False), (128, 4, 5, False), (32, 1, 13, True), (64, 2, 7, True),
)  # fmt: skip
"""block_n, num_warps, num_stages and held of streams worth measuring; the first two also for the fewest rows. Of the
last two, with heads of 128, a multiprocessor holds no more than two programs: while large programs of the kernel before
fill some multiprocessors, those of this one cannot all move onto the others."""
SHORT_CONTEXT = 512
"""Tokens: where no context is longer, another launch may be the fastest, whatever it takes at long ones."""
SHORT_ROWS = 64
"""Of up to so many rows. With more, each program has a row's whole context anyway, short or long."""
MERGED_ELEMENTS = 64
"""Elements of all parts that a thread of the merging program holds in registers at most; in streams of one warp twice
as many."""


@dataclass(frozen=True)
class Launch:
    """A launch configuration.

    block_n: keys of a tile, a power of two
    splits: programs that share a row's context, a power of two, up to MAX_SPLITS
    piece: least keys of a split, a multiple of block_n
    dot: products on tensor cores; else piece is block_n
    num_stages: of the dot's software pipeline, where the look-up of the block takes half: 5 keep two tiles under way
    fragments: with dot, K and V straight into the registers from which tensor cores take them, in 1 or 2 programs that
        share the values' columns; then piece is block_n, 16 keys or more for each warp. 0: through shared memory
    heads: without dot, query heads of a program, a divisor of the group; 0: all that share the key/value head
    registers: at most so many for each thread, 0: any number. Programs start before the wait only where they fit beside
        those of the kernel before
    held: a stream's first tile is loaded into registers before the wait, the others as ever
    """

    block_n: int
    splits: int
    piece: int
    num_warps: int
    dot: bool
    num_stages: int = 1
    fragments: int = 0
    heads: int = 0
    registers: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        for name in ("block_n", "splits"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}.")
        if self.splits > MAX_SPLITS:
            raise ValueError(f"splits must be at most {MAX_SPLITS}, not {self.splits}.")
        if self.piece < 1 or self.piece % self.block_n:
            raise ValueError(f"piece must be a multiple of block_n, {self.block_n}, not {self.piece}.")
        if (self.fragments or not self.dot) and self.piece != self.block_n:
            raise ValueError(f"without dot or with fragments, piece must be block_n, {self.block_n}, not {self.piece}.")
        if self.held and (self.fragments or not self.dot):
            raise ValueError("held is for a stream; the other ways hold their first tile as it is.")
        if self.dot and self.heads:
            raise ValueError("heads are for launches without dot.")
        if self.fragments not in (0, 1, 2) or (self.fragments and not self.dot):
            raise ValueError(f"fragments must be 1 or 2, and dot true, or 0, not {self.fragments}.")
        if self.fragments and self.block_n < 16 * self.num_warps:
            raise ValueError(f"fragments need 16 keys for each of {self.num_warps} warps, not {self.block_n} in all.")


def block_d(head_dim: int) -> int:
    """Columns of a tile that holds a head: a power of two, 16 at least."""
    return max(16, power_of_two(head_dim))


def block_g(group: int) -> int:
    """Rows of a tile that holds a group of heads: a power of two."""
    return power_of_two(group)


def keys_at_once(num_warps: int, head_dim: int, element_bytes: int) -> int:
    """Of how many keys the program's threads load a half at once, 16 bytes each."""
    return max(1, 32 * num_warps * 16 // (block_d(head_dim) // 2 * element_bytes))


def _split_choices(rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, num_warps: int) -> list[int]:
    """Numbers of splits that the workspace, the merging program's registers and the longest context allow."""
    merged = block_g(heads // kv_heads) * block_d(head_dim)
    limit = min(MAX_SPLITS, PART_ROWS // rows, MERGED_ELEMENTS * 32 * num_warps // merged, max_context // SPLIT_TOKENS)
    return [splits for splits in (1, 2, 4, 8, 16, 32) if splits <= max(limit, 1)]


def default_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> Launch:
    """A launch that runs anywhere and should not be far off, from shapes alone."""
    many, group = rows * kv_heads >= FULL_PROGRAMS, heads // kv_heads
    num_warps = 1 if many and element_bytes == 2 else 4 if many or (group > 4 and element_bytes == 2) else 8
    wanted = max(1, FULL_PROGRAMS // (rows * kv_heads))
    choices = _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)
    splits = max(number for number in choices if number <= wanted)
    if element_bytes == 2 and (many or group > 4):
        block_n = (32 if many else 64) // (2 if block_d(head_dim) > 128 else 1)
        return Launch(block_n, splits, SPLIT_TOKENS, num_warps, True, 5)
    block_n = 4 * keys_at_once(num_warps, head_dim, element_bytes)
    apart = group > 4 or 2 * rows * heads <= FULL_PROGRAMS
    return Launch(block_n, splits, block_n, num_warps, False, heads=1 if apart else 0)


def candidates(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int = 2
) -> list[Launch]:
    """Launches worth measuring, the default among them."""
    found = [default_launch(rows, heads, kv_heads, head_dim, max_context, element_bytes)]

    def splits(num_warps: int) -> list[int]:
        return _split_choices(rows, heads, kv_heads, head_dim, max_context, num_warps)

    group = heads // kv_heads
    together = 1 < group <= 4 and 4 * rows * heads > FULL_PROGRAMS
    owns: tuple[int, ...] = (1, 0) if together else (1,)
    if rows > REGISTER_ROWS and element_bytes == 2:
        owns = ()
    for own in owns:
        programs = 2 * rows * (heads if own else kv_heads)
        for waves, num_warps, registers in ((8, 8, 0), (8, 8, 128), (8, 4, 0), (4, 8, 0)):
            block_n = waves * keys_at_once(num_warps, head_dim, element_bytes)
            for number in splits(num_warps):
                # Enough of them for long contexts, few enough to run at the same time.
                if FULL_PROGRAMS // 2 <= programs * number <= FULL_PROGRAMS:
                    found.append(Launch(block_n, number, block_n, num_warps, False, heads=own, registers=registers))
    if element_bytes != 2:
        return list(dict.fromkeys(found))

    for block_n, num_warps, parts, registers in ((256, 8, 2, 128), (256, 8, 1, 168), (128, 4, 1, 168)):
        programs = rows * kv_heads * parts
        for number in splits(num_warps):
            few = 2 * programs * number < FULL_PROGRAMS // 2 and number < splits(num_warps)[-1]
            if head_dim >= 64 * parts and not few and (number == 1 or programs * number <= FULL_PROGRAMS * 2):
                found.append(Launch(block_n, number, block_n, num_warps, True, fragments=parts, registers=registers))
    programs = rows * kv_heads
    for block_n, num_warps, num_stages, held in STREAMS[:2] if rows <= REGISTER_ROWS else STREAMS:
        # Of one warp, several programs share a multiprocessor, and the merging one finds registers for more parts.
        numbers = splits(max(2, num_warps))
        most = FULL_PROGRAMS * (4 if num_warps == 1 else 2)
        for number in numbers:
            few = programs * number < FULL_PROGRAMS // 2 and number < numbers[-1]
            if few or (number > 1 and programs * number > most):
                continue
            # Several programs share a short context, or only a longer one.
            for piece in sorted({SPLIT_TOKENS, max(block_n, SPLIT_TOKENS // number)}):
                found.append(Launch(block_n, number, piece, num_warps, True, num_stages, held=held))
    return list(dict.fromkeys(found))


def shape_key(rows: int, heads: int, kv_heads: int, head_dim: int, short: bool = False) -> str:
    """Under which a choice measured for so many rows is kept: the next number that is measured, and if contexts are
    short."""
    return f"{heads}/{kv_heads}x{head_dim} rows {rows_measured(rows)[0]}{' short' if short else ''}"


def best_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, max_context: int, element_bytes: int, device: torch.device
) -> Launch:
    """The launch measured fastest on this GPU, else the default."""
    shape = rows, heads, kv_heads, head_dim
    choice = None
    if element_bytes == 2:
        short = _measured(*shape, True, device) if max_context <= SHORT_CONTEXT else None
        choice = short or _measured(*shape, False, device)
    return choice or default_launch(*shape, max_context, element_bytes)


def has_short_launch(
    rows: int, heads: int, kv_heads: int, head_dim: int, element_bytes: int, device: torch.device
) -> bool:
    """Whether short contexts have a launch of their own on this GPU, unlike that of others."""
    if element_bytes != 2 or rows > SHORT_ROWS:
        return False
    short, other = (_measured(rows, heads, kv_heads, head_dim, kind, device) for kind in (True, False))
    return short is not None and short != other


def _measured(rows: int, heads: int, kv_heads: int, head_dim: int, short: bool, device: torch.device) -> Launch | None:
    entry = chosen_for(
        "decode_attention", rows, lambda count: shape_key(count, heads, kv_heads, head_dim, short), device
    )
    return None if entry is None else launch_of(Launch, entry["launch"], device)
