from __future__ import annotations

from transformers import GPTJConfig, GPTJForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    GPTJConfig,
    GPTJForCausalLM,
    {"rotary_dim": 8},
    {
        "all-rotated": {"rotary_dim": 16},
        "narrow-mlp": {"n_inner": 96},
        "tied": {"tie_word_embeddings": True},
        "relu": {"activation_function": "relu"},
    },
)


class TestGPTJ(FamilyTests):
    tiny = TINY
