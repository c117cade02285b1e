"""Which cache block belongs to whom, and which blocks can be used again for an equal prefix."""

from __future__ import annotations

import hashlib
from itertools import islice

from engines.nano.sequence import Sequence


class BlockManager:
    """Hands out the blocks of the paged cache, `block_size` tokens each.

    A full block is known by the hash of its tokens *and all before them*, so equal hashes mean equal prefixes. A block
    that nobody owns any more stays findable by its hash until it is handed out anew; the one freed longest ago goes
    first.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.ref_counts = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.free: dict[int, None] = dict.fromkeys(range(num_blocks))  # an ordered set, oldest first

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks already holding a prefix of `sequence`, never all of it: one token must be left to compute."""
        if not self.prefix_caching:
            return []
        usable = (len(sequence) - 1) // self.block_size
        self._hash_up_to(sequence, usable)
        blocks = []
        for digest in sequence.block_hashes[:usable]:
            block = self.block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, sequence: Sequence) -> bool:
        """Give `sequence` blocks for all its tokens, reusing a cached prefix; False if there are not enough."""
        prefix = self.cached_prefix(sequence)
        if not self._suffices(sequence, prefix):
            return False
        for block in prefix:
            self.ref_counts[block] += 1
            self.free.pop(block, None)
        sequence.block_table = prefix + self._take(self.blocks_for(len(sequence)) - len(prefix))
        sequence.num_cached = len(prefix) * self.block_size
        return True

    def can_allocate(self, sequence: Sequence) -> bool:
        """Whether `allocate` would give it its blocks now."""
        return self._suffices(sequence, self.cached_prefix(sequence))

    def can_append(self, sequence: Sequence) -> bool:
        return len(sequence.block_table) * self.block_size >= len(sequence) or bool(self.free)

    def append(self, sequence: Sequence) -> None:
        """Make room for the newest token of `sequence`."""
        if len(sequence.block_table) * self.block_size < len(sequence):
            sequence.block_table += self._take(1)

    def append_ahead(self, sequences: list[Sequence]) -> bool:
        """Make room in each for one token more than it has yet; False, and nothing done, if there are not enough."""
        full = [s for s in sequences if len(s.block_table) * self.block_size == len(s)]
        if len(full) > len(self.free):
            return False
        for sequence, block in zip(full, self._take(len(full)), strict=True):
            sequence.block_table.append(block)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks that this step filled findable by their hashes; call once the step has run."""
        if not self.prefix_caching:
            return
        first = sequence.num_cached // self.block_size
        full = (sequence.num_cached + sequence.num_scheduled) // self.block_size
        if first == full:
            return
        self._hash_up_to(sequence, full)
        for index in range(first, full):
            digest, block = sequence.block_hashes[index], sequence.block_table[index]
            if digest not in self.block_of:  # two sequences may compute the same prefix in one step; the first stays
                self.block_of[digest] = block
                self.hash_of[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Take the blocks back; the tail goes first, since a prefix is worth more than what follows it."""
        for block in reversed(sequence.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
        sequence.block_table = []
        sequence.num_cached = 0

    def _suffices(self, sequence: Sequence, prefix: list[int]) -> bool:
        shared = sum(self.ref_counts[block] > 0 for block in prefix)
        return self.blocks_for(len(sequence)) - shared <= len(self.free)

    def _take(self, count: int) -> list[int]:
        """The `count` blocks freed longest ago, found in one go: the way to the first leads past all taken before."""
        blocks = list(islice(self.free, count))
        for block in blocks:
            del self.free[block]
            digest = self.hash_of[block]
            if digest is not None:
                del self.block_of[digest]
                self.hash_of[block] = None
            self.ref_counts[block] = 1
        return blocks

    def _hash_up_to(self, sequence: Sequence, num_blocks: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for index in range(len(hashes), num_blocks):
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            parent = hashes[-1] if hashes else b""
            hashes.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())
