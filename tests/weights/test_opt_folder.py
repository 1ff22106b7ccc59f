from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sl_serve.config import ModelConfig
from sl_serve.errors import ModelError
from sl_serve.models import load_family
from sl_serve.weights.checkpoint import open_checkpoint
from sl_serve.weights.hf_config import model_config_from_hf
from sl_serve.weights.host import check_checkpoint
from tests.models import write_tiny_opt

SMALLEST = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "ffn_dim": 40,
    "vocab_size": 90,
    "max_position_embeddings": 64,
}


def config_of(**changes: Any) -> ModelConfig:
    return model_config_from_hf(SMALLEST | changes, {}, "config.json")


def test_settings_left_out_are_those_of_most_published_ones() -> None:
    config = config_of(eos_token_id=2, bos_token_id=2)
    assert (config.head_dim, config.n_kv_heads, config.norm_eps) == (8, 3, 1e-5)
    assert config.ropes == ()
    assert config.norm_first and config.final_norm and config.tie_embeddings
    assert config.attention_bias and config.mlp_bias
    assert config.embed_size is None
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 2)


@pytest.mark.parametrize(
    ("changes", "norms"),
    [
        ({}, (True, True)),
        ({"do_layer_norm_before": False}, (False, False)),
        ({"_remove_final_layer_norm": True}, (True, False)),
    ],
)
def test_where_norms_stand(changes: dict[str, Any], norms: tuple[bool, bool]) -> None:
    config = config_of(**changes)
    assert (config.norm_first, config.final_norm) == norms
    assert ("final_norm" in load_family("opt").static_tensors(config)) is config.final_norm


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "gelu"}, "activation_function 'gelu'.*only 'relu'"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        ({"num_attention_heads": 5}, "5 heads cannot share 24"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim must be an integer"),
        ({"ffn_dim": None}, "ffn_dim is missing"),
        ({"do_layer_norm_before": 1}, "do_layer_norm_before must be true or false"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        config_of(**changes)


@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 32}, {"enable_bias": False}])
def test_the_family_uses_every_tensor_of_the_file(changes: dict[str, Any], tmp_path: Path) -> None:
    write_tiny_opt(tmp_path, **changes)
    checkpoint = open_checkpoint(tmp_path)
    config, family = checkpoint.config, load_family("opt")
    static = dict(family.static_tensors(config).values())
    check_checkpoint(checkpoint, family.layer_params(config), static)
    used = {
        source.replace("{layer}", str(layer))
        for layer in range(config.n_layers)
        for param in family.layer_params(config)
        for source in param.sources
    }
    assert used | static.keys() == set(checkpoint.names())


@pytest.mark.parametrize("with_head", [True, False])
def test_names_without_their_start_are_understood(with_head: bool, tmp_path: Path) -> None:
    """As exported from the model inside OPTForCausalLM."""
    write_tiny_opt(tmp_path, tie_word_embeddings=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert "decoder.layers.0.fc1.weight" in bare
    if not with_head:
        del bare["lm_head.weight"]
    save_file(bare, path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == tensors.keys() - (set() if with_head else {"lm_head.weight"})
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), tensors[name])
        assert checkpoint.shape(name) == tuple(tensors[name].shape)
        place = checkpoint.location(name)
        assert place is not None
        stored = path.read_bytes()[place.offset_bytes : place.offset_bytes + place.size_bytes]
        assert stored == tensors[name].numpy().tobytes()
    checkpoint.close()


def test_the_settings_file_of_transformers_is_read_back(tmp_path: Path) -> None:
    theirs = write_tiny_opt(tmp_path, word_embed_proj_dim=32, do_layer_norm_before=False).config
    ours = open_checkpoint(tmp_path).config
    assert (ours.n_layers, ours.hidden_size, ours.intermediate_size) == (3, 64, 96)
    assert (ours.n_heads, ours.embed_size) == (4, theirs.word_embed_proj_dim)
    assert (ours.max_positions, ours.vocab_size) == (256, theirs.vocab_size)
    assert not ours.norm_first
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == ours.family == "opt"
