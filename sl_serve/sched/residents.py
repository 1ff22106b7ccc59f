"""The rows that run: which request sits in which row of which slab, and with how much room.

Owner of slabs and of the chunk pool. All changes happen at step boundaries, on the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sl_serve.core import Request
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import ChunkPool, Slab

# Output room taken at admission, in tokens: a request without a limit does not reserve the whole
# context, and one that was just admitted does not ask for a chunk in its next step.
FIRST_STRETCH_TOKENS = 32
# What a request without max_tokens is expected to produce, to choose its slab's width.
TYPICAL_OUTPUT_TOKENS = 512


class Place(NamedTuple):
    slab: Slab
    row: int


def seniority(request: Request) -> tuple[int, int]:
    """Sorts the most deserving first; the last one is parked first."""
    return request.priority, request.sequence_no


class Residents:
    def __init__(self, spec: KVSpec, n_chunks: int, max_rows: int, max_slab_width: int) -> None:
        self.spec = spec
        self.max_rows = max_rows
        self.max_slab_width = max_slab_width
        self.pool = ChunkPool(n_chunks)
        self.slabs: dict[int, Slab] = {}
        self._places: dict[str, Place] = {}
        self._next_slab_id = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        """Oldest first."""
        return iter(sorted(self._requests(), key=seniority))

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._places

    def place(self, request: Request) -> Place:
        return self._places[request.request_id]

    def admit(self, request: Request, expected_tokens: int) -> bool:
        """Give the request a row with room for its tokens and a first stretch of output.

        `expected_tokens`: its probable final length, at most the context. False, and nothing
        changed, when rows or chunks are short.
        """
        if len(self) >= self.max_rows:
            return False
        width = self.spec.width_for(expected_tokens, self.max_slab_width)
        room = min(expected_tokens, request.n_tokens + FIRST_STRETCH_TOKENS)
        slab = self._best_slab(width, room)
        missing = slab.missing_chunks(room) if slab else -(-room // self.spec.positions(width))
        if missing > self.pool.n_free:
            return False
        slab = slab or self._open_slab(width)
        self._grow(slab, missing)
        row = slab.rows.index(None)
        slab.rows[row] = request
        self._places[request.request_id] = Place(slab, row)
        return True

    def make_room(self) -> list[Request]:
        """Grow every slab for the next step; park the youngest rows where chunks run short.

        Returns the parked requests, whose KV is forgotten (n_cached = 0); they are to be queued
        again and recompute the same tokens. The oldest row is parked only when it is alone, has
        grown far past its expected length, and needs a narrower slab, so work always ends.
        """
        parked: list[Request] = []
        while self._shortage() > self.pool.n_free:
            youngest = max(self._requests(), key=seniority)
            self.release(youngest)
            youngest.n_cached = 0
            parked.append(youngest)
        for slab in self.slabs.values():
            self._grow(slab, slab.missing_chunks(_longest(slab)))
        return parked

    def release(self, request: Request) -> None:
        """Free the request's row, and the chunks that no other row of its slab reaches."""
        slab, row = self._places.pop(request.request_id)
        slab.rows[row] = None
        keep = -(-_longest(slab) // slab.positions_per_chunk)
        while len(slab.chunks) > keep:
            self.pool.give(slab.chunks.pop())
        if not slab.requests:
            del self.slabs[slab.slab_id]

    @property
    def used_bytes(self) -> int:
        return (self.pool.n_chunks - self.pool.n_free) * self.spec.chunk_bytes

    def check_integrity(self) -> None:
        self.pool.check_integrity(c for s in self.slabs.values() for c in s.chunks)
        for request_id, (slab, row) in self._places.items():
            request = slab.rows[row]
            assert request is not None, f"row of {request_id} is empty"
            assert request.request_id == request_id, f"row of {request_id} is another's"
            assert self.slabs.get(slab.slab_id) is slab, f"slab of {request_id} is closed"
            assert request.n_cached <= slab.capacity_tokens, f"{request_id} overruns its slab"
        assert sum(len(s.requests) for s in self.slabs.values()) == len(self), "a row is orphaned"

    def _requests(self) -> list[Request]:
        return [r for s in self.slabs.values() for r in s.requests]

    def _shortage(self) -> int:
        return sum(s.missing_chunks(_longest(s)) for s in self.slabs.values())

    def _best_slab(self, width: int, room: int) -> Slab | None:
        """An open slab with a free row: the one that must grow least, then the fullest."""
        fitting = [s for s in self.slabs.values() if s.width == width and None in s.rows]
        return min(fitting, key=lambda s: (s.missing_chunks(room), -len(s.requests)), default=None)

    def _open_slab(self, width: int) -> Slab:
        slab = Slab(self._next_slab_id, width, self.spec.positions(width))
        self._next_slab_id += 1
        self.slabs[slab.slab_id] = slab
        return slab

    def _grow(self, slab: Slab, n_chunks: int) -> None:
        slab.chunks.extend(self.pool.take() for _ in range(n_chunks))


def _longest(slab: Slab) -> int:
    return max((r.n_tokens for r in slab.requests), default=0)
