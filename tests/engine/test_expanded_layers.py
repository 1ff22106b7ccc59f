"""Layers in blocks on a device with memory of its own: they cross the link as stored, and are
expanded once per layer and step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from sl_serve import loader, stored_model
from sl_serve.config import AttentionPlacement, DTypeName, EngineConfig
from sl_serve.device import Device, SimDevice, Stream
from sl_serve.device.sim import HardwareProfile, SlotReuseError
from sl_serve.errors import MemoryBudgetError
from sl_serve.loader import Parts
from sl_serve.ops import TorchOps, torch_ops
from sl_serve.ops.torch_ops import EXPANDED_ELEMENTS
from sl_serve.plan import step_memory
from sl_serve.plan.activations import PeakBytes
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.expander import Expander
from sl_serve.weights.formats import BLOCK_FORMATS, WIDENING_BYTES
from sl_serve.weights.host import host_images
from sl_serve.weights.layout import LayerLayout, LayerWeights, Param
from sl_serve.weights.store import LayerStore
from sl_serve.weights.streamer import StreamedWeights
from tests.engine.fake_cuda import FakeRuntime, LazyCudaDevice, fake_cuda
from tests.engine.running import GREEDY, config, engine, random_prompts, run, steps_of
from tests.engine.test_gguf_weights import MIXED, write_in_blocks
from tests.weights.blocks import Kind, random_rows
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("one_thread", "layers_measured_once")

N_LAYERS = 4
PROMPTS = random_prompts(4, longest=40, seed=4)
SHORT = replace(GREEDY, max_tokens=6)
PLAIN_LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FILES = {
    "Q4_1": (Kind.Q4_1, {}),
    "mixed": (Kind.Q4_K, MIXED | {f"blk.3.{name}.weight": Kind.F32 for name in PLAIN_LAYER}),
}
MIB = 1 << 20


@pytest.fixture(scope="module", params=FILES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_in_blocks(path, *FILES[request.param], n_layers=N_LAYERS, tied=request.param == "mixed")
    return path


def tokens(
    path: Path,
    settings: EngineConfig,
    device: Device | None = None,
    change: Callable[[Parts], None] = lambda _: None,
) -> list[list[int]]:
    with engine(path, settings, device, change) as running:
        return run(running, PROMPTS, SHORT)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    """The processor's."""
    return tokens(path, config(max_rows=6))


@pytest.mark.parametrize("attention", ["device", "host"])
@pytest.mark.parametrize("n_sub_batches", [1, 3])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_tokens_are_the_processors(
    path: Path,
    expected: list[list[int]],
    look_ahead: int,
    n_sub_batches: int,
    attention: AttentionPlacement,
) -> None:
    settings = config(max_rows=6, look_ahead=look_ahead, n_sub_batches=n_sub_batches)
    assert tokens(path, replace(settings, attention=attention), SimDevice()) == expected


def test_two_layers_are_in_use_where_the_processor_attends(
    path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(config(max_rows=6, n_sub_batches=3), attention="host")
    monkeypatch.setattr(loader, "n_layers_in_use", lambda *_: 1)
    assert tokens(path, settings, SimDevice()) != expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_tokens_are_those_of_weights_dequantised_while_loading(
    path: Path, dtype: DTypeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(config(max_rows=6, n_sub_batches=2), dtype=dtype)
    found = tokens(path, settings, SimDevice())
    monkeypatch.setattr(stored_model, "stored_formats", lambda *_, **__: {})
    assert found == tokens(path, settings, SimDevice())


def planned(path: Path, settings: EngineConfig) -> MemoryPlan:
    checkpoint = open_checkpoint(path)
    try:
        return plan_checkpoint(checkpoint, replace(settings, device="sim"))
    finally:
        checkpoint.close()


@pytest.fixture
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small beside these layers as it is beside real ones."""
    for module in (torch_ops, step_memory):
        monkeypatch.setattr(module, "EXPANDED_ELEMENTS", 1 << 14)


@pytest.mark.usefixtures("small_scratch")
def test_tokens_are_the_same_in_any_budget(path: Path, expected: list[list[int]]) -> None:
    """From no layer on the device over some and all, as stored, to all of them expanded."""
    settings = config(max_rows=6)
    seen = set()
    for n_bytes in (*range(6 * MIB, 20 * MIB, MIB // 4), 64 * MIB):
        budget = replace(settings, device_memory_bytes=n_bytes)
        try:
            plan = planned(path, budget)
        except MemoryBudgetError:
            continue
        assert plan.device_bytes <= n_bytes
        placed = plan.n_device_layers, plan.expansion_bytes > 0, plan.device_kv_bytes > 0
        if placed not in seen:
            seen.add(placed)
            assert tokens(path, budget, SimDevice()) == expected
    assert {(0, True, False), (N_LAYERS, False, True)} <= seen and len(seen) > 2


def test_a_few_layers_stay_as_stored(
    path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_on_the_device(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), n_device_layers=2)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", two_on_the_device)
    with engine(path, config(max_rows=6, n_sub_batches=2), SimDevice()) as running:
        steps = steps_of(running)
        assert run(running, PROMPTS, SHORT) == expected
    layers = crossing_bytes(path, 4)
    assert {s.weight_bytes for s in steps} == {layers[0] + layers[2]}


@pytest.mark.parametrize(("limit_bytes", "look_ahead"), [(1 << 60, 2), (1 << 60, 0), (0, 1)])
def test_tokens_are_the_same_with_copies_as_late_as_a_gpu_may_make_them(
    path: Path,
    expected: list[list[int]],
    limit_bytes: int,
    look_ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(max_rows=6, n_sub_batches=2, look_ahead=look_ahead)
    with fake_cuda(FakeRuntime(limit_bytes), slot_bytes=4096):
        device = LazyCudaDevice(torch.device("cpu"))
        monkeypatch.setattr(device, "_clear_error", lambda: None)
        assert tokens(path, settings, device) == expected


def rounded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def crossing_bytes(path: Path, itemsize: int) -> list[int]:
    """Of each layer, as the gguf package tells: matrices as stored, vectors in the compute dtype,
    what lies side by side in one format together."""
    raw = {t.name: t for t in gguf.GGUFReader(path).tensors}
    found = []
    for layer in range(N_LAYERS):

        def tensor(name: str, layer: int = layer) -> tuple[Kind, int]:
            at = raw[f"blk.{layer}.{name}.weight"]
            # A device gets plain numbers as it computes with them.
            in_blocks = at.tensor_type not in (Kind.F32, Kind.F16, Kind.BF16)
            n_bytes = int(at.n_bytes) if in_blocks else int(at.n_elements) * itemsize
            return at.tensor_type if in_blocks else Kind.F32, n_bytes

        image = 0
        for names in (
            ("attn_norm",),
            ("attn_q", "attn_k", "attn_v"),
            ("attn_output",),
            ("ffn_norm",),
            ("ffn_gate", "ffn_up"),
            ("ffn_down",),
        ):
            runs: list[tuple[Kind, int]] = []
            for kind, n_bytes in map(tensor, names):
                if runs and runs[-1][0] == kind:
                    runs[-1] = kind, runs[-1][1] + n_bytes
                else:
                    runs.append((kind, n_bytes))
            image += sum(rounded(n_bytes, 256) for _, n_bytes in runs)
        found.append(rounded(image, 4096))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("look_ahead", [0, 2])
def test_what_crosses_the_link_in_a_step_is_what_is_stored(
    path: Path, look_ahead: int, dtype: DTypeName
) -> None:
    settings = replace(config(max_rows=6, n_sub_batches=2, look_ahead=look_ahead), dtype=dtype)
    device = SimDevice()
    with engine(path, settings, device) as running:
        steps = steps_of(running)
        run(running, PROMPTS, SHORT)
    layers = crossing_bytes(path, 4 if dtype == "float32" else 2)
    assert {s.weight_bytes for s in steps} == {sum(layers)}
    crossed = sum(s.weight_bytes + s.kv_down_bytes for s in steps)
    ahead = sum(layers[:look_ahead])  # of a step that never came
    assert device.n_bytes_down == crossed + ahead


def test_four_bits_and_two_scales_are_a_bit_more_than_a_quarter(tmp_path: Path) -> None:
    """20 bytes per 32 numbers: 0.3125 of 16 bits, and whole pages."""
    path = tmp_path / "tiny.gguf"
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    write_tiny_gguf(path, model, quantisation=Kind.Q4_1, settings={})
    checkpoint = open_checkpoint(path)
    settings = EngineConfig(device="sim", dtype="bfloat16")
    layout = stored_model.StoredModel.of(checkpoint, settings).layout
    checkpoint.close()
    n_numbers = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 512
    stored, vectors = n_numbers * 20 // 32, 2 * 256 * 2
    assert layout.stored_bytes(0) == rounded(stored + vectors, 4096)
    assert layout.expanded_bytes == rounded(2 * n_numbers + vectors, 4096)


def test_buffers_are_those_of_the_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers on the device are added up as they are made; scratch for widening is torch's."""
    device, sizes = SimDevice(), []
    make = device.empty

    def empty(n_bytes: int) -> torch.Tensor:
        sizes.append(n_bytes)
        return make(n_bytes)

    monkeypatch.setattr(device, "empty", empty)
    found: list[Parts] = []
    with engine(path, config(max_rows=6), device, change=found.append):
        plan = found[0].plan
    scratch = EXPANDED_ELEMENTS * WIDENING_BYTES
    staging = plan.staging_bytes - plan.staging_host_bytes
    passing = plan.device_slots_bytes + plan.expansion_bytes - scratch
    assert sum(sizes) == passing + plan.windows_bytes + staging
    assert plan.device_bytes == sum(sizes) + scratch + plan.workspace_bytes + (
        plan.static_device_bytes
    )
    uploaded = {id(t): t.nbytes for t in found[0].sweep.static.values()}
    assert sum(uploaded.values()) == plan.static_device_bytes
    embedding = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    assert plan.static_bytes - plan.static_device_bytes == int(embedding.n_bytes)


def test_budgets_are_ceilings_and_a_refusal_says_what_would_do(path: Path) -> None:
    n_bytes, plan = 1 * MIB, None
    for _ in range(4):  # where there is more room, prompts are read in larger pieces
        settings = replace(config(max_rows=6), device_memory_bytes=n_bytes)
        try:
            plan = planned(path, settings)
            break
        except MemoryBudgetError as refusal:
            enough = re.search(r"raise --device-memory to (\d+)MiB", str(refusal))
            assert enough is not None and int(enough[1]) * MIB > n_bytes
            n_bytes = int(enough[1]) * MIB
    assert plan is not None and 0 < plan.device_bytes <= n_bytes


@pytest.mark.parametrize("format", BLOCK_FORMATS.values(), ids=lambda f: f.name)
def test_widening_takes_no_more_than_is_planned(format: object) -> None:
    from sl_serve.weights.formats import Format

    assert isinstance(format, Format)
    rows = torch.zeros(8, format.row_bytes(4096), dtype=torch.uint8)
    with torch.inference_mode(), PeakBytes() as alive:
        widened = format.widen(rows)
    assert 0 < alive.peak_bytes <= WIDENING_BYTES * widened.numel()


# The order of streams, as in test_streamer.py, on a source of its own.

PARAMS = [Param("matrix", (256, 24), ("m",), (24,)), Param("vector", (70,), ("v",), (70,))]
LAYOUT = LayerLayout(PARAMS, torch.float32, {"m": BLOCK_FORMATS["q4_k"]}, 1)
N_UNITS_LAYERS = 5
# A layer crosses in one second and is expanded in a tenth of one; a cell computes for two.
MOVED_BYTES = LAYOUT.image_bytes + LAYOUT.expanded_bytes
PROFILE = HardwareProfile("test", LAYOUT.image_bytes, LAYOUT.image_bytes, 1.0, 10 * MOVED_BYTES)


def store() -> LayerStore:
    images = host_images(LAYOUT, range(N_UNITS_LAYERS))
    for i, image in images.items():
        views = LAYOUT.views(image, 0)
        rows = torch.from_numpy(random_rows(Kind.Q4_K, 24, 256, largest=0.25 + i))
        views["matrix"].parts[0].data.copy_(rows)  # type: ignore[union-attr]
        views["vector"].fill_(i)  # type: ignore[union-attr]
    return LayerStore(LAYOUT, images)


def source_of(
    look_ahead: int, kind: type[StreamedWeights] = StreamedWeights, n_resident: int = 0
) -> tuple[StreamedWeights, SimDevice]:
    device, host = SimDevice(PROFILE), store()
    resident = {i: host.host_images[i] for i in range(n_resident)}
    streamed = {i: m for i, m in host.host_images.items() if i not in resident}
    expander = Expander(device, TorchOps(torch.float32), LAYOUT)
    return kind(device, LayerStore(LAYOUT, streamed), look_ahead, resident, expander), device


def sweep(source: StreamedWeights, device: SimDevice, n_steps: int = 2) -> list[LayerWeights]:
    """Two cells a layer; what each read."""
    seen = []
    for _ in range(n_steps * N_UNITS_LAYERS):
        weights = source.acquire()
        for part in range(2):
            source.advance(part, 2)
            seen.append({name: tensor.clone() for name, tensor in weights.items()})
            device.computed(2.0, (source.buffer(),))
        source.release()
    return seen


def fault(look_ahead: int, kind: type[StreamedWeights], n_resident: int = 0) -> str:
    source, device = source_of(look_ahead, kind, n_resident)
    try:
        seen = sweep(source, device)
    except SlotReuseError:
        return "reused"
    images = store().host_images
    expected = [LAYOUT.views(images[i], 0) for i in range(N_UNITS_LAYERS)]
    for cell, found in enumerate(seen):
        right = expected[cell // 2 % N_UNITS_LAYERS]
        if any(t.isnan().any() for t in found.values()):
            return "poisoned"
        widened = right["matrix"].parts[0].widened().t()  # type: ignore[union-attr]
        if not torch.equal(found["matrix"], widened) or found["vector"][0] != right["vector"][0]:
            return "wrong"
    return ""


class ForgetsLoaded(StreamedWeights):
    def acquire(self) -> LayerWeights:
        wait = self._device.wait
        self._device.wait = lambda *_: None  # type: ignore[method-assign]
        try:
            return super().acquire()
        finally:
            self._device.wait = wait  # type: ignore[method-assign]


class ReleasesBeforeExpanding(StreamedWeights):
    def _ready(self, weights: LayerWeights, image: torch.Tensor) -> LayerWeights:
        self._early = self._device.record(Stream.COMPUTE)
        return super()._ready(weights, image)

    def advance(self, part: int, n_parts: int) -> None:
        self._released[self._slot(self._unit)] = self._early
        super().advance(part, n_parts)


class ExpandsTheFirstOnly(StreamedWeights):
    def _ready(self, weights: LayerWeights, image: torch.Tensor) -> LayerWeights:
        assert self._expander is not None
        return super()._ready(weights, image) if self._layer == 0 else self._expander._views[0, 0]


LOOK_AHEADS = [0, 1, 2, 3]


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
@pytest.mark.parametrize("n_resident", [0, 2, 5])
def test_every_cell_reads_its_layer_expanded(look_ahead: int, n_resident: int) -> None:
    assert fault(look_ahead, StreamedWeights, n_resident) == ""


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
def test_faults_are_noticed(look_ahead: int) -> None:
    # Without its waits the serial twin also copies into a slot that is being read.
    assert fault(look_ahead, ForgetsLoaded) == ("poisoned" if look_ahead else "reused")
    assert fault(look_ahead, ExpandsTheFirstOnly) == "wrong"
    if look_ahead:  # the serial twin releases after the last cell
        assert fault(look_ahead, ReleasesBeforeExpanding) == "reused"
