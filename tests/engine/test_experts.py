"""Experts: the same tokens whether a step fetches those it needs or whole layers, bytes as counted,
and each run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sl_serve import step, stored_model
from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import SamplingParams
from sl_serve.device import Device, SimDevice
from sl_serve.expert_share import is_routed
from sl_serve.loader import Parts
from sl_serve.plan.kv_size import MARGIN_SHARE
from sl_serve.plan.memory import MemoryPlan
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.requantised import with_weights
from sl_serve.weights.source import Fetched
from sl_serve.weights.streamer import StreamedWeights
from tests.engine.running import GREEDY, config, engine, one_by_one, random_prompts, run, steps_of
from tests.engine.test_hidden import swap
from tests.families.test_deepseek_v3 import TINY as DEEPSEEK
from tests.families.test_gpt_oss import TINY as GPT_OSS
from tests.families.test_mixtral import TINY as MIXTRAL
from tests.families.test_qwen3_moe import TINY as QWEN

PROMPTS = random_prompts(8, longest=30, seed=3)
SHORT = replace(GREEDY, max_tokens=10)
DRAWN = SamplingParams(max_tokens=10, temperature=1.0, seed=5, ignore_eos=True)
FAMILIES = {tiny.family: tiny for tiny in (MIXTRAL, QWEN, GPT_OSS, DEEPSEEK)}
each_mode = pytest.mark.parametrize("routed", [True, False], ids=["routed", "whole"])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].write(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    QWEN.write(folder, "every-other-layer")
    return folder


@pytest.fixture(scope="module")
def expected(qwen: Path) -> list[list[int]]:
    return [tokens[:10] for tokens in one_by_one(qwen, PROMPTS)]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    return [tokens[:10] for tokens in one_by_one(model, PROMPTS)]


def always(monkeypatch: pytest.MonkeyPatch, routed: bool) -> None:
    monkeypatch.setattr(step, "is_routed", lambda *_: routed)


def settings_of(n_sub_batches: int, look_ahead: int = 1, **more: Any) -> EngineConfig:
    scheduling = config(
        max_rows=8, n_sub_batches=n_sub_batches, look_ahead=look_ahead, prefill_chunk_tokens=20
    )
    return replace(scheduling, **more)


@each_mode
@pytest.mark.parametrize("n_sub_batches", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_tokens_are_the_same(
    model: Path,
    alone: list[list[int]],
    device: str,
    n_sub_batches: int,
    routed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch, routed)
    simulated: Device | None = SimDevice() if device == "sim" else None
    with engine(model, settings_of(n_sub_batches), simulated) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS, SHORT) == alone
    assert max(s.n_sub_batches for s in steps) == n_sub_batches


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
@pytest.mark.parametrize("n_sub_batches", [1, 2, 3])
def test_steps_of_both_kinds_by_turns(
    qwen: Path,
    expected: list[list[int]],
    n_sub_batches: int,
    look_ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is ahead belongs to a step of the other kind each time."""
    turns = iter([True, False, False] * 100)
    monkeypatch.setattr(step, "is_routed", lambda *_: next(turns))
    settings = settings_of(n_sub_batches, look_ahead)
    device = SimDevice()
    with engine(qwen, settings, device) as running:
        assert run(running, PROMPTS, SHORT) == expected
        weights = running._parts.sweep.weights
        assert isinstance(weights, StreamedWeights)
        moved = running._parts.sweep.bytes_moved
        down = moved.weights + weights.n_bytes_ahead + moved.kv_down
        assert device.n_bytes_down == down


def test_draws_are_the_same_in_any_company(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(qwen, settings_of(1)) as running:
        expected = [run(running, [prompt], DRAWN)[0] for prompt in PROMPTS]
    with engine(qwen, settings_of(3)) as running:
        assert run(running, PROMPTS, DRAWN) == expected


@each_mode
def test_where_the_processor_attends(
    qwen: Path, expected: list[list[int]], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells of two layers alternate."""
    always(monkeypatch, routed)
    with engine(qwen, settings_of(3, attention="host"), SimDevice()) as running:
        assert run(running, PROMPTS, SHORT) == expected


@each_mode
@pytest.mark.parametrize("attention", ["device", "host"])
def test_where_layers_are_expanded(
    qwen: Path, attention: str, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, routed)
    with engine(qwen, settings_of(1), weights="int8") as running:
        expected = run(running, PROMPTS, SHORT)
    settings = settings_of(2, attention=attention)
    with engine(qwen, settings, SimDevice(), weights="int8") as running:
        assert run(running, PROMPTS, SHORT) == expected


@each_mode
def test_where_hidden_states_are_swapped(
    qwen: Path, expected: list[list[int]], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sub-batch by sub-batch."""
    always(monkeypatch, routed)
    swap(monkeypatch)
    with engine(qwen, settings_of(3), SimDevice()) as running:
        assert not running._parts.sweep.hidden.stay
        assert run(running, PROMPTS, SHORT) == expected


@each_mode
def test_where_some_layers_stay_on_the_device(
    qwen: Path, expected: list[list[int]], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, routed)
    with engine(qwen, settings_of(2)) as running:
        layout = running._parts.store.layout
    resident = layout.image_bytes * 4 + (4 << 20)
    settings = settings_of(2, device_memory_bytes=resident)
    with engine(qwen, settings, SimDevice()) as running:
        assert run(running, PROMPTS, SHORT) == expected


class Watch:
    """Which experts each step asked for, layer by layer, and how often each was run."""

    def __init__(self) -> None:
        self.asked: list[dict[int, set[int]]] = []  # by step
        self.runs: list[Counter[tuple[int, int]]] = []  # (layer, expert), by step
        self._layer = 0

    def __call__(self, parts: Parts) -> None:
        sweep, weights = parts.sweep, parts.sweep.weights
        begin, experts, family = weights.begin, weights.experts, sweep.family

        def begins(is_routed: bool) -> None:
            self.asked.append({})
            self.runs.append(Counter())
            begin(is_routed)

        def asks(layer: int, chosen: Sequence[int]) -> Fetched:
            self._layer = layer
            self.asked[-1].setdefault(layer, set()).update(chosen)
            fetched = experts(layer, chosen)
            numbers = {id(fetched.weights[e]): e for e in chosen}
            self._numbers = numbers
            return fetched

        def expert(config: Any, ops: Any, w: Any, x: torch.Tensor) -> torch.Tensor:
            self.runs[-1][self._layer, self._numbers[id(w)]] += 1
            return family.expert(config, ops, w, x)

        weights.begin, weights.experts = begins, asks  # type: ignore[method-assign]
        names = ("block", "head_input", "hidden_states")
        sweep.family = SimpleNamespace(  # type: ignore[assignment]
            expert=expert, **{name: getattr(family, name) for name in names}
        )


@each_mode
@pytest.mark.parametrize("n_sub_batches", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_bytes_are_those_of_the_experts_that_were_needed_or_of_whole_layers(
    qwen: Path,
    device: str,
    n_sub_batches: int,
    routed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch, routed)
    simulated: Device | None = SimDevice() if device == "sim" else None
    watch = Watch()
    with engine(qwen, settings_of(n_sub_batches), simulated, watch) as running:
        steps = steps_of(running)
        run(running, PROMPTS, SHORT)
        layout = running._parts.store.layout
    fewest = 8
    for seen, asked in zip(steps, watch.asked, strict=True):
        assert asked.keys() == {1}  # the only layer that has any
        if device == "sim" and not routed:
            expected = sum(layout.stored_bytes(i) for i in range(3))
        else:
            expected = sum(layout.dense_bytes(i) for i in range(3))
            expected += layout.experts_bytes(1, asked[1])
        assert seen.weight_bytes == expected
        fewest = min(fewest, len(asked[1]))
    assert fewest < 8, "no step did without an expert"


@pytest.mark.parametrize("n_sub_batches", [1, 2, 3])
def test_an_expert_runs_once_in_a_step_however_tokens_are_packed(
    model: Path, n_sub_batches: int
) -> None:
    watch = Watch()
    with engine(model, settings_of(n_sub_batches), change=watch) as running:
        run(running, PROMPTS, SHORT)
    assert len(watch.runs) > 3
    for runs, asked in zip(watch.runs, watch.asked, strict=True):
        assert runs == {(layer, e): 1 for layer, chosen in asked.items() for e in chosen}


def test_the_kind_of_a_step_follows_from_its_tokens(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[bool] = []

    def spy(n_tokens: int, n_experts: int, per_token: int) -> bool:
        assert (n_experts, per_token) == (8, 3)
        kinds.append(is_routed(n_tokens, n_experts, per_token))
        return kinds[-1]

    monkeypatch.setattr(step, "is_routed", spy)
    with engine(qwen, settings_of(1), SimDevice()) as running:
        run(running, [PROMPTS[0] + PROMPTS[1]], SHORT)
    assert kinds[0] is False and kinds[-1] is True


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
@pytest.mark.parametrize("n_disk_layers", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_layers_on_disk(
    qwen: Path,
    expected: list[list[int]],
    device: str,
    n_disk_layers: int,
    look_ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In place experts come from there when they are asked for; for a device layers come whole."""
    turns = iter([False, True, True] * 100)
    monkeypatch.setattr(step, "is_routed", lambda *_: next(turns))
    leave_on_disk(monkeypatch, n_disk_layers)
    simulated: Device | None = SimDevice() if device == "sim" else None
    with engine(qwen, settings_of(2, look_ahead), simulated) as running:
        assert run(running, PROMPTS, SHORT) == expected


@each_mode
def test_bytes_read_from_disk(qwen: Path, routed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, routed)
    leave_on_disk(monkeypatch, 3)
    watch = Watch()
    with engine(qwen, settings_of(2), change=watch) as running:
        run(running, PROMPTS[:2], SHORT)
        store = running._parts.store
        sizes = dict.fromkeys((None, *range(8)), 0)
        for segment in store.layout.segments(1):
            sizes[segment.expert] += segment.size_bytes
        dense = sum(s.size_bytes for i in (0, 2) for s in store.layout.segments(i)) + sizes[None]
        read = store.n_disk_bytes_read - len(watch.asked) * dense
    experts = [sum(sizes[e] for e in asked[1]) for asked in watch.asked]
    everything = sum(n for e, n in sizes.items() if e is not None)
    if routed:  # but for the first step, which the ring had begun before it
        assert read == everything + sum(experts[1:])
        assert sum(experts) < 0.9 * len(experts) * everything
    else:
        assert read == len(experts) * everything


def leave_on_disk(monkeypatch: pytest.MonkeyPatch, n_layers: int) -> None:
    plan_memory = stored_model.plan_memory

    def plan(*args: Any) -> MemoryPlan:
        return replace(plan_memory(*args), n_disk_layers=n_layers)

    monkeypatch.setattr(stored_model, "plan_memory", plan)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_routers_stay_exact(qwen: Path, weights: str) -> None:
    exact = open_checkpoint(qwen)
    checkpoint = with_weights(exact, weights)
    router = "model.layers.1.mlp.gate.weight"
    assert checkpoint.format(router) == exact.format(router)
    assert torch.equal(checkpoint.read(router), exact.read(router))
    matrix = "model.layers.1.mlp.experts.5.up_proj.weight"
    assert checkpoint.format(matrix) != exact.format(matrix)
    checkpoint.close()


@each_mode
def test_a_cache_in_spare_device_memory(
    qwen: Path, expected: list[list[int]], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, routed)
    plan_memory = stored_model.plan_memory

    def plan(*args: Any) -> MemoryPlan:
        return replace(plan_memory(*args), expert_cache_bytes=3 * args[2].expert_bytes)

    monkeypatch.setattr(stored_model, "plan_memory", plan)
    with engine(qwen, settings_of(2), SimDevice()) as running:
        assert run(running, PROMPTS, SHORT) == expected
        weights = running._parts.sweep.weights
        assert isinstance(weights, StreamedWeights)
        weights._cache.check_integrity()
        assert len(weights._cache._held) == 3 * routed


@pytest.mark.parametrize("device_gib", [8, 12])
def test_what_the_plan_has_to_spare_is_the_cache(
    device_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "host_budget_bytes", lambda _: 100 << 30)
    settings = EngineConfig(
        device="sim",
        dtype="bfloat16",
        kv_memory_bytes=4 << 30,
        device_memory_bytes=device_gib << 30,
        scheduler=SchedulerConfig(max_rows=32),
    )
    plan = stored_model.plan_checkpoint(open_dummy("qwen3-30b-a3b"), settings)
    expert_bytes = 3 * 2048 * 768 * 2
    assert plan.expert_cache_bytes >= expert_bytes
    assert plan.expert_cache_bytes % expert_bytes == 0
    usable = int((device_gib << 30) * (1 - MARGIN_SHARE))
    assert plan.device_bytes <= usable < plan.device_bytes + 2 * plan.device_layers_bytes
    assert ("expert cache", plan.expert_cache_bytes) in plan.tiers()[1].parts
