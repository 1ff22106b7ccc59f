"""Tokens never depend on packing, look-ahead, tier, device or company; bytes are as planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import SamplingParams
from sl_serve.device import Device, SimDevice
from sl_serve.loader import Parts
from sl_serve.weights.streamer import StreamedWeights
from tests.engine.running import (
    GREEDY,
    UNBOUNDED_QUEUE,
    config,
    engine,
    random_prompts,
    requests_for,
    run,
    steps_of,
)

PROMPTS = random_prompts(14, longest=70, seed=3)
DRAWN = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
SAMPLINGS = [GREEDY if i % 2 else DRAWN for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """Every prompt by itself, on the plainest settings."""
    with engine(folder, config(max_rows=1, look_ahead=0)) as running:
        return [run(running, [p], [s])[0] for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]


@pytest.mark.parametrize("n_sub_batches", [1, 2, 7])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_tokens_are_the_same(
    folder: Path, alone: list[list[int]], device: str, look_ahead: int, n_sub_batches: int
) -> None:
    settings = config(
        max_rows=14, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=48
    )
    simulated: Device | None = SimDevice() if device == "sim" else None
    with engine(folder, settings, simulated) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS, SAMPLINGS) == alone
    assert max(s.n_sub_batches for s in steps) == n_sub_batches


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_tokens_do_not_depend_on_the_prefill_chunk(
    folder: Path, alone: list[list[int]], chunk: int
) -> None:
    with engine(folder, config(max_rows=5, prefill_chunk_tokens=chunk)) as running:
        assert run(running, PROMPTS, SAMPLINGS) == alone


def test_tokens_do_not_depend_on_arrival(folder: Path, alone: list[list[int]]) -> None:
    """Backwards, one by one, while others run."""
    with engine(folder, config(max_rows=4)) as running:
        requests, answers = requests_for(PROMPTS, SAMPLINGS)
        for request in reversed(requests):
            running.submit([request])
        assert answers.wait() == alone


def test_the_torch_twins_give_the_same_tokens(folder: Path, alone: list[list[int]]) -> None:
    settings = replace(config(max_rows=6, n_sub_batches=2), native=False)
    with engine(folder, settings) as running:
        assert run(running, PROMPTS, SAMPLINGS) == alone


def test_parked_rows_resume_with_the_same_tokens(folder: Path, alone: list[list[int]]) -> None:
    """A pool that holds the prompts of all rows but not their outputs."""
    settings = EngineConfig(
        kv_memory_bytes=330_000,
        queue=UNBOUNDED_QUEUE,
        scheduler=SchedulerConfig(max_rows=14, prefill_chunk_tokens=64),
    )
    with engine(folder, settings) as running:
        longer = [replace(s, max_tokens=90) for s in SAMPLINGS]
        tokens = run(running, PROMPTS, longer)
        assert running.snapshot().n_parked_total > 0
    assert [t[:24] for t in tokens] == alone


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 7])
def test_bytes_are_one_pass_over_weights_and_kv(
    folder: Path, n_sub_batches: int, look_ahead: int
) -> None:
    """Counted by hand: fourteen prompts of one length, one slab width, every step known."""
    n_prompt, n_output, n_rows = 20, 6, 14
    device = SimDevice()
    found: list[Parts] = []
    settings = config(
        max_rows=n_rows,
        n_sub_batches=n_sub_batches,
        look_ahead=look_ahead,
        prefill_chunk_tokens=n_rows * n_prompt,
    )
    with engine(folder, settings, device, found.append) as running:
        steps = steps_of(running)
        sampling = replace(GREEDY, max_tokens=n_output)
        run(running, [[i] * n_prompt for i in range(n_rows)], sampling)
    parts, plan = found[0], found[0].plan
    n_slabs = -(-n_rows // plan.max_slab_width)
    position_bytes = plan.max_slab_width * plan.kv.token_bytes
    assert len(steps) == n_output
    for i, step in enumerate(steps):
        cached = 0 if i == 0 else n_prompt + i - 1
        assert step.weight_bytes == plan.weights_bytes
        assert step.kv_down_bytes == n_slabs * cached * position_bytes
        new = n_prompt if i == 0 else 1
        assert step.kv_up_bytes == n_rows * new * plan.kv.token_bytes
    weights = parts.sweep.weights
    assert isinstance(weights, StreamedWeights)
    down = sum(s.weight_bytes + s.kv_down_bytes for s in steps) + weights.n_bytes_ahead
    assert device.n_bytes_down == down
    assert device.n_bytes_up == sum(s.kv_up_bytes for s in steps)


class SlotReusedTooEarly(StreamedWeights):
    """One slot fewer than the ring needs: a layer is overwritten while it is computed with."""

    def _slot(self, unit: int) -> int:
        return unit % max(1, self.look_ahead)


def test_a_slot_reused_too_early_is_noticed(folder: Path) -> None:
    def break_ring(parts: Parts) -> None:
        streamer = parts.sweep.weights
        assert isinstance(streamer, StreamedWeights)
        streamer.__class__ = SlotReusedTooEarly

    settings = config(max_rows=4, n_sub_batches=2, look_ahead=2)
    with engine(folder, settings, SimDevice(), break_ring) as running:
        requests, answers = requests_for(PROMPTS[:4], GREEDY)
        running.submit(requests)
        answers.wait()
    errors = {news[-1].error for news in answers.news}
    assert len(errors) == 1
    error = errors.pop()
    assert error is not None
    assert "SlotReuseError" in error or "NonFiniteLogitsError" in error
