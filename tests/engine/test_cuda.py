"""On a GPU: the same tokens, the memory that was planned, and nothing that waits for all of it.

`scripts/gpu-check` runs these where there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sl_serve import stored_model
from sl_serve.config import DTypeName, EngineConfig
from sl_serve.device import CudaDevice, Stream
from sl_serve.engine import Engine
from sl_serve.loader import load
from sl_serve.ops import choose_ops
from sl_serve.ops.device_ops import DeviceOps, find_flash_attention
from sl_serve.weights.dummy import open_dummy
from sl_serve.weights.formats import BLOCK_FORMATS
from sl_serve.weights.quantised import QuantisedRows
from tests.engine.running import GREEDY, config, engine, random_prompts, run, steps_of
from tests.engine.test_cuda_ops import CASES, Case, Window
from tests.engine.test_gguf_weights import TOKENIZER, TOKENS
from tests.engine.test_ops import relative_error
from tests.weights.blocks import KINDS, Kind, random_rows
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU here; scripts/gpu-check runs these on one"
    ),
]

PROMPTS = random_prompts(14, longest=70, seed=3)
CUDA = torch.device("cuda", 0)


def settings_of(dtype: DTypeName = "float32", **scheduler: int) -> EngineConfig:
    settings = config(max_rows=14, prefill_chunk_tokens=48, **scheduler)
    return replace(settings, device="cuda", dtype=dtype)


@pytest.fixture(params=["streamed", "resident"])
def placement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tiny models fit onto any GPU, layers and KV. Without a ceiling of its own the device counts
    as host memory, and everything passes through it."""
    if request.param == "streamed":
        monkeypatch.setattr(stored_model, "device_budget_bytes", lambda *_: None)
    return str(request.param)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("n_sub_batches", [1, 3])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_in_float32_the_tokens_are_the_processors(
    folder: Path, placement: str, look_ahead: int, n_sub_batches: int
) -> None:
    with engine(folder, config(max_rows=14)) as running:
        expected = run(running, PROMPTS)
    settings = settings_of(look_ahead=look_ahead, n_sub_batches=n_sub_batches)
    with engine(folder, settings) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS) == expected
    crossed = sum(s.weight_bytes + s.kv_down_bytes for s in steps)
    assert (crossed == 0) is (placement == "resident")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("look_ahead", [1, 3])
def test_in_16_bits_the_tokens_are_the_serial_twins(
    folder: Path, placement: str, look_ahead: int, dtype: DTypeName
) -> None:
    with engine(folder, settings_of(dtype, look_ahead=0, n_sub_batches=2)) as running:
        expected = run(running, PROMPTS)
    with engine(folder, settings_of(dtype, look_ahead=look_ahead, n_sub_batches=2)) as running:
        assert run(running, PROMPTS) == expected


def test_without_pinned_memory_the_tokens_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_model, "device_budget_bytes", lambda *_: None)
    with engine(folder, settings_of(n_sub_batches=2)) as running:
        expected = run(running, PROMPTS)
    device = CudaDevice()
    monkeypatch.setattr(device, "_pinned", _NothingPinned())
    # `engine` takes a device of the caller's for the simulated one.
    with engine(folder, settings_of(n_sub_batches=2), device) as running:
        assert run(running, PROMPTS) == expected


class _NothingPinned:
    def __contains__(self, tensor: torch.Tensor) -> bool:
        return False

    def empty(self, n_bytes: int) -> torch.Tensor:
        return torch.zeros(n_bytes, dtype=torch.uint8)

    def close(self) -> None:
        pass


def test_a_refused_registration_leaves_no_error_behind() -> None:
    device = CudaDevice()
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(0, 0, 0)) != 0
    device._clear_error()
    assert torch.ones(3, device=CUDA).sum().item() == 3.0


def test_host_memory_is_pinned_as_torch_sees_it() -> None:
    device = CudaDevice()
    buffer = device.host_empty(5_000_000)
    assert buffer.is_pinned()
    device.close()
    assert not buffer.is_pinned()


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_kv_heads", "group"), [(3, 1), (2, 4)])
def test_attention_is_exact(case: Case, dtype: torch.dtype, n_kv_heads: int, group: int) -> None:
    window = Window(case, n_kv_heads, group, dtype)
    device = CudaDevice()
    expected = window.expected()
    for name in ("memory", "q", "k", "v"):
        setattr(window, name, getattr(window, name).to(CUDA))
    found = window.attended(DeviceOps(device, dtype, find_flash_attention(CUDA, dtype)))
    tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    assert relative_error(found.cpu(), expected) <= tolerance


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ops_class", ["DeviceOps", "TritonOps"])
def test_blocks_are_expanded_exactly(kind: Kind, dtype: torch.dtype, ops_class: str) -> None:
    pytest.importorskip("triton")
    from sl_serve.ops.triton_ops import TritonOps

    ops = {"DeviceOps": DeviceOps, "TritonOps": TritonOps}[ops_class](CudaDevice(), dtype)
    rows = torch.from_numpy(random_rows(kind, 70, 1024))
    format = BLOCK_FORMATS[kind.name.lower()]
    out = torch.full((70, 1024), torch.nan, dtype=dtype, device=CUDA)
    ops.expand(QuantisedRows(rows.to(CUDA), format).t(), out.t())
    assert torch.equal(out.cpu(), format.widen(rows).to(dtype))


def test_a_gpu_with_triton_uses_it() -> None:
    pytest.importorskip("triton")
    assert choose_ops("float16", 1, device=CudaDevice()).name.endswith(", triton")


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_tokens_of_layers_in_blocks_are_the_processors(
    tmp_path: Path, placement: str, look_ahead: int
) -> None:
    path = tmp_path / "tiny.gguf"
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 256, "intermediate_size": 512}
    model = tiny_llama(**sizes, initializer_range=0.2)
    write_tiny_gguf(path, model, quantisation=Kind.Q4_K, settings=TOKENIZER)
    with engine(path, config(max_rows=14)) as running:
        expected = run(running, PROMPTS)
    with engine(path, settings_of(look_ahead=look_ahead, n_sub_batches=2)) as running:
        assert run(running, PROMPTS) == expected


CUBLAS_BYTES = 64 << 20  # its workspaces, taken once; outside of every plan


def test_memory_stays_within_the_plan(placement: str) -> None:
    """And no buffer grows once the largest step has been."""
    checkpoint = open_dummy("opt-125m")
    settings = replace(settings_of("float16", n_sub_batches=2), kv_memory_bytes=64 << 20)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    parts = load(checkpoint, settings)
    running = Engine(parts, checkpoint.load_tokenizer(), settings)
    try:
        run(running, PROMPTS)
        reserved = torch.cuda.memory_reserved()
        run(running, PROMPTS)
        assert torch.cuda.max_memory_reserved() == reserved
        assert torch.cuda.max_memory_allocated() <= parts.plan.device_bytes + CUBLAS_BYTES
        assert (parts.plan.n_device_layers > 0) is (placement == "resident")
    finally:
        running.close()


def calls_under_profile(work: Callable[[], object]) -> Counter[str]:
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        work()
    return Counter({event.key: event.count for event in profile.key_averages()})


def test_nothing_waits_for_the_whole_device(folder: Path, placement: str) -> None:
    """Ten steps and more: streams and events are waited for, never all; nothing is allocated."""
    with engine(folder, settings_of("float16", n_sub_batches=2)) as running:
        run(running, PROMPTS)
        steps = steps_of(running)
        calls = calls_under_profile(lambda: run(running, PROMPTS, GREEDY))
        assert len(steps) >= 10
    of_the_profiler = calls_under_profile(lambda: None)
    assert calls["cudaLaunchKernel"] > 0, "the profiler sees the engine's thread"
    assert calls["cudaDeviceSynchronize"] <= of_the_profiler["cudaDeviceSynchronize"]
    assert calls["cudaMalloc"] == calls["cudaHostAlloc"] == 0


def test_copies_run_beside_the_arithmetic() -> None:
    """A long copy and a long product overlap, as the timeline tells."""
    device = CudaDevice()
    source, slot = device.host_empty(1 << 28), device.empty(1 << 28)
    a = torch.randn(4096, 4096, device=CUDA)
    torch.mm(a, a)
    device.synchronize(device.record(Stream.COMPUTE))
    device.start_timeline()
    device.copy(Stream.LOAD, slot, source, "weights")
    for _ in range(20):
        torch.mm(a, a)
    device.computed(0.0, (), "layer")
    load, layer = device.take_timeline()
    assert load.start_s < layer.stop_s and layer.start_s < load.stop_s
    device.close()
