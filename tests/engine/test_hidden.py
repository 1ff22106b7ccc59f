"""Hidden states that are swapped: the same tokens, bytes as counted, no order kept by luck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve.core import Request, RowWork, SubBatchPlan
from sl_serve.device import SimDevice, Stream
from sl_serve.device.sim import HardwareProfile
from sl_serve.hidden import SwappedHidden
from sl_serve.loader import Parts
from sl_serve.weights.streamer import StreamedWeights
from tests.engine.running import GREEDY, engine, requests_for, run, steps_of
from tests.engine.swapping import PROMPTS, SHORT, on_the_processor_alone, settings_of, swap

pytestmark = pytest.mark.usefixtures("layers_measured_once")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return on_the_processor_alone(folder)


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    swap(monkeypatch)


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 7])
def test_tokens_are_the_same(
    folder: Path, expected: list[list[int]], n_sub_batches: int, look_ahead: int
) -> None:
    found: list[Parts] = []
    settings = settings_of(n_sub_batches, look_ahead)
    with engine(folder, settings, SimDevice(), found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS, SHORT) == expected
    assert isinstance(found[0].sweep.hidden, SwappedHidden)
    assert max(s.n_sub_batches for s in steps) == n_sub_batches


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 7])
def test_every_token_crosses_once_per_layer_each_way(
    folder: Path, n_sub_batches: int, look_ahead: int
) -> None:
    """Up after every layer, down before every layer but the first and before the head."""
    device, found = SimDevice(), list[Parts]()
    settings = settings_of(n_sub_batches, look_ahead)
    with engine(folder, settings, device, found.append) as running:
        steps = steps_of(running)
        run(running, PROMPTS, SHORT)
    model = found[0].sweep.config
    for step in steps:
        n_tokens = step.n_prefill_tokens + step.n_decode_tokens
        crossing = n_tokens * model.n_layers * model.hidden_size * 4
        assert step.hidden_down_bytes == step.hidden_up_bytes == crossing
    weights = found[0].sweep.weights
    assert isinstance(weights, StreamedWeights)
    down = sum(s.weight_bytes + s.kv_down_bytes + s.hidden_down_bytes for s in steps)
    assert device.n_bytes_down == down + weights.n_bytes_ahead
    assert device.n_bytes_up == sum(s.kv_up_bytes + s.hidden_up_bytes for s in steps)


def test_prompt_log_probabilities_need_every_line(folder: Path) -> None:
    sampling = replace(GREEDY, max_tokens=2, prompt_logprobs=1)

    def told() -> list[object]:
        with engine(folder, settings_of(7), SimDevice()) as running:
            requests, answers = requests_for(PROMPTS, sampling)
            running.submit(requests)
            answers.wait()
        return [[o.prompt_logprobs for o in news if o.prompt_logprobs] for news in answers.news]

    resident = told()
    assert all(len(of_request) == 1 for of_request in resident)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        swap(patch)
        assert told() == resident


# What is missing in each: a wait that only luck would make up for.


def _forgets_who_read_a_buffer(self: SwappedHidden, visit: int) -> None:
    CLOSE(self, visit)
    self._free = [None] * len(self._free)
    self._arrived = [None] * len(self._arrived)


def _forgets_that_lines_must_arrive(self: SwappedHidden, visit: int) -> None:
    CLOSE(self, visit)
    self._arrived = [None] * len(self._arrived)


CLOSE = SwappedHidden.close


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize(
    ("breaking", "n_sub_batches"),
    [(_forgets_who_read_a_buffer, 4), (_forgets_that_lines_must_arrive, 1)],
)
def test_a_missing_wait_is_noticed(
    folder: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    breaking: Callable[[SwappedHidden, int], None],
    n_sub_batches: int,
) -> None:
    monkeypatch.setattr(SwappedHidden, "close", breaking)
    with engine(folder, settings_of(n_sub_batches), SimDevice()) as running:
        requests, answers = requests_for(PROMPTS, SHORT)
        running.submit(requests)
        tokens = answers.wait()
    errors = {news[-1].error for news in answers.news}
    assert tokens != expected
    assert all(e and ("SlotReuseError" in e or "NonFiniteLogitsError" in e) for e in errors)


# On the virtual clock: states of 10 bytes cross in 1 s each way, 20 FLOPs take 2 s.

PROFILE = HardwareProfile("slow", 10.0, 10.0, 10.0)
N_LAYERS, N_SUB_BATCHES, WIDTH = 5, 4, 5


def sub_batch(n_tokens: int) -> SubBatchPlan:
    request = Request("r", [0], GREEDY, lambda _: None)
    return SubBatchPlan((RowWork(request, 0, 0, 0, n_tokens, True),))


def swept(look_ahead: int, n_sub_batches: int, sizes: tuple[int, ...] = (1, 1)) -> SimDevice:
    """Steps whose sub-batches have so many tokens each, through layers that add one."""
    device = SimDevice(PROFILE)
    hidden = SwappedHidden(device, torch.float16, WIDTH, N_LAYERS, 3, 12, look_ahead)
    for size in sizes:
        plans = [sub_batch(size) for _ in range(n_sub_batches)]
        starts = iter(range(n_sub_batches))

        def embed(plan: SubBatchPlan, starts: object = starts) -> torch.Tensor:
            return torch.full((plan.n_tokens, WIDTH), float(next(starts)), dtype=torch.float16)  # type: ignore[call-overload]

        hidden.begin(plans, embed)
        for visit in range(N_LAYERS * n_sub_batches):
            hidden.open(visit).add_(1)
            device.computed(20.0 * size, ())
            hidden.close(visit)
        for i, states in enumerate(hidden.results()):
            assert states.shape == (size, WIDTH)
            assert (states == i + N_LAYERS).all()
    return device


def test_states_cross_beside_the_arithmetic() -> None:
    one_step = N_LAYERS * N_SUB_BATCHES * 2.0
    # The last states are still on their way up, and all come down once more for the head.
    device = swept(look_ahead=1, n_sub_batches=N_SUB_BATCHES, sizes=(1,))
    assert device.record(Stream.COMPUTE).time_s <= one_step + 1 + N_SUB_BATCHES
    assert device.time_s <= one_step + 2 + N_SUB_BATCHES


def test_the_serial_twin_takes_the_sum() -> None:
    device = swept(look_ahead=0, n_sub_batches=N_SUB_BATCHES, sizes=(1,))
    assert device.time_s == pytest.approx(N_LAYERS * N_SUB_BATCHES * (1.0 + 2.0 + 1.0))


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 3, 4])
def test_steps_of_different_sizes_follow_each_other(n_sub_batches: int, look_ahead: int) -> None:
    device = swept(look_ahead, n_sub_batches, sizes=(3, 1, 2))
    assert device.n_bytes_down == device.n_bytes_up == 6 * n_sub_batches * N_LAYERS * 2 * WIDTH
