from __future__ import annotations

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from sl_serve.errors import ModelError
from sl_serve.models import gemma
from sl_serve.ops import TorchOps
from tests.families.harness import FamilyTests, Tiny
from tests.families.settings import config_of

TINY = Tiny(
    GemmaConfig,
    GemmaForCausalLM,
    {"head_dim": 16},
    {
        "one-key-head": {"num_key_value_heads": 1},
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
        "other-heads": {"head_dim": 24},
        "odd-scale": {"hidden_size": 48},
        "silu": {"hidden_act": "silu"},
    },
)


class TestGemma(FamilyTests):
    tiny = TINY


def test_what_the_first_release_called_gelu_is_its_approximation() -> None:
    assert config_of(TINY, hidden_act="gelu") == config_of(TINY, hidden_act="gelu_pytorch_tanh")


def test_another_activation_beside_it_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="hidden_activation 'gelu' is not supported"):
        config_of(TINY, hidden_activation="gelu")


def test_what_a_folder_leaves_out() -> None:
    config = config_of(TINY, head_dim="absent", tie_word_embeddings="absent")
    assert config.head_dim == 256
    assert config.tie_embeddings


def test_short_numbers_are_normed_and_scaled_as_transformers_does() -> None:
    """In bfloat16, where 1 + weight and the scale would be rounded."""
    config, ops = config_of(TINY, hidden_size=48), TorchOps(torch.bfloat16)
    torch.manual_seed(0)
    theirs = GemmaRMSNorm(48).bfloat16()
    theirs.weight.data.normal_()
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(gemma.norm(config, ops, x, theirs.weight), theirs(x))
    scale = torch.tensor(48**0.5).bfloat16()
    none = torch.arange(5)
    assert torch.equal(gemma.hidden_states(config, ops, {}, x.clone(), none), x * scale)
