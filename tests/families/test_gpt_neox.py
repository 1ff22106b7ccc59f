from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sl_serve.plan.model_reader import stored_dtype
from sl_serve.weights.checkpoint import open_checkpoint
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    variants={
        "sequential": {"use_parallel_residual": False},
        "no-attention-biases": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
        "half-rotated": {"rotary_pct": 0.5, "rotary_emb_base": 500},
        "scaled-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "other-gelu": {"hidden_act": "gelu_fast"},
    },
)


class TestGPTNeoX(FamilyTests):
    tiny = TINY


def test_the_settings_of_older_folders() -> None:
    (rope,) = config_of(TINY, rope_parameters="absent", rotary_emb_base=500, rotary_pct=0.5).ropes
    assert (rope.theta, rope.n_dims) == (500, 8)
    (rope,) = config_of(TINY, rope_parameters="absent").ropes
    assert (rope.theta, rope.n_dims) == (10000, 4)


def test_masks_and_the_old_name_of_the_head_in_a_folder(tmp_path: Path) -> None:
    """Published ones have both, and a mask's dtype is not that of the weights."""
    reference = TINY.write(tmp_path).half()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file({**tensors, "embed_out.weight": head, "gpt_neox.layers.0.attention.bias": mask}, path)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("lm_head.weight"), head)
    assert stored_dtype(checkpoint) == "float16"
    checkpoint.close()
