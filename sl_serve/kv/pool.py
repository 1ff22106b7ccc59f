"""Who holds which chunk of KV memory. Numbers only; the bytes are in store.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sl_serve.core import Request


class ChunkPool:
    """Chunks 0 .. n_chunks - 1 of the KV store, each free or held by one slab."""

    def __init__(self, n_chunks: int) -> None:
        self.n_chunks = n_chunks
        self._free = list(reversed(range(n_chunks)))  # low ids first: touched memory is reused

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        assert self._free, "the caller checks n_free first"
        return self._free.pop()

    def give(self, chunk: int) -> None:
        self._free.append(chunk)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every chunk is free or held, once. Called when idle and after tests."""
        every = sorted([*self._free, *held])
        assert every == list(range(self.n_chunks)), f"chunks lost or doubled: {every}"


@dataclass(slots=True, eq=False)
class Slab:
    """`width` rows that share chunks: position p of every row lies in chunk p // positions."""

    slab_id: int
    width: int
    positions_per_chunk: int
    chunks: list[int] = field(default_factory=list)
    rows: list[Request | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [None] * self.width

    @property
    def capacity_tokens(self) -> int:
        return len(self.chunks) * self.positions_per_chunk

    @property
    def requests(self) -> list[Request]:
        return [r for r in self.rows if r is not None]

    def missing_chunks(self, n_tokens: int) -> int:
        """Chunks to add before rows of `n_tokens` fit."""
        return max(0, -(-n_tokens // self.positions_per_chunk) - len(self.chunks))
