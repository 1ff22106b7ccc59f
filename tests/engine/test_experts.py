"""Experts: the same tokens whether a step fetches those it needs or whole layers, bytes as counted,
each run once, and no order of copies kept by luck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sl_serve import loader, step
from sl_serve.config import EngineConfig, SchedulerConfig
from sl_serve.core import SamplingParams
from sl_serve.device import Device, SimDevice, Stream
from sl_serve.device.sim import HardwareProfile, SlotReuseError
from sl_serve.expert_share import MOST_ROUTED_SHARE, is_routed, touched_share
from sl_serve.loader import Parts
from sl_serve.models import Routed
from sl_serve.ops import TorchOps
from sl_serve.plan.kv_size import MARGIN_SHARE
from sl_serve.plan.memory import MemoryPlan
from sl_serve.routing import joined, run_experts, shares
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.expander import Expander
from sl_serve.weights.expert_cache import ExpertCache
from sl_serve.weights.groups import GROUP_FORMATS
from sl_serve.weights.host import host_images
from sl_serve.weights.layout import IMAGE_ALIGNMENT_BYTES, LayerLayout, Param, largest_layer
from sl_serve.weights.requantised import with_weights
from sl_serve.weights.source import Fetched
from sl_serve.weights.store import LayerStore
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
    plan_memory = loader.plan_memory

    def plan(*args: Any) -> MemoryPlan:
        return replace(plan_memory(*args), n_disk_layers=n_layers)

    monkeypatch.setattr(loader, "plan_memory", plan)


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


# Functions of their own.


def test_touched_share() -> None:
    assert touched_share(1, 128, 8) == pytest.approx(1 / 16)
    assert touched_share(0, 8, 2) == 0
    assert touched_share(10_000, 8, 2) == pytest.approx(1)
    # Exactly, over all draws of two tokens' one expert each among three.
    assert touched_share(2, 3, 1) == pytest.approx((3 * 1 + 6 * 2) / 9 / 3)


def test_few_tokens_are_routed_and_many_are_not() -> None:
    kinds = [is_routed(n, 8, 2) for n in range(1, 20)]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] and not kinds[-1]
    at = kinds.index(False) + 1
    assert touched_share(at - 1, 8, 2) <= MOST_ROUTED_SHARE < touched_share(at, 8, 2)
    assert not is_routed(1, 0, 0)  # nothing to route


def routed_of(n_tokens: int, seed: int = 0) -> Routed:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, 4, generator=random)
    experts = torch.rand(n_tokens, 6, generator=random).topk(3).indices
    return Routed(hidden, experts, torch.rand(n_tokens, 3, generator=random))


def test_experts_give_each_token_its_weighted_sum() -> None:
    parts = [routed_of(5, 1), routed_of(1, 2), routed_of(3, 3)]
    together = joined(parts)
    runs: list[int] = []

    def run_one(expert: int, x: torch.Tensor) -> torch.Tensor:
        runs.append(expert)
        return x * (expert + 1)

    found = run_experts(together, shares(together), run_one)
    expected = torch.cat(
        [p.hidden * (p.weights * (p.experts + 1)).sum(-1, keepdim=True) for p in parts]
    )
    torch.testing.assert_close(found, expected)
    assert runs == sorted(set(together.experts.flatten().tolist()))


# Layouts.

EXPERT = "l{layer}.e{expert}"
PARAMS = [
    Param("own", (64, 24), ("l{layer}.own",), (24,)),
    Param("dense", (64, 300), ("l{layer}.dense",), (300,), layers=(0, 2)),
    Param("up", (64, 40), (f"{EXPERT}.a", f"{EXPERT}.b"), (24, 16), layers=(1, 3), n_experts=5),
    Param("bias", (40,), (f"{EXPERT}.bias",), (40,), layers=(1, 3), n_experts=5),
]
N_LAYERS = 4
LAYOUT = LayerLayout(PARAMS, torch.float32, n_layers=N_LAYERS)
INT8 = GROUP_FORMATS["int8_g64_sym"].format
SHORTER = LayerLayout(
    PARAMS,
    torch.float32,
    {f"l{i}.e{e}.{part}": INT8 for i in (1, 3) for e in range(5) for part in "ab"},
    N_LAYERS,
)


@pytest.mark.parametrize("layout", [LAYOUT, SHORTER], ids=["plain", "in-blocks"])
def test_an_image_is_the_dense_part_and_then_expert_by_expert(layout: LayerLayout) -> None:
    assert [layout.n_experts(i) for i in range(N_LAYERS)] == [0, 5, 0, 5]
    for layer in range(N_LAYERS):
        ends = [layout.dense_bytes(layer)]
        for expert in range(layout.n_experts(layer)):
            place = layout.expert_range(layer, expert)
            assert place.start == ends[-1] and place.start % IMAGE_ALIGNMENT_BYTES == 0
            assert layout.experts_bytes(layer, [expert]) == place.stop - place.start
            ends.append(place.stop)
        assert layout.stored_bytes(layer) == ends[-1] <= layout.image_bytes
        for segment in layout.segments(layer):
            start, stop = segment.offset_bytes, segment.offset_bytes + segment.size_bytes
            place = slice(0, ends[0])
            if segment.expert is not None:
                place = layout.expert_range(layer, segment.expert)
            assert place.start <= start < stop <= place.stop
    assert layout.segments(1)[-1].source(0, 1) == "l1.e4.bias"


def test_views_of_experts_are_their_bytes_alone() -> None:
    image = torch.zeros(LAYOUT.image_bytes, dtype=torch.uint8)
    experts = LAYOUT.experts(image, 3)
    assert set(LAYOUT.views(image, 3)) == {"own"} and list(experts) == list(range(5))
    experts[2]["up"].fill_(1.0)
    experts[2]["bias"].fill_(1.0)
    place = LAYOUT.expert_range(3, 2)
    assert image.count_nonzero() == image[place].count_nonzero() > 0
    assert experts[2] is experts[2]
    assert len(LAYOUT.experts(image, 0)) == 0


def test_the_largest_layer() -> None:
    assert largest_layer(PARAMS, N_LAYERS) == 0
    assert largest_layer(PARAMS[:1] + PARAMS[2:], N_LAYERS) == 1
    assert largest_layer(PARAMS[:1], N_LAYERS) == 0


# The order of streams, as in test_streamer.py.

PROFILE = HardwareProfile("test", 1e5, 1e5, 1.0, 1e6)


def store_of(layout: LayerLayout) -> LayerStore:
    images = host_images(layout, range(N_LAYERS))
    for layer, image in images.items():
        for e, weights in [(-1, layout.views(image, layer)), *layout.experts(image, layer).items()]:
            for weight in weights.values():
                if isinstance(weight, torch.Tensor):
                    weight.fill_(100 * layer + e)
                else:
                    weight.parts[0].data.fill_(layer + e)
    return LayerStore(layout, images)


def sweep(
    source: StreamedWeights, device: SimDevice, kinds: Sequence[bool]
) -> list[tuple[int, int, torch.Tensor]]:
    """(layer, expert, its bias) of what was read; of each layer two experts of five, asked for by
    two cells that share one."""
    seen = []
    for n, routed in enumerate(kinds):
        source.begin(routed)
        for layer in range(N_LAYERS):
            source.acquire()
            for part in range(2):
                source.advance(part, 2)
                device.computed(2.0, (source.buffer(),))
            for chosen in ([n % 4, 4], [4, (n + 2) % 4]) if layer % 2 else ():
                fetched = source.experts(layer, chosen)
                seen += [(layer, e, fetched.weights[e]["bias"].clone()) for e in chosen]
                device.computed(3.0, fetched.memory)
            source.release()
    return seen


KINDS = [True, True, False, True, False, False, True]


def fault(
    layout: LayerLayout,
    look_ahead: int,
    kind: type[StreamedWeights] = StreamedWeights,
    resident: Sequence[int] = (),
    n_cached: int = 0,
) -> str:
    device, host = SimDevice(PROFILE), store_of(layout)
    on_device = {i: host.host_images[i] for i in resident}
    streamed = {i: m for i, m in host.host_images.items() if i not in on_device}
    expander = None if layout is LAYOUT else Expander(device, TorchOps(torch.float32), layout)
    cache_bytes = n_cached * layout.expert_bytes
    source = kind(
        device,
        LayerStore(layout, streamed),
        look_ahead,
        on_device,
        expander,
        cache_bytes=cache_bytes,
    )
    try:
        seen = sweep(source, device, KINDS)
    except SlotReuseError:
        return "reused"
    assert device.n_bytes_down == source.n_bytes_moved + source.n_bytes_ahead
    source._cache.check_integrity()
    for layer, expert, bias in seen:
        if bias.isnan().any():
            return "poisoned"
        if not (bias == 100 * layer + expert).all():
            return "wrong"
    return ""


every_case = pytest.mark.parametrize("look_ahead", [0, 1, 2, 3])
every_layout = pytest.mark.parametrize("layout", [LAYOUT, SHORTER], ids=["plain", "in-blocks"])


@every_case
@every_layout
@pytest.mark.parametrize("resident", [(), (1,), (0, 3), range(N_LAYERS)], ids=str)
@pytest.mark.parametrize("n_cached", [0, 1, 3, 30])
def test_every_expert_that_is_read_is_there(
    layout: LayerLayout, look_ahead: int, resident: Sequence[int], n_cached: int
) -> None:
    assert fault(layout, look_ahead, resident=resident, n_cached=n_cached) == ""


class ForgetsToWait(StreamedWeights):
    """For the experts that it fetches."""

    def _fetch(self, layer: int, slot: int, chosen: Sequence[int]) -> Fetched:
        wait = self._device.wait

        def only_load(stream: Stream, event: Any) -> None:
            if stream is Stream.LOAD:
                wait(stream, event)

        self._device.wait = only_load  # type: ignore[method-assign]
        try:
            return super()._fetch(layer, slot, chosen)
        finally:
            self._device.wait = wait  # type: ignore[method-assign]


class FetchesTooEarly(StreamedWeights):
    """Before the computation that has the slot."""

    def _fetch(self, layer: int, slot: int, chosen: Sequence[int]) -> Fetched:
        wait = self._device.wait
        self._device.wait = lambda stream, event: (  # type: ignore[method-assign]
            None if stream is Stream.LOAD else wait(stream, event)
        )
        try:
            return super()._fetch(layer, slot, chosen)
        finally:
            self._device.wait = wait  # type: ignore[method-assign]


class MakesUpForNothing(StreamedWeights):
    def _make_up_for(self, layer: int, slot: int) -> None:
        n_bytes = max(self._arrived[slot].n_bytes, self._unit_bytes(self._unit))
        self._arrived[slot] = self._arrived[slot]._replace(n_bytes=n_bytes)


@every_case
@every_layout
@pytest.mark.parametrize("n_cached", [0, 2])
def test_faults_are_noticed(layout: LayerLayout, look_ahead: int, n_cached: int) -> None:
    assert fault(layout, look_ahead, ForgetsToWait, n_cached=n_cached) != ""
    assert fault(layout, look_ahead, FetchesTooEarly, n_cached=n_cached) == "reused"


@pytest.mark.parametrize("look_ahead", [2, 3])  # the first layer has no experts
@every_layout
def test_a_part_that_is_not_made_up_for_is_noticed(layout: LayerLayout, look_ahead: int) -> None:
    with pytest.raises(AssertionError):
        assert fault(layout, look_ahead, MakesUpForNothing) == ""


# The cache.


def test_the_cache_gives_up_what_was_not_needed_for_longest() -> None:
    cache = ExpertCache(SimDevice(), LAYOUT, 3 * LAYOUT.expert_bytes + 1)
    memory = {}
    for expert in (0, 1, 2):
        taken = cache.take(1, expert, [])
        assert taken is not None
        memory[expert] = taken.memory.data_ptr()
    found = cache.find(1, 0)
    assert found is not None and found.memory.data_ptr() == memory[0]
    taken = cache.take(3, 0, [0])
    assert taken is not None and taken.memory.data_ptr() == memory[1]
    assert cache.find(1, 1) is None and cache.find(1, 2) is not None
    # (1, 0) is the oldest now, and to be kept.
    taken = cache.take(1, 4, [0, 4])
    assert taken is not None and taken.memory.data_ptr() == memory[1]
    assert cache.take(1, 1, [0, 1, 2, 4]) is None
    cache.check_integrity()


def test_views_of_a_cached_expert_are_its_own() -> None:
    cache = ExpertCache(SimDevice(), LAYOUT, LAYOUT.expert_bytes)
    image = torch.randint(0, 100, (LAYOUT.image_bytes,), dtype=torch.uint8)
    taken = cache.take(3, 2, [])
    assert taken is not None
    taken.memory.copy_(image[LAYOUT.expert_range(3, 2)])
    expected = LAYOUT.experts(image, 3)[2]
    assert taken.weights.keys() == expected.keys()
    assert all(torch.equal(taken.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", [LAYOUT])
def test_what_the_cache_has_does_not_cross_again(layout: LayerLayout) -> None:
    moved = []
    for n_cached in (0, 30):
        device = SimDevice(PROFILE)
        size = n_cached * layout.expert_bytes
        source = StreamedWeights(device, store_of(layout), 0, cache_bytes=size)
        sweep(source, device, [True] * 10)
        moved.append(source.n_bytes_moved)
    dense = 10 * sum(layout.dense_bytes(i) for i in range(N_LAYERS))
    # Of two layers five experts; three in a step.
    assert moved[1] == dense + 2 * 5 * layout.expert_bytes
    assert moved[0] == dense + 10 * 2 * 3 * layout.expert_bytes


@each_mode
def test_a_cache_in_spare_device_memory(
    qwen: Path, expected: list[list[int]], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, routed)
    plan_memory = loader.plan_memory

    def plan(*args: Any) -> MemoryPlan:
        return replace(plan_memory(*args), expert_cache_bytes=3 * args[2].expert_bytes)

    monkeypatch.setattr(loader, "plan_memory", plan)
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
    monkeypatch.setattr(loader, "host_budget_bytes", lambda _: 100 << 30)
    settings = EngineConfig(
        device="sim",
        dtype="bfloat16",
        kv_memory_bytes=4 << 30,
        device_memory_bytes=device_gib << 30,
        scheduler=SchedulerConfig(max_rows=32),
    )
    plan = loader.plan_checkpoint(open_dummy("qwen3-30b-a3b"), settings)
    expert_bytes = 3 * 2048 * 768 * 2
    assert plan.expert_cache_bytes >= expert_bytes
    assert plan.expert_cache_bytes % expert_bytes == 0
    usable = int((device_gib << 30) * (1 - MARGIN_SHARE))
    assert plan.device_bytes <= usable < plan.device_bytes + 2 * plan.device_layers_bytes
    assert ("expert cache", plan.expert_cache_bytes) in plan.tiers()[1].parts
