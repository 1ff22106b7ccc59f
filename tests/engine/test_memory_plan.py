from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from sl_serve.config import EngineConfig, ModelConfig, SchedulerConfig
from sl_serve.errors import MemoryBudgetError, UserError
from sl_serve.plan.budget import available_bytes, gib, parse_size
from sl_serve.plan.memory import (
    DEFAULT_PREFILL_TOKENS,
    MARGIN_SHARE,
    MemoryPlan,
    WeightSizes,
    plan_memory,
)

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
SIZES = WeightSizes(layer_bytes=10 * MIB, static_bytes=5 * MIB)
TOKEN_BYTES = 2 * 10 * 4 * 64 * 4  # K and V, layers, heads, elements, bytes


def plan(
    available: int, config: EngineConfig | None = None, sizes: WeightSizes = SIZES
) -> MemoryPlan:
    return plan_memory(MODEL, config or EngineConfig(), sizes, 4, "position", available)


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
    assert 3 * 512 * 4 <= per_token <= (3 * 512 + 4 * 1024) * 4


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


def test_an_explicit_kv_size_is_filled_to_the_last_chunk() -> None:
    found = plan(8 * GIB, EngineConfig(kv_memory_bytes=300 * MIB))
    assert 0 <= 300 * MIB - found.kv_bytes < found.kv.chunk_bytes


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(MemoryBudgetError) as refusal:
        plan(2 * GIB, sizes=WeightSizes(400 * MIB, 96 * MIB))
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
    left = usable(2 * GIB) - 105 * MIB - plan(2 * GIB).workspace_bytes
    assert plan(2 * GIB, EngineConfig(kv_memory_bytes=left)).kv_bytes <= left
    with pytest.raises(MemoryBudgetError, match="--kv-memory"):
        plan(2 * GIB, EngineConfig(kv_memory_bytes=left + 1))


@pytest.mark.parametrize("available", [0, 1, MIB, 105 * MIB])
def test_tiny_budgets_are_refused(available: int) -> None:
    with pytest.raises(MemoryBudgetError, match="free memory"):
        plan(available)


@pytest.mark.parametrize("kv_memory", [0, 1, 16 * TOKEN_BYTES, 63 * TOKEN_BYTES])
def test_a_kv_store_too_small_for_any_request_is_refused(kv_memory: int) -> None:
    with pytest.raises(MemoryBudgetError, match="raise --kv-memory"):
        plan(8 * GIB, EngineConfig(kv_memory_bytes=kv_memory))


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8589934592", 8 * GIB),
        ("0", 0),
        ("512B", 512),
        ("700MB", 700_000_000),
        ("700 MB", 700_000_000),
        ("8G", 8_000_000_000),
        ("8GiB", 8 * GIB),
        (" 8gib ", 8 * GIB),
        ("8Gi", 8 * GIB),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8 X", "-1", "1e9", "8GG", "1.GB", "0x10", "8 Gi B"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="8GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 MiB"), (700 * MIB, "700 MiB"), (GIB, "1.0 GiB"), (41.25 * GIB, "41.2 GiB")],
)
def test_sizes_are_written_for_people(n_bytes: float, text: str) -> None:
    assert gib(n_bytes) == text


Memory = namedtuple("Memory", "available")


@pytest.fixture
def free_10_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(10 * GIB))


CGROUP_FILES = {
    "v2_limit": "memory.max",
    "v2_usage": "memory.current",
    "v1_limit": "memory/memory.limit_in_bytes",
    "v1_usage": "memory/memory.usage_in_bytes",
}


def cgroup(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        path = folder / CGROUP_FILES[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


@pytest.mark.usefixtures("free_10_gib")
class TestAvailable:
    def test_without_control_groups_it_is_what_the_kernel_estimates(self, tmp_path: Path) -> None:
        assert available_bytes(tmp_path) == 10 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_a_nearer_limit_counts_less_what_is_used(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": 4 * GIB, f"{version}_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 3 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_a_limit_further_off_does_not(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": 64 * GIB, f"{version}_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 10 * GIB

    def test_max_is_no_limit(self, tmp_path: Path) -> None:
        assert available_bytes(cgroup(tmp_path, v2_limit="max", v2_usage=GIB)) == 10 * GIB

    def test_version_ones_number_for_no_limit_is_none(self, tmp_path: Path) -> None:
        files = {"v1_limit": 0x7FFFFFFFFFFFF000, "v1_usage": GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 10 * GIB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_use_beyond_the_limit_leaves_nothing(self, tmp_path: Path, version: str) -> None:
        files = {f"{version}_limit": GIB, f"{version}_usage": 2 * GIB}
        assert available_bytes(cgroup(tmp_path, **files)) == 0

    def test_a_limit_without_a_use_is_not_believed(self, tmp_path: Path) -> None:
        assert available_bytes(cgroup(tmp_path, v2_limit=GIB)) == 10 * GIB
