"""Which tokens of which rows run in the next step, and in which sub-batch. A pure function.

Every row that decodes takes part with one token; rows that still have a prompt to read share the
step's prefill budget, oldest first, in chunks. Sub-batches are made of whole slabs, so that a
slab's KV prefix crosses the link once per step, and are balanced by tokens: the heaviest slab
goes to the lightest sub-batch (LPT; after MoE-Lightning's request balancing, arXiv 2411.11217)
whose device window has room for it, and which stays under the tokens that a sub-batch may have.
Slabs on the device, whose KV does not cross the link, have sub-batches of their own.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

from sl_serve.core import Request, RowWork, StepPlan, SubBatchPlan
from sl_serve.sched.residents import Residents


def pack(
    residents: Residents,
    prefill_budget_tokens: int,
    n_sub_batches: int,
    max_sub_batch_tokens: int,
    max_tokens: int = sys.maxsize,
    background_tokens: int = sys.maxsize,
) -> StepPlan:
    """Plan one step over the residents; empty when there are none. A sub-batch may have no fewer
    tokens than any slab. No more rows take part than a step may have: those of the background that
    were admitted last wait where interactive ones came beside them. Rows for which `max_tokens` of
    the step, at least one, leaves nothing wait for a later one; so do background rows where the
    step has `background_tokens` already."""
    works = _choose_rows(residents, prefill_budget_tokens, max_tokens, background_tokens)
    by_slab: dict[int, list[RowWork]] = defaultdict(list)
    for work in works:
        by_slab[work.slab].append(work)
    slabs = residents.slabs
    on_device = {i: w for i, w in by_slab.items() if slabs[i].on_device}
    on_host = {i: w for i, w in by_slab.items() if not slabs[i].on_device}
    n_device, n_host = _split(n_sub_batches, _n_all(on_device), _n_all(on_host))
    chunks = {i: len(slabs[i].chunks) for i in on_host}
    bins = _balance(on_device, n_device, dict.fromkeys(on_device, 0), 0, max_sub_batch_tokens)
    bins += _balance(on_host, n_host, chunks, residents.max_sub_batch_chunks, max_sub_batch_tokens)
    return StepPlan(tuple(SubBatchPlan(tuple(b)) for b in bins))


def _split(n_sub_batches: int, n_device_tokens: int, n_host_tokens: int) -> tuple[int, int]:
    """Sub-batches of slabs on the device and of slabs on the host: each kind has its own, in
    proportion to its tokens."""
    if not (n_device_tokens and n_host_tokens):
        return n_sub_batches, n_sub_batches
    share = n_device_tokens / (n_device_tokens + n_host_tokens)
    n_device = max(1, min(round(n_sub_batches * share), n_sub_batches - 1))
    return n_device, max(1, n_sub_batches - n_device)


def _balance(
    by_slab: Mapping[int, list[RowWork]],
    n_bins: int,
    chunks: Mapping[int, int],
    max_chunks: int,
    max_tokens: int,
) -> list[list[RowWork]]:
    """Slabs in n_bins bins, or in more where those would have too many chunks or tokens."""
    bins: list[list[RowWork]] = [[] for _ in range(min(n_bins, len(by_slab)))]
    loads, rooms = [0] * len(bins), [max_chunks] * len(bins)
    heaviest_first = sorted(by_slab.items(), key=lambda kv: (-_n_tokens(kv[1]), kv[0]))
    for slab_id, works in heaviest_first:
        n_tokens, n_chunks = _n_tokens(works), chunks[slab_id]
        having_room = [
            i
            for i, (load, room) in enumerate(zip(loads, rooms, strict=True))
            if room >= n_chunks and load + n_tokens <= max_tokens
        ]
        if not having_room:
            having_room = [len(bins)]
            bins.append([])
            loads.append(0)
            rooms.append(max_chunks)
        lightest = min(having_room, key=lambda i: loads[i])
        bins[lightest].extend(works)
        loads[lightest] += n_tokens
        rooms[lightest] -= n_chunks
    return bins


def _n_all(by_slab: Mapping[int, list[RowWork]]) -> int:
    return sum(map(_n_tokens, by_slab.values()))


def _choose_rows(
    residents: Residents, prefill_budget_tokens: int, max_tokens: int, background_tokens: int
) -> list[RowWork]:
    works: list[RowWork] = []
    left, room = prefill_budget_tokens, max_tokens
    for request in residents:  # interactive ones first, the oldest of each first
        if len(works) == residents.max_rows:
            break
        if request.is_background:
            room = min(room, max(0, background_tokens - _n_tokens(works)))
        remaining = request.n_tokens - request.n_cached
        n_new = min(1 if remaining == 1 else min(remaining, left), room)
        if n_new == 0:
            continue
        if remaining > 1:
            left -= n_new
        room -= n_new
        works.append(_row_work(residents, request, n_new))
    return works


def _row_work(residents: Residents, request: Request, n_new: int) -> RowWork:
    slab, row = residents.place(request)
    start = request.n_cached
    samples = start + n_new == request.n_tokens
    return RowWork(request, slab.slab_id, row, start, n_new, samples)


def _n_tokens(works: Iterable[RowWork]) -> int:
    return sum(w.n_new for w in works)
