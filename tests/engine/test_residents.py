from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import pytest

from sl_serve.core import Request, SamplingParams
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVSpec
from sl_serve.sched.residents import FIRST_STRETCH_TOKENS, Residents, seniority

CHUNK_TOKENS, N_CHUNKS, MAX_ROWS, MAX_WIDTH = 16, 16, 8, 4
# The longest request just fits alone, but not into a row of a wide slab (80 tokens): those that
# were expected to be short have to move to a narrower one.
SIMULATED_CHUNKS, LONGEST_TOKENS = 20, 250
SPEC = KVSpec(2, 1, 2, KV_FORMATS["float32"], CHUNK_TOKENS, "position")


def residents_of(n_chunks: int = N_CHUNKS, max_rows: int = MAX_ROWS) -> Residents:
    return Residents(SPEC, n_chunks, max_rows, MAX_WIDTH)


def ask(sequence_no: int, n_prompt: int, priority: int = 0) -> Request:
    request = Request(str(sequence_no), [0] * n_prompt, SamplingParams(), lambda _: None, priority)
    request.sequence_no = sequence_no
    return request


def grow(request: Request, n_tokens: int = 1) -> None:
    """As the engine does after a step: everything known is cached, new tokens are not."""
    request.n_cached = request.n_tokens
    request.output_ids += [0] * n_tokens


def state(residents: Residents) -> object:
    """Everything that admission may change."""
    slabs = [(s.slab_id, s.width, list(s.chunks), list(s.rows)) for s in residents.slabs.values()]
    return slabs, residents.pool.n_free, len(residents), residents.used_bytes


def short_rows(residents: Residents) -> list[str]:
    """Requests whose slab has no room for all tokens they know."""
    return [
        request.request_id
        for slab in residents.slabs.values()
        for request in slab.rows
        if request and len(slab.chunks) * (CHUNK_TOKENS // slab.width) < request.n_tokens
    ]


@dataclass
class Simulation:
    """The engine's turns without an engine: arrivals, growth, parking, endings, aborts."""

    seed: int
    residents: Residents = field(default_factory=lambda: residents_of(SIMULATED_CHUNKS, 12))
    waiting: list[Request] = field(default_factory=list)
    final_tokens: dict[str, int] = field(default_factory=dict)
    wrongly_parked: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    changed_by_refusal: list[str] = field(default_factory=list)
    mixed_slabs: list[int] = field(default_factory=list)
    n_parked: int = 0
    n_moved: int = 0
    n_refused: int = 0
    n_ended: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.widths: dict[int, int] = {}

    def run(self, n_requests: int, max_turns: int) -> None:
        arrivals = [self.arrival(i) for i in range(n_requests)]
        for _ in range(max_turns):
            if not (arrivals or self.waiting or len(self.residents)):
                return
            for _ in range(self.rng.choice((0, 0, 1, 4))):
                if arrivals:
                    self.waiting.append(arrivals.pop())
            self.turn()

    def arrival(self, number: int) -> Request:
        outgrows = number % 10 == 0
        any_length = self.rng.randint(1, LONGEST_TOKENS - 1)
        n_prompt = 3 if outgrows else self.rng.choice((1, 10, 30, any_length))
        request = ask(number, n_prompt, priority=self.rng.choice((0, 0, 0, -1, 1)))
        shortest = LONGEST_TOKENS if outgrows else n_prompt + 1
        self.final_tokens[request.request_id] = self.rng.randint(shortest, LONGEST_TOKENS)
        return request

    def turn(self) -> None:
        self.park()
        self.admit_waiting()
        for request in list(self.residents):
            self.step(request)

    def park(self) -> None:
        oldest = min(self.residents, key=seniority, default=None)
        widths = {r.request_id: self.residents.place(r).slab.width for r in self.residents}
        parked = self.residents.make_room()
        self.check()
        self.short += short_rows(self.residents)
        if oldest in parked:
            self.n_moved += 1
            alone_tokens = SIMULATED_CHUNKS * CHUNK_TOKENS // widths[oldest.request_id]
            if oldest.n_tokens <= alone_tokens:
                self.wrongly_parked.append(oldest.request_id)
        self.n_parked += len(parked)
        self.waiting += parked

    def admit_waiting(self) -> None:
        self.waiting.sort(key=seniority)
        while self.waiting:
            request = self.waiting[0]
            before = state(self.residents)
            if not self.residents.admit(request, self.expected_tokens(request)):
                self.n_refused += 1
                if state(self.residents) != before:
                    self.changed_by_refusal.append(request.request_id)
                return
            self.check()
            self.short += short_rows(self.residents)
            self.waiting.remove(request)

    def expected_tokens(self, request: Request) -> int:
        """Every fifth turns out longer than expected, as requests without a limit do."""
        final = self.final_tokens[request.request_id]
        expected = request.n_prompt + 10 if request.sequence_no % 5 == 0 else final
        return min(expected if request.n_tokens <= expected else 2 * request.n_tokens, final)

    def step(self, request: Request) -> None:
        if request.n_tokens - request.n_cached > 20 and self.rng.random() < 0.5:
            request.n_cached += 20  # a chunk of the prompt
            return
        grow(request)
        aborted = self.rng.random() < 0.01
        if aborted or request.n_tokens == self.final_tokens[request.request_id]:
            self.residents.release(request)
            self.n_ended += 1
            self.check()

    def check(self) -> None:
        self.residents.check_integrity()
        for slab in self.residents.slabs.values():
            if self.widths.setdefault(slab.slab_id, slab.width) != len(slab.rows):
                self.mixed_slabs.append(slab.slab_id)


N_REQUESTS = 80
SEEDS = range(5)


@cache
def simulated(seed: int) -> Simulation:
    simulation = Simulation(seed)
    simulation.run(N_REQUESTS, max_turns=5000)
    return simulation


@pytest.mark.parametrize("seed", SEEDS)
class TestSimulation:
    def test_it_is_tight_enough_to_park_and_to_refuse(self, seed: int) -> None:
        assert simulated(seed).n_parked > 10
        assert simulated(seed).n_refused > 10

    def test_every_request_ends(self, seed: int) -> None:
        assert simulated(seed).n_ended == N_REQUESTS

    def test_the_oldest_row_is_parked_only_when_it_has_outgrown_its_slab(self, seed: int) -> None:
        assert simulated(seed).n_moved > 0
        assert simulated(seed).wrongly_parked == []

    def test_rows_have_room_for_their_tokens_after_make_room_and_after_admission(
        self, seed: int
    ) -> None:
        assert simulated(seed).short == []

    def test_a_refused_admission_changes_nothing(self, seed: int) -> None:
        assert simulated(seed).changed_by_refusal == []

    def test_a_slab_keeps_its_width(self, seed: int) -> None:
        assert simulated(seed).mixed_slabs == []

    def test_nothing_is_left_when_all_have_ended(self, seed: int) -> None:
        residents = simulated(seed).residents
        assert (len(residents), residents.slabs, residents.used_bytes) == (0, {}, 0)
        assert residents.pool.n_free == residents.pool.n_chunks


def test_admission_takes_room_for_the_prompt_and_a_first_stretch() -> None:
    residents, request = residents_of(), ask(0, n_prompt=100)
    assert residents.admit(request, expected_tokens=200)
    slab, _ = residents.place(request)
    need = 100 + FIRST_STRETCH_TOKENS
    assert need <= slab.capacity_tokens < need + slab.positions_per_chunk


def test_admission_takes_no_more_room_than_the_request_will_need() -> None:
    residents, request = residents_of(), ask(0, n_prompt=40)
    assert residents.admit(request, expected_tokens=48)
    assert residents.place(request).slab.capacity_tokens == 48


def test_admission_is_refused_when_rows_are_short() -> None:
    residents = residents_of(max_rows=2)
    assert residents.admit(ask(0, 1), 2) and residents.admit(ask(1, 1), 2)
    before = state(residents)
    assert not residents.admit(ask(2, 1), 2)
    assert state(residents) == before


def test_admission_is_refused_when_chunks_are_short() -> None:
    residents = residents_of(n_chunks=7)
    assert residents.admit(ask(0, 4 * CHUNK_TOKENS), 4 * CHUNK_TOKENS)
    before = state(residents)
    assert not residents.admit(ask(1, 4 * CHUNK_TOKENS), 4 * CHUNK_TOKENS)
    assert state(residents) == before


def test_requests_of_unlike_length_get_slabs_of_unlike_width() -> None:
    residents = residents_of()
    short, long, also_short = ask(0, 4), ask(1, 60), ask(2, 4)
    for request in (short, long, also_short):
        assert residents.admit(request, request.n_tokens + 4)
    assert residents.place(short).slab is residents.place(also_short).slab
    assert residents.place(short).slab.width == 4
    assert residents.place(long).slab.width == 1


def test_a_free_row_is_used_before_a_slab_is_opened() -> None:
    residents = residents_of()
    requests = [ask(i, 4) for i in range(4)]
    assert all(residents.admit(r, 8) for r in requests)
    place = residents.place(requests[2])
    residents.release(requests[2])
    newcomer = ask(9, 4)
    assert residents.admit(newcomer, 8)
    assert residents.place(newcomer) == place


def test_release_returns_the_chunks_no_other_row_reaches() -> None:
    residents = residents_of()
    short, long = ask(0, 3), ask(1, 9)
    assert residents.admit(short, 12) and residents.admit(long, 12)
    assert residents.place(short).slab is residents.place(long).slab
    slab, _ = residents.place(short)
    first, *beyond = slab.chunks
    assert len(beyond) == 2
    residents.release(long)
    assert slab.chunks == [first]
    assert residents.pool.n_free == N_CHUNKS - 1
    residents.check_integrity()


def full_house() -> tuple[Residents, list[Request]]:
    """Four rows of width 1 that fill all chunks; the third is the least deserving."""
    residents = residents_of()
    requests = [ask(i, 4 * CHUNK_TOKENS, priority) for i, priority in enumerate((0, 0, 1, 0))]
    assert all(residents.admit(r, 4 * CHUNK_TOKENS) for r in requests)
    assert residents.pool.n_free == 0
    return residents, requests


def test_make_room_parks_nobody_while_all_fit() -> None:
    residents, requests = full_house()
    assert residents.make_room() == []
    assert list(residents) == [requests[0], requests[1], requests[3], requests[2]]


def test_make_room_parks_the_least_deserving_row_first() -> None:
    residents, requests = full_house()
    grow(requests[0])
    assert residents.make_room() == [requests[2]]
    assert requests[2] not in residents


def test_make_room_parks_as_many_as_it_takes() -> None:
    residents, requests = full_house()
    for request in requests:
        grow(request, 2 * CHUNK_TOKENS)
    assert residents.make_room() == [requests[2], requests[3]]
    assert short_rows(residents) == []


def test_a_lone_row_that_outgrows_its_slab_moves_to_a_narrower_one() -> None:
    residents, request = residents_of(n_chunks=4), ask(0, n_prompt=1)
    assert residents.admit(request, expected_tokens=8)
    assert residents.place(request).slab.width == MAX_WIDTH
    grow(request, CHUNK_TOKENS)  # four chunks hold 16 positions of four rows
    assert residents.make_room() == [request]
    assert residents.admit(request, expected_tokens=4 * CHUNK_TOKENS)
    grow(request, 4 * CHUNK_TOKENS - request.n_tokens)
    assert residents.make_room() == []
    assert residents.pool.n_free == 0


def test_a_parked_request_keeps_its_tokens_and_forgets_its_cache() -> None:
    residents, requests = full_house()
    grow(requests[2], 3)
    residents.make_room()
    assert (requests[2].n_tokens, requests[2].n_cached) == (4 * CHUNK_TOKENS + 3, 0)


def test_a_row_that_needs_its_own_chunk_may_be_the_one_that_is_parked() -> None:
    residents, requests = full_house()
    grow(requests[2])
    assert residents.make_room() == [requests[2]]
    residents.check_integrity()


def test_iteration_is_oldest_first_by_priority_then_arrival() -> None:
    residents = residents_of()
    order = [ask(3, 1, priority=-1), ask(0, 1), ask(2, 40), ask(1, 1, priority=4)]
    for i in (2, 0, 3, 1):
        assert residents.admit(order[i], order[i].n_tokens + 1)
    assert list(residents) == order


def lose_a_chunk(residents: Residents) -> None:
    residents.pool.grow([], 1)


def give_a_chunk_twice(residents: Residents) -> None:
    residents.pool.give(next(iter(residents.slabs.values())).chunks[0])


def empty_a_row(residents: Residents) -> None:
    slab, row = residents.place(next(iter(residents)))
    slab.rows[row] = None


def swap_rows(residents: Residents) -> None:
    slab = next(iter(residents.slabs.values()))
    slab.rows.reverse()


def close_a_slab(residents: Residents) -> None:
    slab = next(iter(residents.slabs.values()))
    residents.slabs[slab.slab_id + 100] = residents.slabs.pop(slab.slab_id)


def overrun_the_slab(residents: Residents) -> None:
    next(iter(residents)).n_cached = 1000


def orphan_a_row(residents: Residents) -> None:
    slab = next(iter(residents.slabs.values()))
    slab.rows[slab.rows.index(None)] = ask(77, 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_chunk, "chunks lost or doubled"),
        (give_a_chunk_twice, "chunks lost or doubled"),
        (empty_a_row, "row of .* is empty"),
        (swap_rows, "row of .* is"),
        (close_a_slab, "slab of .* is closed"),
        (overrun_the_slab, "overruns its slab"),
        (orphan_a_row, "a row is orphaned"),
    ],
)
def test_check_integrity_notices(damage: Callable[[Residents], None], words: str) -> None:
    residents = residents_of()
    assert all(residents.admit(ask(i, 4), 8) for i in range(2))
    residents.check_integrity()
    damage(residents)
    with pytest.raises(AssertionError, match=words):
        residents.check_integrity()


def test_used_bytes_count_the_chunks_that_are_held() -> None:
    residents = residents_of()
    for i in count():
        if not residents.admit(ask(i, 20), 30):
            break
        held = Counter(c for s in residents.slabs.values() for c in s.chunks)
        assert set(held.values()) == {1}
        assert residents.used_bytes == len(held) * SPEC.chunk_bytes
    assert len(residents) > 2
