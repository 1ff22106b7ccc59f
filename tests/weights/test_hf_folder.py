from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sl_serve.config import RopeConfig
from sl_serve.errors import CheckpointError, ModelError
from sl_serve.weights.checkpoint import check_tensors, open_checkpoint
from tests.weights.tiny_models import tiny_llama

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def shard_index(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_tensors_and_config_equal_transformers(layout: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(layout)
    reference = LlamaForCausalLM.from_pretrained(path)
    checkpoint = open_checkpoint(path)
    state = reference.state_dict()
    assert set(checkpoint.names()) == set(state)
    assert len(list(path.glob("*.safetensors"))) == (1 if layout == "folder" else 6)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    ours, theirs = checkpoint.config, reference.config
    assert (ours.family, ours.n_layers, ours.hidden_size) == ("llama", 2, 64)
    assert (ours.n_heads, ours.n_kv_heads, ours.head_dim) == (4, 2, theirs.head_dim)
    assert (ours.vocab_size, ours.intermediate_size, ours.max_positions) == (96, 96, 128)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.ropes == (RopeConfig(theirs.rope_parameters["rope_theta"]),)
    assert ours.tie_embeddings is theirs.tie_word_embeddings is False
    assert (ours.eos_token_ids, ours.bos_token_id) == ((theirs.eos_token_id,), theirs.bos_token_id)
    assert ours.dtype == "float32"


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    tiny_llama(attention_bias=True, mlp_bias=True).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.config.attention_bias
    assert checkpoint.config.mlp_bias
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


def test_tied_embeddings_and_own_head_dim(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True, head_dim=32).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_embeddings
    assert checkpoint.config.head_dim == 32
    assert "lm_head.weight" not in checkpoint.names()


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, ("llama3", 5e5, 8.0, 64)),
        (
            {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}},
            ("llama3", 5e5, 8.0, 64),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("linear", 1e4, 2.0, 8192)),
        ({"rope_scaling": None, "rope_theta": 3e4}, ("default", 3e4, 1.0, 8192)),
        ({"rope_parameters": {"rope_type": "default"}}, ("default", 1e4, 1.0, 8192)),
    ],
)
def test_rotary_settings_of_both_dialects(
    folder: Path, changes: dict[str, Any], rope: tuple[Any, ...]
) -> None:
    change_config(folder, **({"rope_parameters": "absent"} | changes))
    (found,) = open_checkpoint(folder).config.ropes
    assert (found.kind, found.theta, found.factor, found.original_max_positions) == rope


def test_end_ids_of_both_files_are_joined(folder: Path) -> None:
    change_config(folder, eos_token_id=[2, 5, 1000])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 5, 9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "mamba.*supported: .*llama"),
        ({"model_type": "../../etc"}, "supported: .*llama"),
        ({"model_type": ["llama"]}, "model_type must be a string"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 15}, "heads of 15"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids"),
        ({"dtype": "int4"}, "int4"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "x.bin",
        "a\\b.safetensors",
        7,
    ],
)
def test_index_cannot_leave_the_folder(sharded: Path, shard: object) -> None:
    path, index = shard_index(sharded)
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name of this folder"):
        open_checkpoint(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    path, index = shard_index(sharded)
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.extra'"):
        open_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    _, index = shard_index(sharded)
    (sharded / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(sharded)


def test_pickles_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle file"):
        open_checkpoint(folder)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    change_config(folder, auto_map={"AutoConfig": "modeling.Config", "AutoModel": "modeling.M"})
    assert open_checkpoint(folder).config.family == "llama"
    assert not marker.exists()


def test_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    for path, words in (
        (tmp_path, "no config.json.*weights.gguf"),
        (tmp_path / "absent", "no such model"),
        (Path(__file__), "a model is a folder"),
        (tmp_path / "weights.gguf", "empty"),
    ):
        with pytest.raises(ModelError, match=words):
            open_checkpoint(path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        open_checkpoint(tmp_path)


def test_check_tensors_names_what_is_wrong(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint, {"model.norm.weight": (64,)})
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight has shape \(64,\), expected \(65,\)"
    ):
        check_tensors(checkpoint, {"model.norm.weight": (65,)})
    with pytest.raises(CheckpointError, match=r"no tensor nothing \(expected \(1, 2\)\)"):
        check_tensors(checkpoint, {"nothing": (1, 2)})
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        checkpoint.read("nothing")
