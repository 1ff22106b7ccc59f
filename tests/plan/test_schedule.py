"""Against the packer itself, over rows that the residents hold."""

from __future__ import annotations

from collections import deque
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sl_serve.core import Request, SamplingParams
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.kv.layout import KVSpec
from sl_serve.plan import schedule
from sl_serve.plan.placement import Workload
from sl_serve.plan.schedule import decode_step, prefill_step, steps_of
from sl_serve.sched.packer import pack
from sl_serve.sched.residents import Residents

FIELDS = ("n_decode", "n_prefill", "n_samples", "n_rows", "prefix_tokens", "attended_tokens")


def play(workload: Workload, n_rows: int, budget: int) -> list[tuple[int, ...]]:
    """FIELDS of every step, as the engine would make them."""
    spec = KVSpec(1, 1, 4, KV_FORMATS["float32"], chunk_tokens=16, order="row")
    residents = Residents(spec, 10_000, n_rows, max_slab_width=1)
    waiting = deque(
        Request(str(i), [0] * workload.prompt_tokens, SamplingParams(), print, sequence_no=i)
        for i in range(workload.n_requests)
    )
    steps = []
    while waiting or len(residents):
        assert not residents.make_room()
        while waiting and residents.admit(waiting[0], workload.total_tokens):
            waiting.popleft()
        works = [w for s in pack(residents, budget, 1, 1 << 30).sub_batches for w in s.rows]
        decoding = [w for w in works if w.start >= workload.prompt_tokens]
        steps.append(
            (
                len(decoding),
                sum(w.n_new for w in works) - len(decoding),
                sum(w.samples for w in works),
                len(works),
                sum(w.start for w in works),
                sum(sum(range(w.start + 1, w.stop + 1)) for w in works),
            )
        )
        for work in works:
            request = work.request
            request.n_cached = work.stop
            if work.samples:
                request.output_ids.append(0)
                if len(request.output_ids) == workload.output_tokens:
                    residents.release(request)
    return steps


# Even prompts and budgets: a prompt's last single token does not count against the packer's budget.
EVEN = st.integers(1, 30).map(lambda n: 2 * n)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.builds(Workload, EVEN, st.integers(1, 12), st.integers(1, 20)), st.integers(1, 8), EVEN)
def test_every_step_is_the_packers(workload: Workload, n_rows: int, budget: int) -> None:
    played = play(workload, n_rows, budget)
    n = min(workload.n_requests, schedule.MAX_ROUNDS * min(n_rows, workload.n_requests))
    if n < workload.n_requests:
        played = play(Workload(workload.prompt_tokens, workload.output_tokens, n), n_rows, budget)
    with mock.patch.object(schedule, "MAX_STEPS", 10_000):
        found = steps_of(workload, n_rows, budget)
    expected = np.array(played, dtype=float).T
    for name, values in zip(FIELDS, expected, strict=True):
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
    assert found.n_repeats == pytest.approx(workload.n_requests / n)


def test_a_schedule_by_hand() -> None:
    # Two rows, prompts of 4, 6 tokens of prompt per step, 2 outputs, 3 requests:
    #   step 0 reads 4 + 2, step 1 the other 2 (the third has no row yet) and decodes the first,
    #   step 2 reads the third's 4 and decodes the second, step 3 decodes the third.
    steps = steps_of(Workload(4, 2, 3), n_rows=2, prefill_tokens=6)
    assert steps.n_prefill.tolist() == [6, 2, 4, 0]
    assert steps.n_decode.tolist() == [0, 1, 1, 1]
    assert steps.n_samples.tolist() == [1, 2, 2, 1]
    assert steps.prefix_tokens.tolist() == [0, 2 + 4, 4, 4]
    assert steps.attended_tokens.tolist() == [10 + 3, 7 + 5, 10 + 5, 5]


def test_long_schedules_are_thinned_without_losing_work(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(50, 333, 7)
    whole = steps_of(workload, 3, 16)
    monkeypatch.setattr(schedule, "MAX_STEPS", 10)
    thin = steps_of(workload, 3, 16)
    assert len(thin.n_repeats) <= 10 < len(whole.n_repeats)
    for name in FIELDS:
        total = (getattr(whole, name) * whole.n_repeats).sum()
        assert (getattr(thin, name) * thin.n_repeats).sum() == pytest.approx(total)
    assert thin.n_repeats.sum() == pytest.approx(whole.n_repeats.sum())


def test_pure_steps() -> None:
    decode = decode_step(Workload(100, 20, 8), n_rows=8)
    assert decode.prefix_tokens.tolist() == [8 * 110]
    assert decode.n_samples.tolist() == [8]
    prefill = prefill_step(Workload(100, 20, 8), n_tokens=200)
    assert prefill.attended_tokens.tolist() == [2 * 5050]
    assert prefill.n_samples.tolist() == [2]
