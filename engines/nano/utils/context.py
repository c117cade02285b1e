"""What attention must know of the running step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class StepContext:
    """Where the step's tokens stand in their sequences and in the paged cache.

    slot_mapping  [tokens] int32: cache slot (block × block size + offset) of each token; -1 writes nothing
    cu_seqlens_q  [sequences + 1] int32: where each sequence's new tokens start
    seqlens_k     [sequences] int32: tokens in the cache after this step
    block_tables  [sequences, blocks] int32
    max_seqlen_q, max_seqlen_k: host-side upper bounds (in a graph: of every replay)
    cu_seqlens_k  [sequences + 1] int32 where no sequence has earlier tokens, so that keys need not come from the
                  cache; else None
    last_tokens   [sequences] int64: row of each sequence's last new token, the one to sample from; None: every row
    """

    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    cu_seqlens_k: Tensor | None = None
    last_tokens: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        return self.max_seqlen_q == 1
