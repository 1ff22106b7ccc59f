from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from sl_serve.config import DeviceName, EngineConfig, ModelConfig, SchedulerConfig
from sl_serve.core import Request, SamplingParams
from sl_serve.device import SimDevice
from sl_serve.errors import MemoryBudgetError
from sl_serve.kv.formats import KV_FORMATS
from sl_serve.loader import load
from sl_serve.plan.budget import gib, parse_size
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.kv_size import MARGIN_SHARE
from sl_serve.plan.memory import MemoryPlan, WeightSizes
from sl_serve.plan.pools import KVPools
from sl_serve.plan.step_memory import DEFAULT_PREFILL_TOKENS
from sl_serve.sched.residents import Residents
from sl_serve.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("layers_measured_once")

FEW = settings(derandomize=True, max_examples=150, deadline=None)
MIB, GIB = 1 << 20, 1 << 30
MODEL = ModelConfig(
    family="llama",
    n_layers=10,
    hidden_size=512,
    intermediate_size=1024,
    n_heads=8,
    n_kv_heads=4,
    head_dim=64,
    vocab_size=1000,
    max_positions=4096,
)
SIZES = WeightSizes(
    layer_bytes=10 * MIB, embedding_bytes=2 * MIB, head_bytes=2 * MIB, others_bytes=1 * MIB
)
FLOAT32 = KV_FORMATS["float32"]
TOKEN_BYTES = 2 * 10 * 4 * 64 * 4  # K and V, layers, heads, elements, bytes


def plan(
    available: int, config: EngineConfig | None = None, sizes: WeightSizes = SIZES
) -> MemoryPlan:
    return plan_memory(MODEL, config or EngineConfig(), sizes, "position", available)


def usable(available: int) -> int:
    return int(available * (1 - MARGIN_SHARE))


CONFIGS = st.builds(
    EngineConfig,
    device=st.sampled_from(["cpu", "sim"]),
    max_model_len=st.one_of(st.none(), st.none(), st.sampled_from([1, 64, 100, 512, 4096, 5000])),
    kv_memory_bytes=st.one_of(st.none(), st.none(), st.sampled_from([0, 4 * MIB, 50 * MIB, GIB])),
    scheduler=st.builds(
        SchedulerConfig,
        max_rows=st.integers(1, 300),
        n_sub_batches=st.integers(1, 6),
        prefill_chunk_tokens=st.one_of(st.just(0), st.integers(1, 2000)),
        look_ahead=st.integers(0, 3),
    ),
)
BUDGETS = st.sampled_from([0, 150, 200, 250, 300, 500, 1000, 4000, 64000]).map(lambda n: n * MIB)


def plan_or_skip(available: int, config: EngineConfig) -> MemoryPlan:
    """Hypothesis fails a test that skips nearly all of its examples."""
    try:
        return plan(available, config)
    except MemoryBudgetError:
        reject()


@FEW
@given(CONFIGS, BUDGETS)
def test_a_plan_stays_under_the_budget(config: EngineConfig, available: int) -> None:
    found = plan_or_skip(available, config)
    assert found.total_bytes <= usable(available)


@FEW
@given(CONFIGS, BUDGETS)
def test_the_longest_request_fits_into_the_pool(config: EngineConfig, available: int) -> None:
    found = plan_or_skip(available, config)
    assert 1 <= found.max_model_len <= found.n_chunks * found.kv.chunk_tokens
    assert found.max_model_len <= MODEL.max_positions


@FEW
@given(CONFIGS, BUDGETS)
def test_slabs_are_a_power_of_two_wide_and_no_wider_than_a_chunk(
    config: EngineConfig, available: int
) -> None:
    found = plan_or_skip(available, config)
    assert found.max_slab_width.bit_count() == 1
    assert found.max_slab_width <= found.kv.chunk_tokens
    assert found.max_slab_width <= found.max_rows


@FEW
@given(CONFIGS, BUDGETS)
def test_an_explicit_length_is_kept_or_refused_but_never_lowered(
    config: EngineConfig, available: int
) -> None:
    found = plan_or_skip(available, config)
    if config.max_model_len is not None:
        assert found.max_model_len == config.max_model_len


@FEW
@given(CONFIGS, BUDGETS)
def test_the_table_adds_up_to_the_total(config: EngineConfig, available: int) -> None:
    found = plan_or_skip(available, config)
    assert sum(n_bytes for _, n_bytes, _ in found.table()) == found.total_bytes


def test_the_parts_of_a_plan() -> None:
    found = plan(8 * GIB)
    assert found.weights_bytes == 100 * MIB
    assert found.static_bytes == 5 * MIB
    assert found.device_slots_bytes == 0
    assert found.kv.token_bytes == TOKEN_BYTES
    assert found.kv_bytes == found.n_chunks * found.kv.chunk_tokens * TOKEN_BYTES
    assert found.total_bytes == 105 * MIB + found.kv_bytes + found.workspace_bytes
    assert found.max_step_tokens == 256 + DEFAULT_PREFILL_TOKENS


def test_workspace_grows_with_the_tokens_of_a_step() -> None:
    small = EngineConfig(scheduler=SchedulerConfig(max_rows=8, prefill_chunk_tokens=56))
    large = EngineConfig(scheduler=SchedulerConfig(max_rows=8, prefill_chunk_tokens=120))
    per_token = (plan(GIB, large).workspace_bytes - plan(GIB, small).workspace_bytes) // 64
    # hidden state and rotary table; norm, q, k, v and results; gate, up and their product
    assert per_token == (512 + 64 + 512 + (512 + 2 * 256 + 512) + 3 * 1024) * 4


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_a_device_with_memory_of_its_own_has_slots(look_ahead: int) -> None:
    config = EngineConfig(device="sim", scheduler=SchedulerConfig(look_ahead=look_ahead))
    assert plan(8 * GIB, config).device_slots_bytes == (look_ahead + 1) * 10 * MIB


def test_kv_takes_no_more_than_all_rows_at_full_length_can_use() -> None:
    config = EngineConfig(max_model_len=512, scheduler=SchedulerConfig(max_rows=4))
    useful = 4 * 512 * TOKEN_BYTES
    assert useful - plan(64 * GIB, config).kv.chunk_bytes < plan(64 * GIB, config).kv_bytes
    assert plan(64 * GIB, config).kv_bytes <= useful


def test_plenty_of_memory_keeps_the_models_own_length() -> None:
    assert plan(8 * GIB).max_model_len == MODEL.max_positions


def test_short_memory_lowers_the_length_to_what_the_pool_holds() -> None:
    found = plan(200 * MIB)
    assert found.max_model_len < MODEL.max_positions
    assert found.max_model_len == found.n_chunks * found.kv.chunk_tokens


@pytest.mark.parametrize("available", range(40, 130, 3))
def test_with_layers_on_disk_every_row_comes_before_a_large_prefill_chunk(available: int) -> None:
    on_disk = replace(SIZES, disk_tier=True, vocabulary_in_file=True)
    settings = EngineConfig(max_model_len=80, scheduler=SchedulerConfig(max_rows=32))
    try:
        found = plan(available * MIB, settings, on_disk)
    except MemoryBudgetError:
        return
    if not found.n_disk_layers:
        return

    enough = plan(64 * GIB, settings, on_disk).kv_bytes

    def holds_rows(chunk: int) -> bool:
        scheduler = replace(settings.scheduler, prefill_chunk_tokens=chunk)
        try:
            tried = plan(available * MIB, replace(settings, scheduler=scheduler), on_disk)
        except MemoryBudgetError:
            return False
        affordable = tried.workspace_bytes <= available * MIB / 8
        return affordable and tried.kv_bytes >= enough

    others = [c for c in (1024, 512, 256, 128, 64) if c != found.prefill_tokens]
    if found.kv_bytes >= enough:
        others = [c for c in others if c > found.prefill_tokens]
    assert not any(map(holds_rows, others))


def test_an_explicit_kv_size_is_filled_to_the_last_chunk() -> None:
    found = plan(8 * GIB, EngineConfig(kv_memory_bytes=300 * MIB))
    assert 0 <= 300 * MIB - found.kv_bytes < found.kv.chunk_bytes


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(2 * GIB, sizes=WeightSizes(400 * MIB, 48 * MIB, 47 * MIB, 1 * MIB))
    message = str(refusal.value)
    assert "(4.0 GiB weights in float32)" in message
    assert "1.8 GiB of 2.0 GiB free" in message
    assert "smaller model" in message


def test_a_length_that_does_not_fit_is_refused_with_the_numbers_and_a_length_that_does() -> None:
    config = EngineConfig(max_model_len=4096)
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(200 * MIB, config)
    message = str(refusal.value)
    assert f"4096 tokens needs {4096 * TOKEN_BYTES // MIB} MiB" in message
    lower = re.search(r"lower --max-model-len to (\d+)", message)
    assert lower is not None
    fitting = replace(config, max_model_len=int(lower[1]))
    assert plan(200 * MIB, fitting).max_model_len == int(lower[1])


def test_more_kv_than_is_left_is_refused_with_both_numbers() -> None:
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(2 * GIB, EngineConfig(kv_memory_bytes=3 * GIB))
    left = usable(2 * GIB) - 105 * MIB - plan(2 * GIB).workspace_bytes
    assert "--kv-memory asks for 3.0 GiB" in str(refusal.value)
    assert f"{gib(left)} is left" in str(refusal.value)


def test_exactly_what_is_left_may_be_asked_for() -> None:
    prefill = SchedulerConfig(prefill_chunk_tokens=DEFAULT_PREFILL_TOKENS)  # or it would give way
    left = usable(2 * GIB) - 105 * MIB - plan(2 * GIB).workspace_bytes
    assert plan(2 * GIB, EngineConfig(kv_memory_bytes=left, scheduler=prefill)).kv_bytes <= left
    with pytest.raises(MemoryBudgetError, match="--kv-memory"):
        plan(2 * GIB, EngineConfig(kv_memory_bytes=left + 1, scheduler=prefill))


@pytest.mark.parametrize("available", [0, 1, MIB, 105 * MIB])
def test_tiny_budgets_are_refused(available: int) -> None:
    with pytest.raises(MemoryBudgetError, match="free memory"):
        plan(available)


@pytest.mark.parametrize("kv_memory", [0, 1, 16 * TOKEN_BYTES, 63 * TOKEN_BYTES])
def test_a_kv_store_too_small_for_any_request_is_refused(kv_memory: int) -> None:
    with pytest.raises(MemoryBudgetError, match="raise --kv-memory"):
        plan(8 * GIB, EngineConfig(kv_memory_bytes=kv_memory))


@FEW
@given(CONFIGS, BUDGETS)
def test_the_longest_request_is_admitted_to_the_pool(config: EngineConfig, available: int) -> None:
    found = plan_or_skip(available, config)
    n_tokens = found.max_model_len
    residents = Residents(found.kv, found.n_chunks, found.max_rows, found.max_slab_width)
    request = Request("r", [0] * n_tokens, SamplingParams(), lambda _: None)
    assert residents.admit(request, expected_tokens=n_tokens)


def test_a_pool_of_fewer_chunks_than_a_slab_grows_to_is_refused() -> None:
    config = EngineConfig(kv_memory_bytes=32 * TOKEN_BYTES, max_model_len=32)
    with pytest.raises(MemoryBudgetError, match="raise --kv-memory"):
        plan(8 * GIB, config)


@pytest.mark.parametrize("n_tokens", [1, 20, 64, 65, 100, 127, 1000, 4096])
def test_one_row_may_have_any_length_where_there_is_memory(n_tokens: int) -> None:
    one_row = EngineConfig(scheduler=SchedulerConfig(max_rows=1))
    assert plan(64 * GIB, replace(one_row, max_model_len=n_tokens)).max_model_len == n_tokens
    short = replace(MODEL, max_positions=n_tokens)
    found = plan_memory(short, one_row, SIZES, "position", 64 * GIB)
    assert found.max_model_len == n_tokens
    assert found.kv_bytes == TOKEN_BYTES * 64 or (
        found.kv_bytes - found.kv.chunk_bytes < n_tokens * TOKEN_BYTES
    )


@pytest.mark.parametrize("n_layers", [1, 3, 10])
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 255, 256, 257, 300, 1000, 5000, 40_000])
def test_the_pool_for_some_tokens_is_the_smallest_that_holds_them(
    n_tokens: int, n_layers: int
) -> None:
    pools = KVPools(replace(MODEL, n_layers=n_layers), FLOAT32, "row", FLOAT32)
    n_bytes = pools.bytes_for(n_tokens)
    assert pools.tokens_in(n_bytes) >= n_tokens > pools.tokens_in(n_bytes - 1)


@pytest.mark.parametrize("n_sub_batches", [1, 4])
@pytest.mark.parametrize("n_tokens", [1, 30, 108, 300, 1000])
@pytest.mark.parametrize("n_rows", [1, 7, 16, 100])
def test_where_there_is_memory_all_rows_run_at_full_length(
    n_rows: int, n_tokens: int, n_sub_batches: int
) -> None:
    scheduler = SchedulerConfig(max_rows=n_rows, n_sub_batches=min(n_sub_batches, n_rows))
    found = plan(64 * GIB, EngineConfig(max_model_len=n_tokens, scheduler=scheduler))
    residents = Residents(found.kv, found.n_chunks, found.max_rows, found.max_slab_width)
    for i in range(n_rows):
        request = Request(f"{i}", [0] * n_tokens, SamplingParams(), lambda _: None)
        assert residents.admit(request, expected_tokens=n_tokens)


# Refusals. What they suggest is tried.


def suggestions(
    message: str, available: int, config: EngineConfig
) -> list[tuple[int, EngineConfig]]:
    """What the user may do next, each by itself."""
    found = []
    if kv_memory := re.search(r"(raise|lower) --kv-memory to (\w+)", message):
        n_bytes = parse_size(kv_memory[2])
        given = config.kv_memory_bytes
        assert given is None or (n_bytes > given) == (kv_memory[1] == "raise")
        found.append((available, replace(config, kv_memory_bytes=n_bytes)))
    if length := re.search(r"lower --max-model-len to (\d+)", message):
        assert config.max_model_len is not None and int(length[1]) < config.max_model_len
        found.append((available, replace(config, max_model_len=int(length[1]))))
    if free := re.search(r"until (\w+) are free", message):
        assert parse_size(free[1]) > available
        found.append((parse_size(free[1]), config))
    assert found, message
    return found


def refused(available: int, config: EngineConfig) -> str:
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(available, config)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("available", "kv_memory", "max_model_len", "words"),
    [
        (0, None, None, "0 MiB of 0 MiB free memory"),
        (105 * MIB, None, 4096, "(105 MiB weights in float32)"),
        (140 * MIB, 60 * MIB, None, "asks for 60 MiB, 16 MiB is left"),
        (8 * GIB, 0, None, "--kv-memory asks for 0 MiB, the smallest KV cache has 1 MiB"),
        (8 * GIB, 0, 300, "raise --kv-memory to 6400KiB"),
        (8 * GIB, 63 * TOKEN_BYTES, 20, "the smallest KV cache has 1 MiB"),
        (8 * GIB, None, 5000, "asks for 5000 tokens, the model has 4096 positions"),
        (8 * GIB, 10 * MIB, 5000, "the model has 4096 positions"),
        (200 * MIB, None, 4096, "one request of 4096 tokens needs 80 MiB"),
        (8 * GIB, 10 * MIB, 1000, "one request of 1000 tokens needs 20 MiB of KV cache, 10 MiB"),
        (2 * GIB, 3 * GIB, None, "asks for 3.0 GiB, 1.7 GiB is left"),
        (2 * GIB, 3 * GIB, 4096, "lower --kv-memory to 17"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_one_mistake_is_mended_by_any_suggestion(
    available: int,
    kv_memory: int | None,
    max_model_len: int | None,
    words: str,
    device: DeviceName,
) -> None:
    config = EngineConfig(
        device=device, kv_memory_bytes=kv_memory, max_model_len=max_model_len, dtype="float32"
    )
    message = refused(available, config)
    assert words in message or device == "sim"
    for suggestion in suggestions(message, available, config):
        plan(*suggestion)


@FEW
@given(CONFIGS, BUDGETS)
def test_following_the_suggestions_ends_in_a_plan(config: EngineConfig, available: int) -> None:
    """After no more rounds than there are things that can be wrong."""
    options = (config.kv_memory_bytes, config.max_model_len)
    todo = [(available, config)]
    for _ in range(2 + sum(option is not None for option in options)):
        refusals = []
        for try_available, try_config in todo:
            try:
                plan(try_available, try_config)
            except MemoryBudgetError as error:
                refusals += suggestions(str(error), try_available, try_config)
        todo = refusals
    assert todo == []


def test_the_plan_counts_what_a_device_with_memory_of_its_own_takes(
    tiny: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are added up as they are made."""
    device_bytes: list[int] = []
    host_bytes: list[int] = []
    device = SimDevice()
    make, make_host = device.empty, device.host_empty

    def empty(n_bytes: int) -> torch.Tensor:
        device_bytes.append(n_bytes)
        return make(n_bytes)

    def host_empty(n_bytes: int) -> torch.Tensor:
        host_bytes.append(n_bytes)
        return make_host(n_bytes)

    monkeypatch.setattr(device, "empty", empty)
    monkeypatch.setattr(device, "host_empty", host_empty)
    checkpoint = open_checkpoint(tiny[0])
    config = EngineConfig(device="sim", kv_memory_bytes=3 * MIB, native=False)
    found = load(checkpoint, config, device=device).plan
    checkpoint.close()
    staged = found.max_step_tokens * found.kv.token_layer_bytes
    assert host_bytes.count(staged) == 4
    assert found.staging_bytes == 6 * staged
    assert found.staging_host_bytes == 4 * staged
    buffers = found.weights_bytes + found.kv_bytes + found.staging_host_bytes
    assert sum(host_bytes) == buffers
    assert found.windows_bytes == 2 * found.window_chunks * found.kv.chunk_layer_bytes
    on_device = found.device_slots_bytes + found.windows_bytes + found.staging_bytes
    assert sum(device_bytes) == on_device - 4 * staged
