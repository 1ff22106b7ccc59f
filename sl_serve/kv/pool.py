"""Who holds which chunk of KV memory. Numbers only; the bytes are in host.py and resident.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sl_serve.core import Request


class Pool(Protocol):
    """Chunks 0 .. n_chunks - 1 of a memory, each free or held by one slab."""

    n_chunks: int

    @property
    def n_free(self) -> int: ...

    def fits(self, held: Sequence[int], n: int) -> bool:
        """Whether a slab that holds these chunks can have n more."""

    def grow(self, held: list[int], n: int) -> None:
        """Give it n more; they fit."""

    def give(self, chunk: int) -> None:
        """Take one back."""

    def check_integrity(self, held: Iterable[int]) -> None:
        """Every chunk is free or held, once. Called when idle and after tests."""


class ChunkPool:
    """Of host memory: any chunks do, since each crosses the link by a copy of its own."""

    def __init__(self, n_chunks: int) -> None:
        self.n_chunks = n_chunks
        self._free = list(reversed(range(n_chunks)))  # low ids first: touched memory is reused

    @property
    def n_free(self) -> int:
        return len(self._free)

    def fits(self, held: Sequence[int], n: int) -> bool:
        return n <= len(self._free)

    def grow(self, held: list[int], n: int) -> None:
        assert self.fits(held, n), "the caller checks first"
        held.extend(self._free.pop() for _ in range(n))

    def give(self, chunk: int) -> None:
        self._free.append(chunk)

    def check_integrity(self, held: Iterable[int]) -> None:
        _check_once(self._free, held, self.n_chunks)


class RunPool:
    """Of device memory: a slab's chunks lie side by side, so that attention reads them where they
    are as one tensor."""

    def __init__(self, n_chunks: int) -> None:
        self.n_chunks = n_chunks
        self._free = set(range(n_chunks))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def fits(self, held: Sequence[int], n: int) -> bool:
        return self._start(held, n) is not None

    def grow(self, held: list[int], n: int) -> None:
        start = self._start(held, n)
        assert start is not None, "the caller checks first"
        run = range(start, start + n)
        self._free.difference_update(run)
        held.extend(run)

    def give(self, chunk: int) -> None:
        self._free.add(chunk)

    def check_integrity(self, held: Iterable[int]) -> None:
        _check_once(self._free, held, self.n_chunks)

    def _start(self, held: Sequence[int], n: int) -> int | None:
        """Of n free chunks behind those that are held; the first that there are, if none is."""
        starts = [held[-1] + 1] if held else range(self.n_chunks - n + 1)
        return next((i for i in starts if self._free.issuperset(range(i, i + n))), None)


def _check_once(free: Iterable[int], held: Iterable[int], n_chunks: int) -> None:
    every = sorted([*free, *held])
    assert every == list(range(n_chunks)), f"chunks lost or doubled: {every}"


@dataclass(slots=True, eq=False)
class Slab:
    """`width` rows that share chunks: position p of every row lies in chunk p // positions."""

    slab_id: int
    width: int
    positions_per_chunk: int
    on_device: bool = False  # else in host memory
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
