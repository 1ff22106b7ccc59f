from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sl_serve.config import DTypeName, EngineConfig, ModelConfig
from sl_serve.core import SamplingParams
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.llm import LLM, UNBOUNDED_QUEUE
from sl_serve.weights.dummy import DummyCheckpoint, open_dummy
from sl_serve.weights.dummy_tokenizer import dummy_tokenizer
from sl_serve.weights.shapes import SHAPES
from tests.models import EOS, write_tokenizer

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 600,
        "max_position_embeddings": 128,
        "dtype": "bfloat16",
    },
    "opt": {
        "model_type": "opt",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "ffn_dim": 256,
        "num_attention_heads": 4,
        "vocab_size": 600,
        "max_position_embeddings": 128,
        "dtype": "float16",
    },
}
# As their publishers count them; a shared head once.
N_PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.fixture(params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY[request.param]))
    return tmp_path


def n_parameters(checkpoint: DummyCheckpoint) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


@pytest.mark.parametrize("name", [n for n in SHAPES if re.fullmatch(r".*-[\d.]+[mb]", n)])
def test_shapes_have_the_number_of_parameters_in_their_name(name: str) -> None:
    count, unit = float(name.rsplit("-", 1)[1][:-1]), name[-1]
    actual = n_parameters(open_dummy(name))
    assert actual == pytest.approx(count * {"m": 1e6, "b": 1e9}[unit], rel=0.06)


@pytest.mark.parametrize("name", N_PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert n_parameters(open_dummy(name)) == N_PARAMETERS[name]


def test_weights_are_the_same_every_time_and_differ_between_tensors(folder: Path) -> None:
    first, second = open_dummy(str(folder)), open_dummy(str(folder))
    matrices = [name for name in first.names() if len(first.shape(name)) == 2]
    for name in first.names():
        assert torch.equal(first.read(name), second.read(name))
        assert tuple(first.read(name).shape) == first.shape(name)
    rows = {tuple(first.read(name)[0].tolist()) for name in matrices}
    assert len(rows) == len(matrices)


def test_matrices_keep_the_size_of_what_they_multiply(folder: Path) -> None:
    checkpoint = open_dummy(str(folder))
    for name in checkpoint.names():
        tensor = checkpoint.read(name).float()
        assert checkpoint.read(name).dtype == getattr(torch, checkpoint.config.dtype)
        if tensor.ndim == 1:
            assert set(tensor.tolist()) == ({0.0} if name.endswith("bias") else {1.0})
            continue
        assert float(tensor.std()) == pytest.approx(tensor.shape[1] ** -0.5, rel=0.05)
        x = torch.randn(8, tensor.shape[1], generator=torch.Generator().manual_seed(1))
        assert float((x @ tensor.t()).std()) == pytest.approx(1, rel=0.2)


def test_reading_makes_no_tensor() -> None:
    """The largest matrix of the largest OPT: 1.2 GB, seen through 16 MiB."""
    checkpoint = open_dummy("opt-175b")
    fc1 = checkpoint.read("model.decoder.layers.95.fc1.weight")
    assert fc1.shape == (49152, 12288)
    assert fc1.untyped_storage().nbytes() == 2 * (1 << 23)
    assert torch.isfinite(fc1[-1]).all()
    bias = checkpoint.read("model.decoder.layers.95.fc1.bias")
    assert (bias.shape, bias.untyped_storage().nbytes()) == ((49152,), 2)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing"):
        open_dummy(str(folder)).read("model.nothing")


@pytest.mark.parametrize("model", ["opt-31b", "/nowhere", "x" * 5000])
def test_other_models_are_refused_with_the_names_there_are(model: str) -> None:
    with pytest.raises(ModelError, match=r"folder with config.json, or .*opt-30b.*llama-3-70b"):
        open_dummy(model)


def generated(folder: Path, device: str, dtype: DTypeName) -> list[tuple[str, list[int]]]:
    config = EngineConfig(
        device=device,  # type: ignore[arg-type]
        dtype=dtype,
        load_format="dummy",
        kv_memory_bytes=4 << 20,
        queue=UNBOUNDED_QUEUE,
    )
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(folder), config) as llm:
        found = llm.generate(["Some words", [599, 3, 300]], sampling)
    for generation in found:
        assert all(math.isfinite(entry.logprob) for entry in generation.logprobs)
        assert len(generation.token_ids) == 12
    return [(g.text, g.token_ids) for g in found]


def test_the_engine_runs_on_settings_alone(folder: Path) -> None:
    answers = generated(folder, "cpu", "float32")
    assert answers == generated(folder, "sim", "float32")
    assert all(text for text, _ in answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_stay_finite_in_short_formats(folder: Path, dtype: DTypeName) -> None:
    generated(folder, "sim", dtype)


def vocabulary(size: int) -> ModelConfig:
    return ModelConfig("opt", 1, 8, 8, 1, 1, 8, size, 16, eos_token_ids=(2,))


def test_a_text_is_its_bytes_and_an_id_its_number() -> None:
    tokenizer = dummy_tokenizer(vocabulary(50272))
    text = "Grüße\n 300 "
    assert tokenizer.encode(text) == [*text.encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([300, 50271, 65]) == " 300 50271A"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (50272, (2,))
    chat = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert chat == "user: Hi\nassistant:"


def test_a_small_vocabulary_takes_bytes_modulo_its_size() -> None:
    assert dummy_tokenizer(vocabulary(50)).encode("az") == [97 % 50, 122 % 50]


def test_the_folders_own_tokenizer_is_used(folder: Path) -> None:
    write_tokenizer(folder)
    assert open_dummy(str(folder)).load_tokenizer().encode(EOS) == [256]
