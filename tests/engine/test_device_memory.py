"""A device with a ceiling: what fits stays there, the rest passes through; same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sl_serve.config import EngineConfig
from sl_serve.device import SimDevice
from sl_serve.errors import MemoryBudgetError
from sl_serve.loader import Parts
from sl_serve.plan.budget import parse_size
from sl_serve.plan.memory import MemoryPlan
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from tests.engine.running import config, engine, random_prompts, run, steps_of
from tests.models import TINY_MODELS

PROMPTS = random_prompts(5, longest=40, seed=4)
N_LAYERS = 6


@pytest.fixture(scope="module", params=TINY_MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    TINY_MODELS[request.param](folder, num_hidden_layers=N_LAYERS)
    return folder


def settings(device_bytes: int | None) -> EngineConfig:
    plain = config(max_rows=5, n_sub_batches=2, prefill_chunk_tokens=32)
    return replace(plain, device="sim", device_memory_bytes=device_bytes)


def planned(folder: Path, device_bytes: int | None) -> MemoryPlan:
    checkpoint = open_checkpoint(folder)
    try:
        return plan_checkpoint(checkpoint, settings(device_bytes))
    finally:
        checkpoint.close()


@pytest.fixture(scope="module")
def least_bytes(folder: Path) -> int:
    """What the refusal of no memory at all says would do."""
    with pytest.raises(MemoryBudgetError, match="the device needs") as refusal:
        planned(folder, 0)
    return parse_size(str(refusal.value).split("--device-memory to ")[1].split(",")[0])


@pytest.mark.parametrize("extra_layers", [0, 1, 3, 50])
def test_tokens_and_bytes_with_layers_that_stay(
    folder: Path, least_bytes: int, extra_layers: int
) -> None:
    with engine(folder, config(max_rows=1)) as running:
        expected = [run(running, [p])[0] for p in PROMPTS]
    plan = planned(folder, least_bytes)
    layer_bytes = plan.device_slots_bytes // 2
    ceiling = least_bytes + int(extra_layers * layer_bytes / 0.92) + (1 << 20)
    found: list[Parts] = []
    with engine(folder, settings(ceiling), SimDevice(), found.append) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS) == expected
    plan = found[0].plan
    assert plan.device_bytes <= ceiling
    assert plan.n_device_layers >= min(extra_layers, N_LAYERS)
    streamed = N_LAYERS - plan.n_device_layers
    assert {s.weight_bytes for s in steps} == {streamed * layer_bytes}
    assert plan.weights_bytes == streamed * layer_bytes
    assert len(found[0].store.host_images) == streamed


def test_more_device_memory_keeps_more_layers_up_to_all(folder: Path, least_bytes: int) -> None:
    plans = [planned(folder, least_bytes + (i << 18)) for i in range(0, 40, 4)]
    n_layers = [p.n_device_layers for p in plans]
    assert n_layers == sorted(n_layers) and n_layers[-1] == N_LAYERS


def test_without_a_ceiling_the_device_counts_as_host_memory(folder: Path) -> None:
    plan = planned(folder, None)
    assert plan.n_device_layers == 0
    assert plan.total_bytes == plan.host_bytes + plan.device_bytes
    assert plan.total_bytes < plan.available_bytes
