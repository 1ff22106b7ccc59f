"""The rows that run: which request sits in which row of which slab, and with how much room.

A slab lies in host memory, or, where the plan has room for some, on the device. There its chunks
must be side by side, so a row gets room for all that it is expected to become, and rows that
outgrow it go to the host by way of the queue.

Owner of slabs and of the chunk pools. All changes happen at step boundaries, on the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sl_serve.core import BACKGROUND_PRIORITY, Request
from sl_serve.kv.layout import KVSpec
from sl_serve.kv.pool import ChunkPool, Pool, RunPool, Slab

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
    def __init__(
        self,
        spec: KVSpec,
        n_chunks: int,
        max_rows: int,
        max_slab_width: int,
        n_device_chunks: int = 0,
        max_sub_batch_chunks: int | None = None,
    ) -> None:
        """`n_device_chunks`: beside the host's n_chunks. `max_sub_batch_chunks`: of the host's,
        what a sub-batch may touch, and so the most that a slab may have; None: any number."""
        self.spec = spec
        self.max_rows = max_rows
        self.max_slab_width = max_slab_width
        self.max_sub_batch_chunks = max_sub_batch_chunks or n_chunks
        self.pool = ChunkPool(n_chunks)
        self.device_pool = RunPool(n_device_chunks)
        self.slabs: dict[int, Slab] = {}
        self._places: dict[str, Place] = {}
        self._next_slab_id = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        """Oldest first."""
        return iter(sorted(self._requests(), key=seniority))

    @property
    def has_waiting_prompt(self) -> bool:
        """An interactive row's, to be read or read on."""
        return any(not r.is_background and r.n_tokens - r.n_cached > 1 for r in self._requests())

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._places

    def place(self, request: Request) -> Place:
        return self._places[request.request_id]

    def admit(self, request: Request, expected_tokens: int) -> bool:
        """Give the request a row with room for its tokens and a first stretch of output.

        `expected_tokens`: its probable final length, at most the context. False, and nothing
        changed, when rows or chunks are short. Rows of the background that may not take part in
        steps for a while are no reason: they keep their KV meanwhile.
        """
        others = self._requests()
        if not request.is_background:
            others = [r for r in others if not r.is_background]
        if len(others) >= self.max_rows:
            return False
        width = self.spec.width_for(expected_tokens, self.max_slab_width)
        stretch = min(expected_tokens, request.n_tokens + FIRST_STRETCH_TOKENS)
        return self._admit_to(True, request, width, expected_tokens) or self._admit_to(
            False, request, width, stretch
        )

    def _admit_to(self, on_device: bool, request: Request, width: int, room: int) -> bool:
        pool = self._pool(on_device)
        slab = self._best_slab(on_device, width, room)
        missing = slab.missing_chunks(room) if slab else -(-room // self.spec.positions(width))
        if not pool.fits(slab.chunks if slab else [], missing):
            return False
        slab = slab or self._open_slab(on_device, width)
        pool.grow(slab.chunks, missing)
        row = slab.rows.index(None)
        slab.rows[row] = request
        self._places[request.request_id] = Place(slab, row)
        return True

    def make_room(self) -> list[Request]:
        """Grow every slab for the next step; park the youngest rows where chunks run short.

        Returns the parked requests, whose KV is forgotten (n_cached = 0); they are to be queued
        again and recompute the same tokens. The oldest row is parked only when it has grown far
        past its expected length and needs another slab, so work always ends.
        """
        parked = [r for slab in list(self.slabs.values()) for r in self._park_outgrown(slab)]
        while self._shortage() > self.pool.n_free:
            youngest = max((r for s in self._host_slabs() for r in s.requests), key=seniority)
            parked.append(self._park(youngest))
        for slab in self.slabs.values():
            self._pool(slab.on_device).grow(slab.chunks, slab.missing_chunks(_longest(slab)))
        return parked

    def give_way(self, request: Request) -> Request | None:
        """Park the youngest background row, if the request is of a better priority."""
        worst = max(BACKGROUND_PRIORITY, request.priority + 1)
        worse = (r for r in self._requests() if r.priority >= worst)
        youngest = max(worse, key=seniority, default=None)
        return None if youngest is None else self._park(youngest)

    def _park_outgrown(self, slab: Slab) -> list[Request]:
        """Rows for which their slab cannot grow, however much memory there is."""
        if slab.on_device:
            missing = slab.missing_chunks(_longest(slab))
            most = slab.capacity_tokens
            if self.device_pool.fits(slab.chunks, missing):
                return []
        else:
            most = self.max_sub_batch_chunks * slab.positions_per_chunk
        return [self._park(r) for r in slab.requests if r.n_tokens > most]

    def _park(self, request: Request) -> Request:
        self.release(request)
        request.n_cached = 0
        return request

    def release(self, request: Request) -> None:
        """Free the request's row, and the chunks that no other row of its slab reaches."""
        slab, row = self._places.pop(request.request_id)
        slab.rows[row] = None
        keep = -(-_longest(slab) // slab.positions_per_chunk)
        if slab.on_device and slab.requests:
            keep = len(slab.chunks)  # room that the others were promised
        while len(slab.chunks) > keep:
            self._pool(slab.on_device).give(slab.chunks.pop())
        if not slab.requests:
            del self.slabs[slab.slab_id]

    @property
    def used_bytes(self) -> int:
        pools: tuple[Pool, ...] = (self.pool, self.device_pool)
        return sum(p.n_chunks - p.n_free for p in pools) * self.spec.chunk_bytes

    def check_integrity(self) -> None:
        for on_device in (False, True):
            slabs = (s for s in self.slabs.values() if s.on_device is on_device)
            self._pool(on_device).check_integrity(c for s in slabs for c in s.chunks)
        for request_id, (slab, row) in self._places.items():
            request = slab.rows[row]
            assert request is not None, f"row of {request_id} is empty"
            assert request.request_id == request_id, f"row of {request_id} is another's"
            assert self.slabs.get(slab.slab_id) is slab, f"slab of {request_id} is closed"
            assert request.n_cached <= slab.capacity_tokens, f"{request_id} overruns its slab"
        assert sum(len(s.requests) for s in self.slabs.values()) == len(self), "a row is orphaned"

    def _requests(self) -> list[Request]:
        return [r for s in self.slabs.values() for r in s.requests]

    def _pool(self, on_device: bool) -> Pool:
        return self.device_pool if on_device else self.pool

    def _host_slabs(self) -> list[Slab]:
        return [s for s in self.slabs.values() if not s.on_device]

    def _shortage(self) -> int:
        return sum(s.missing_chunks(_longest(s)) for s in self._host_slabs())

    def _best_slab(self, on_device: bool, width: int, room: int) -> Slab | None:
        """An open slab with a free row that can grow enough: the one that must grow least, then
        the fullest."""
        pool = self._pool(on_device)
        fitting = [
            s
            for s in self.slabs.values()
            if s.on_device is on_device
            and s.width == width
            and None in s.rows
            and pool.fits(s.chunks, s.missing_chunks(room))
        ]
        return min(fitting, key=lambda s: (s.missing_chunks(room), -len(s.requests)), default=None)

    def _open_slab(self, on_device: bool, width: int) -> Slab:
        slab = Slab(self._next_slab_id, width, self.spec.positions(width), on_device)
        self._next_slab_id += 1
        self.slabs[slab.slab_id] = slab
        return slab


def _longest(slab: Slab) -> int:
    return max((r.n_tokens for r in slab.requests), default=0)
