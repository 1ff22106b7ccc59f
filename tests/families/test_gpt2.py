from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sl_serve.errors import ModelError
from sl_serve.weights.checkpoint import open_checkpoint
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    GPT2Config,
    GPT2LMHeadModel,
    variants={
        "narrow-mlp": {"n_inner": 96},
        "own-head": {"tie_word_embeddings": False},
        "unscaled": {"scale_attn_weights": False},
        "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True},
        "relu": {"activation_function": "relu"},
    },
)


class TestGPT2(FamilyTests):
    tiny = TINY


def test_names_without_their_start_and_masks(tmp_path: Path) -> None:
    """As published."""
    state = TINY.write(tmp_path).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = {n.removeprefix("transformer."): tensor for n, tensor in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path)
    checkpoint = open_checkpoint(tmp_path)
    for part in "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.bias", "ln_1.weight":
        name = f"transformer.h.0.{part}"
        is_matrix = part.endswith(("c_attn.weight", "c_proj.weight"))
        expected = state[name].t() if is_matrix else state[name]
        assert torch.equal(checkpoint.read(name), expected)
        assert checkpoint.shape(name) == expected.shape
        assert (checkpoint.location(name) is None) == is_matrix
    checkpoint.close()


def test_a_decoder_of_an_encoder_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="add_cross_attention True is not supported"):
        config_of(TINY, add_cross_attention=True)
