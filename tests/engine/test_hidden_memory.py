"""What hidden states take of a device, and when they are swapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve.core import Request
from sl_serve.device import SimDevice
from sl_serve.errors import MemoryBudgetError
from sl_serve.hidden import ResidentHidden, SwappedHidden
from sl_serve.loader import Parts, load
from sl_serve.ops import device_ops
from sl_serve.plan.activations import PeakBytes
from sl_serve.plan.fit import _Fit
from sl_serve.plan.kv_size import MARGIN_SHARE
from sl_serve.plan.memory import MemoryPlan
from sl_serve.sched.packer import pack
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from tests.engine.running import GREEDY, config, engine, run, steps_of
from tests.engine.swapping import N_ROWS, PROMPTS, SHORT, on_the_processor_alone, settings_of, swap
from tests.models import write_tiny_llama

pytestmark = pytest.mark.usefixtures("layers_measured_once")
SPARE = 4  # prompt tokens of a step: sub-batches of 14 / 7 rows are small beside the step


def planned(folder: Path, device_bytes: int, **changes: object) -> MemoryPlan | None:
    """None where it does not fit."""
    settings = replace(settings_of(7, chunk=SPARE), device="sim", device_memory_bytes=device_bytes)
    checkpoint = open_checkpoint(folder)
    try:
        return plan_checkpoint(checkpoint, replace(settings, **changes))  # type: ignore[arg-type]
    except MemoryBudgetError:
        return None
    finally:
        checkpoint.close()


def least(fits: Callable[[int], bool], high: int, low: int = 0) -> int:
    """The smallest number in (low, high] that fits; low does not, high does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def swaps(plan: MemoryPlan | None) -> bool:
    return plan is not None and plan.swaps_hidden


@pytest.fixture(scope="module")
def flip_bytes(folder: Path) -> int:
    """The least device memory in which nothing is swapped and all KV has windows."""
    enough = 4 << 20
    whole = planned(folder, enough)
    assert whole is not None and not whole.swaps_hidden

    def fits(n_bytes: int) -> bool:
        found = planned(folder, n_bytes)
        return found is not None and not swaps(found) and found.kv_bytes == whole.kv_bytes

    return least(fits, enough)


def test_states_are_swapped_only_where_they_would_not_fit(
    folder: Path, flip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = planned(folder, flip_bytes - 1), planned(folder, flip_bytes)
    assert before is not None and after is not None
    assert (before.swaps_hidden, after.swaps_hidden) == (True, False)
    line_bytes = 64 * 4
    step, of_sub_batch = N_ROWS + SPARE, N_ROWS // 7 + SPARE
    assert (before.max_step_tokens, before.max_sub_batch_tokens) == (step, of_sub_batch)
    assert before.hidden_host_bytes == step * line_bytes
    assert before.hidden_bytes == (step + 2 * of_sub_batch) * line_bytes
    assert after.hidden_bytes == after.hidden_host_bytes == 0
    assert after.workspace_bytes == before.workspace_bytes + step * line_bytes
    assert all(p.device_bytes <= (p.device_available_bytes or 0) for p in (before, after))
    names = [[name for name, _, _ in p.table()] for p in (before, after)]
    assert ["hidden states" in n for n in names] == [True, False]
    assert sum(n for _, n, _ in before.table()) == before.total_bytes
    assert before.kv_bytes == after.kv_bytes
    monkeypatch.setattr(_Fit, "may_swap_hidden", False)
    staying = planned(folder, flip_bytes - 1)
    assert staying is None or staying.kv_bytes < before.kv_bytes
    assert without_what_is_free(planned(folder, flip_bytes)) == without_what_is_free(after)


def without_what_is_free(plan: MemoryPlan | None) -> MemoryPlan:
    """On this machine, which others use too."""
    assert plan is not None
    return replace(plan, available_bytes=0)


def test_least_of_all_is_needed_where_they_are_swapped(
    folder: Path, flip_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what two sub-batches take less than the step."""
    smallest = least(lambda n: planned(folder, n) is not None, flip_bytes)
    monkeypatch.setattr(_Fit, "may_swap_hidden", False)
    staying = least(lambda n: planned(folder, n) is not None, flip_bytes)
    saved = (N_ROWS + SPARE - 2 * (N_ROWS // 7 + SPARE)) * 64 * 4
    assert staying - smallest == pytest.approx(saved / (1 - MARGIN_SHARE), abs=2)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_device_too_small_for_them_gives_the_same_tokens(
    folder: Path, flip_bytes: int, look_ahead: int
) -> None:
    """Buffers are added up as they are made."""

    class Counting(SimDevice):
        n_bytes = n_host_bytes = 0

        def empty(self, n_bytes: int) -> torch.Tensor:
            self.n_bytes += n_bytes
            return super().empty(n_bytes)

        def host_empty(self, n_bytes: int) -> torch.Tensor:
            self.n_host_bytes += n_bytes
            return super().host_empty(n_bytes)

    device, found = Counting(), list[Parts]()
    scheduler = settings_of(7, look_ahead, SPARE).scheduler
    ceiling = flip_bytes - 1
    while not swaps(planned(folder, ceiling, scheduler=scheduler)):
        ceiling -= 1 << 10  # the serial twin has fewer slots
    settings = replace(settings_of(7), scheduler=scheduler, device_memory_bytes=ceiling)
    with engine(folder, settings, device, found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS, SHORT) == on_the_processor_alone(folder)
    plan = found[0].plan
    assert plan.swaps_hidden
    assert max(s.n_sub_batches for s in steps) > 2
    fixed = plan.device_bytes - plan.workspace_bytes - plan.static_device_bytes
    assert device.n_bytes == fixed
    on_host = plan.weights_bytes + plan.kv_bytes + plan.staging_host_bytes
    assert device.n_host_bytes == on_host + plan.hidden_host_bytes


def test_two_sub_batches_save_nothing(folder: Path, flip_bytes: int) -> None:
    two = settings_of(2, chunk=SPARE).scheduler
    for n_bytes in range(0, flip_bytes, flip_bytes // 12):
        assert not swaps(planned(folder, n_bytes, scheduler=two))


def test_not_where_the_processor_attends(folder: Path, flip_bytes: int) -> None:
    for n_bytes in range(0, flip_bytes, flip_bytes // 12):
        assert not swaps(planned(folder, n_bytes, attention="host"))


@pytest.mark.parametrize("swapping", [False, True])
def test_a_step_takes_no_more_of_the_device_than_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapping: bool
) -> None:
    """Everything that torch makes during a step is added up while it is alive."""
    write_tiny_llama(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    device, known = SimDevice(), list[torch.Tensor]()
    for name in ("empty", "host_empty"):
        make = getattr(device, name)

        def noted(n_bytes: int, make: Callable[[int], torch.Tensor] = make) -> torch.Tensor:
            known.append(make(n_bytes))
            return known[-1]

        monkeypatch.setattr(device, name, noted)
    if swapping:
        swap(monkeypatch)
    # torch's own is a tensor that cannot be watched.
    monkeypatch.setattr(
        device_ops,
        "causal_lower_right",
        lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(m - n),
    )
    n_prompt, rows = 200, 24
    settings = config(max_rows=rows, n_sub_batches=4, prefill_chunk_tokens=n_prompt)
    checkpoint = open_checkpoint(tmp_path)
    settings = replace(settings, device="sim", kv_memory_bytes=16 << 20)
    parts = load(checkpoint, settings, device=device)
    for i in range(rows):  # one long prompt: all of it is in one sub-batch
        request = Request(f"{i}", [i] * (n_prompt if i == 0 else 1), GREEDY, lambda _: None)
        assert parts.residents.admit(request, request.n_prompt + 1)
    memory = parts.plan
    assert not parts.residents.make_room()
    plan = pack(
        parts.residents, memory.prefill_tokens, memory.n_sub_batches, memory.max_sub_batch_tokens
    )
    known += [*parts.sweep.static.values(), parts.head._buffer]
    alive = PeakBytes(known)
    with torch.inference_mode(), alive:
        hidden = parts.sweep.run(plan, parts.residents.slabs)
        for part, states in zip(plan.sub_batches, hidden, strict=True):
            assert len(parts.head.results(part, states)) == len(part.rows)
    assert isinstance(parts.sweep.hidden, SwappedHidden if swapping else ResidentHidden)
    parts.close()
    checkpoint.close()
    workspace = memory.workspace_bytes
    if swapping:
        workspace -= memory.max_step_tokens * 256 * 4
    used = alive.peak_bytes + parts.head._buffer.nbytes
    assert 0.4 * workspace <= used <= workspace
