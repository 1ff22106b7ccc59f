"""Which tokens of which rows run in the next step, and in which sub-batch. A pure function.

Every row that decodes takes part with one token; rows that still have a prompt to read share the
step's prefill budget, oldest first, in chunks. Sub-batches are made of whole slabs, so that a
slab's KV prefix crosses the link once per step, and are balanced by tokens: the heaviest slab
goes to the lightest sub-batch (LPT; after MoE-Lightning's request balancing, arXiv 2411.11217).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sl_serve.core import Request, RowWork, StepPlan, SubBatchPlan
from sl_serve.sched.residents import Residents


def pack(residents: Residents, prefill_budget_tokens: int, n_sub_batches: int) -> StepPlan:
    """Plan one step over the residents; empty when there are none."""
    works = _choose_rows(residents, prefill_budget_tokens)
    by_slab: dict[int, list[RowWork]] = defaultdict(list)
    for work in works:
        by_slab[work.slab].append(work)
    bins: list[list[RowWork]] = [[] for _ in range(min(n_sub_batches, len(by_slab)))]
    loads = [0] * len(bins)
    heaviest_first = sorted(by_slab.items(), key=lambda kv: (-_n_tokens(kv[1]), kv[0]))
    for _, slab_works in heaviest_first:
        lightest = loads.index(min(loads))
        bins[lightest].extend(slab_works)
        loads[lightest] += _n_tokens(slab_works)
    return StepPlan(tuple(SubBatchPlan(tuple(b)) for b in bins))


def _choose_rows(residents: Residents, prefill_budget_tokens: int) -> list[RowWork]:
    works = []
    left = prefill_budget_tokens
    for request in residents:  # oldest first
        remaining = request.n_tokens - request.n_cached
        if remaining == 1:
            works.append(_row_work(residents, request, 1))
        elif left > 0:
            n_new = min(remaining, left)
            left -= n_new
            works.append(_row_work(residents, request, n_new))
    return works


def _row_work(residents: Residents, request: Request, n_new: int) -> RowWork:
    slab, row = residents.place(request)
    start = request.n_cached
    samples = start + n_new == request.n_tokens
    return RowWork(request, slab.slab_id, row, start, n_new, samples)


def _n_tokens(works: Iterable[RowWork]) -> int:
    return sum(w.n_new for w in works)
