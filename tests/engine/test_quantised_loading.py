"""Weights quantised while loading: tokens of the same numbers in float32, and fewer bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sl_serve import stored_model
from sl_serve.config import EngineConfig
from sl_serve.device import SimDevice
from sl_serve.errors import UserError
from sl_serve.llm import LLM
from sl_serve.loader import Parts
from sl_serve.plan.fit import plan_memory
from sl_serve.plan.memory import MemoryPlan
from sl_serve.plan.model_reader import read_sizes, stored_formats
from sl_serve.stored_model import plan_checkpoint
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.groups import GROUP_FORMATS, group_format
from sl_serve.weights.quantise import quantise
from sl_serve.weights.requantised import with_weights
from tests.engine.running import GREEDY, config, engine, random_prompts, run
from tests.models import write_tiny_llama, write_tiny_opt
from tests.weights.blocks import Kind
from tests.weights.tiny_models import tiny_llama, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

N_LAYERS = 3
PROMPTS = random_prompts(4, longest=40, seed=4)
SHORT = replace(GREEDY, max_tokens=10)
# What is asked for -> kind and largest group of a layer's matrices.
WEIGHTS = {
    "int8": ("int8_sym", 64),
    "int4": ("int4_min", 64),
    "fp8": ("fp8", 128),
    "int4_g128": ("int4", 128),
    "int8_g32": ("int8", 32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 128 and of 96, which 64 does not divide."""
    path = tmp_path_factory.mktemp("llama")
    write_tiny_llama(path, hidden_size=128, intermediate_size=96, tie_word_embeddings=False)
    return path


def dequantised(folder: Path, to: Path, weights: str) -> Path:
    """The same model with every matrix rounded to the groups it is to be in, as float32."""
    kind, largest = WEIGHTS[weights]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            in_layer = ".layers." in name
            n_in = tensor.shape[1]
            groups = group_format(*((kind, n_in, largest) if in_layer else ("int8_sym", n_in, 64)))
            assert groups is not None
            packed = torch.empty(len(tensor), groups.format.row_bytes(n_in), dtype=torch.uint8)
            quantise(tensor, groups, packed)
            tensors[name] = groups.format.widen(packed)
    for file in folder.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_bytes(file.read_bytes())
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module", params=WEIGHTS)
def weights(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(
    folder: Path, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    plain = dequantised(folder, tmp_path_factory.mktemp("plain"), weights)
    with engine(plain, config(max_rows=6)) as running:
        return run(running, PROMPTS, SHORT)


@pytest.mark.parametrize(("native", "max_rows"), [(True, 1), (True, 6), (False, 6)])
def test_tokens_are_those_of_dequantised_weights(
    folder: Path, weights: str, expected: list[list[int]], native: bool, max_rows: int
) -> None:
    settings = replace(config(max_rows=max_rows), native=native, weights=weights)
    with engine(folder, settings) as running:
        assert run(running, PROMPTS, SHORT) == expected


def test_a_device_computes_with_the_same_numbers(
    folder: Path, weights: str, expected: list[list[int]]
) -> None:
    settings = replace(config(max_rows=6), weights=weights)
    with engine(folder, settings, SimDevice()) as running:
        assert run(running, PROMPTS, SHORT) == expected


def test_layers_on_disk_are_spooled_in_groups(
    folder: Path,
    weights: str,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(*args: object) -> MemoryPlan:
        return replace(plan_memory(*args), n_disk_layers=2)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_model, "plan_memory", planned)
    found: list[Parts] = []
    settings = replace(config(max_rows=6), disk_dir=str(tmp_path), weights=weights)
    with engine(folder, settings, change=found.append) as running:
        assert run(running, PROMPTS, SHORT) == expected
        assert found[0].store.n_disk_bytes_read >= 2 * found[0].store.layout.image_bytes


def test_tokens_differ_between_weights(folder: Path, expected: list[list[int]]) -> None:
    """So a path that left the weights alone would show. Bits of fp8 and int8 are many."""
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    with engine(folder, replace(config(max_rows=6), weights="int4")) as running:
        quantised = run(running, PROMPTS, SHORT)
    with engine(folder, config(max_rows=6)) as running:
        assert run(running, PROMPTS, SHORT) != quantised


def test_the_plan_counts_stored_bytes(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    plan = plan_checkpoint(checkpoint, replace(config(max_rows=2), weights="int4_g128"))
    quantised = with_weights(checkpoint, "int4_g128")
    sizes = read_sizes(
        "tiny", checkpoint.config, torch.float32, torch.float32, stored_formats(quantised)
    )
    # q, k, v, o, gate and up have 128 inputs; down has 96 and groups of 32
    matrices = (128 + 64 + 64 + 128 + 96 + 96) * 68 + 128 * 3 * 20
    vectors = 2 * 128 * 4
    assert plan.weights_bytes == N_LAYERS * 4096 * math.ceil((matrices + vectors) / 4096)
    assert sizes.layer_bytes * N_LAYERS == plan.weights_bytes
    vocabulary = 272 * 2 * 68  # embedding and head, int8 in groups of 64
    assert plan.static_bytes == sizes.static_bytes == 2 * vocabulary + 128 * 4
    checkpoint.close()


def test_matrices_are_at_most_27_percent_of_bfloat16(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, hidden_size=256, intermediate_size=512)
    quantised = with_weights(open_checkpoint(tmp_path), "int4_g128")
    for name in quantised.names():
        if ".layers." in name and len(quantised.shape(name)) == 2:
            n_elements = math.prod(quantised.shape(name))
            assert quantised.read_blocks(name).numel() <= 0.27 * 2 * n_elements
    quantised.close()


def test_bfloat16_is_rounded_to(folder: Path, tmp_path: Path) -> None:
    tensors = {
        name: t.bfloat16().float() if t.dim() == 2 else t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with engine(tmp_path, config(max_rows=6)) as running:
        expected = run(running, PROMPTS, SHORT)
    for device in (None, SimDevice()):
        with engine(folder, replace(config(max_rows=6), weights="bf16"), device) as running:
            assert run(running, PROMPTS, SHORT) == expected


def test_bytes_of_a_checkpoint_in_bfloat16_are_left_where_they_are(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, dtype=torch.bfloat16).bfloat16().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    same = with_weights(checkpoint, "bf16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert same.location(name) == checkpoint.location(name) is not None
    assert with_weights(checkpoint, "auto") is checkpoint
    assert with_weights(checkpoint, "int4").location(name) is None
    checkpoint.close()


def test_rows_that_no_group_divides_stay_plain(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, hidden_size=64, intermediate_size=80)
    quantised = with_weights(open_checkpoint(tmp_path), "int4")
    formats = {n: quantised.format(n).name for n in quantised.names()}
    layer = "model.layers.0."
    assert formats[layer + "mlp.down_proj.weight"] == "float32"
    assert formats[layer + "mlp.up_proj.weight"] == "int4_g64_min"
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == "int8_g64_sym"
    assert formats[layer + "input_layernorm.weight"] == "float32"
    with engine(tmp_path, replace(config(max_rows=2), weights="int4")) as running:
        assert len(run(running, PROMPTS[:1], SHORT)[0]) == 10
    quantised.close()


def test_learned_positions_and_projections_stay_plain(tmp_path: Path) -> None:
    write_tiny_opt(tmp_path)
    with engine(tmp_path, replace(config(max_rows=2), weights="int8")) as running:
        tokens = run(running, PROMPTS[:2], SHORT)
    with engine(tmp_path, replace(config(max_rows=2), weights="int8"), SimDevice()) as running:
        assert run(running, PROMPTS[:2], SHORT) == tokens


def test_a_gguf_is_quantised_again_but_for_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_tiny_gguf(path, tiny_llama(hidden_size=128), quantisation=Kind.Q4_1)
    checkpoint = open_checkpoint(path)
    quantised = with_weights(checkpoint, "int4")
    assert quantised.format("model.embed_tokens.weight").name == "q4_1"
    name = "model.layers.1.self_attn.q_proj.weight"
    assert quantised.format(name).name == "int4_g64_min"
    packed = torch.empty(128, 2 * 36, dtype=torch.uint8)
    quantise(checkpoint.read(name), GROUP_FORMATS["int4_g64_min"], packed)
    assert torch.equal(quantised.read_blocks(name), packed)
    checkpoint.close()


def test_an_unknown_word_is_refused_with_those_there_are(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match="'int3' is not known; there are: auto, bf16, int8, int4"):
        plan_checkpoint(checkpoint, EngineConfig(weights="int3"))
    checkpoint.close()


def test_the_python_class_takes_weights_too(folder: Path) -> None:
    settings = replace(config(max_rows=6), weights="int8")
    with LLM(str(folder), settings) as llm:
        answers = llm.generate(PROMPTS, SHORT)
    with engine(folder, settings) as running:
        assert run(running, PROMPTS, SHORT) == [a.token_ids for a in answers]
