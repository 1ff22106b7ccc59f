from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.core import Request, RowWork, SamplingParams, StepPlan
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVSpec
from sl_serve.sched.packer import pack
from sl_serve.sched.residents import Residents

FEW = settings(derandomize=True, max_examples=80, deadline=None)
UNBOUNDED = 1 << 30
SPEC = KVSpec(1, 1, 1, KV_FORMATS["float32"], chunk_tokens=16, order="position")


class Row(NamedTuple):
    n_prompt: int
    n_output: int
    cached: int  # modulo the row's tokens
    expected_tokens: int  # chooses the slab's width
    priority: int


class Case(NamedTuple):
    rows: list[Row]
    budget_tokens: int
    n_sub_batches: int

    def residents(self) -> Residents:
        residents = Residents(SPEC, n_chunks=2000, max_rows=64, max_slab_width=4)
        for i, row in enumerate(self.rows):
            request = Request(
                str(i), [0] * row.n_prompt, SamplingParams(), lambda _: None, row.priority
            )
            request.output_ids = [0] * row.n_output
            request.n_cached = row.cached % request.n_tokens
            request.sequence_no = i
            assert residents.admit(request, max(row.expected_tokens, request.n_tokens))
        return residents


# Half of the rows decode: one token short of everything cached.
ROWS = st.builds(
    Row,
    n_prompt=st.integers(1, 40),
    n_output=st.integers(0, 4),
    cached=st.one_of(st.just(-1), st.integers(0, 43)),
    expected_tokens=st.integers(1, 80),
    priority=st.integers(0, 1),
)
CASES = st.builds(
    Case,
    rows=st.lists(ROWS, max_size=24),
    budget_tokens=st.integers(0, 120),
    n_sub_batches=st.integers(1, 5),
)


def packed(case: Case) -> tuple[Residents, StepPlan]:
    residents = case.residents()
    return residents, pack(residents, case.budget_tokens, case.n_sub_batches, UNBOUNDED)


def works_of(plan: StepPlan) -> dict[str, RowWork]:
    works = [w for s in plan.sub_batches for w in s.rows]
    assert max(Counter(w.request.request_id for w in works).values(), default=1) == 1
    return {w.request.request_id: w for w in works}


def n_missing(request: Request) -> int:
    return request.n_tokens - request.n_cached


@FEW
@given(CASES)
def test_every_row_that_decodes_takes_part_with_one_token(case: Case) -> None:
    residents, plan = packed(case)
    works = works_of(plan)
    decoding = [r for r in residents if n_missing(r) == 1]
    assert [works[r.request_id].n_new for r in decoding] == [1] * len(decoding)


@FEW
@given(CASES)
def test_the_prefill_budget_is_spent_on_the_oldest_first(case: Case) -> None:
    residents, plan = packed(case)
    works, left = works_of(plan), case.budget_tokens
    for request in sorted(residents, key=lambda r: (r.priority, r.sequence_no)):
        if n_missing(request) > 1:
            given_tokens = min(n_missing(request), left)
            work = works.get(request.request_id)
            assert (work.n_new if work else 0) == given_tokens
            left -= given_tokens


@FEW
@given(CASES)
def test_a_row_samples_when_it_reaches_its_last_known_token_and_only_then(case: Case) -> None:
    _, plan = packed(case)
    for work in works_of(plan).values():
        assert work.samples == (work.stop == work.request.n_tokens)


@FEW
@given(CASES)
def test_work_starts_behind_what_is_cached_in_the_row_the_request_sits_in(case: Case) -> None:
    residents, plan = packed(case)
    for work in works_of(plan).values():
        assert work.start == work.request.n_cached
        assert residents.slabs[work.slab].rows[work.row] is work.request


@FEW
@given(CASES)
def test_no_slab_is_split_over_sub_batches(case: Case) -> None:
    _, plan = packed(case)
    slabs = [{w.slab for w in s.rows} for s in plan.sub_batches]
    assert sum(map(len, slabs)) == len(set().union(*slabs))


@FEW
@given(CASES)
def test_there_are_as_many_sub_batches_as_asked_for_unless_slabs_run_short(case: Case) -> None:
    _, plan = packed(case)
    n_slabs = len({w.slab for w in works_of(plan).values()})
    assert len(plan.sub_batches) == min(case.n_sub_batches, n_slabs)
    assert all(s.rows for s in plan.sub_batches)


@FEW
@given(CASES)
def test_sub_batches_differ_by_the_largest_slab_at_most(case: Case) -> None:
    _, plan = packed(case)
    tokens_of_slab: Counter[int] = Counter()
    for work in works_of(plan).values():
        tokens_of_slab[work.slab] += work.n_new
    loads = [s.n_tokens for s in plan.sub_batches] or [0]
    assert max(loads) - min(loads) <= max(tokens_of_slab.values(), default=0)


@FEW
@given(CASES, st.integers(0, 20))
def test_no_sub_batch_has_more_tokens_than_it_may(case: Case, more: int) -> None:
    """There are more of them instead, none of which two could be one."""
    residents, free = packed(case)
    tokens_of_slab: Counter[int] = Counter()
    for work in works_of(free).values():
        tokens_of_slab[work.slab] += work.n_new
    most = max(tokens_of_slab.values(), default=0) + more
    plan = pack(residents, case.budget_tokens, case.n_sub_batches, most)
    assert {w.request.request_id for s in plan.sub_batches for w in s.rows} == set(works_of(free))
    loads = sorted(s.n_tokens for s in plan.sub_batches)
    assert max(loads, default=0) <= most
    if len(loads) > len(free.sub_batches):
        assert sum(loads[:2]) > most
    elif max((s.n_tokens for s in free.sub_batches), default=0) <= most:
        assert plan == free


@FEW
@given(CASES)
def test_the_same_residents_give_the_same_plan(case: Case) -> None:
    def summary(plan: StepPlan) -> list[list[tuple[str, int, int, int, int]]]:
        return [
            [(w.request.request_id, w.slab, w.row, w.start, w.n_new) for w in s.rows]
            for s in plan.sub_batches
        ]

    residents, plan = packed(case)
    again = pack(residents, case.budget_tokens, case.n_sub_batches, UNBOUNDED)
    assert summary(again) == summary(plan) == summary(packed(case)[1])


def test_the_heaviest_slab_is_placed_first() -> None:
    wide = [Row(8, 0, -1, 8, priority=1)] * 4  # one slab of four rows, the youngest
    narrow = [Row(60, 0, -1, 60, priority=0)] * 4  # four slabs of one
    _, plan = packed(Case(narrow + wide, 0, 2))
    assert [s.n_tokens for s in plan.sub_batches] == [4, 4]


def test_background_rows_take_what_an_interactive_prompt_leaves() -> None:
    """Four rows: a step as long as one in which all decode, or as the prompt is."""
    decoding = Row(5, 1, -1, 10, priority=1)
    for n_prompt, expected in ((1, 4), (3, 4), (4, 4), (9, 9)):
        rows = [decoding, decoding, Row(30, 0, 0, 40, priority=1), Row(n_prompt, 0, 0, 20, 0)]
        residents = Case(rows, 100, 1).residents()
        plan = pack(residents, 100, 1, UNBOUNDED, background_tokens=len(rows))
        works = works_of(plan)
        assert works["3"].n_new == n_prompt
        assert sum(w.n_new for w in works.values()) == expected
        assert works.keys() >= ({"0", "1"} if n_prompt < 3 else set())


def test_nobody_to_run_gives_an_empty_plan() -> None:
    _, plan = packed(Case([], 100, 3))
    assert plan == StepPlan(())
