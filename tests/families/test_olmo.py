from __future__ import annotations

from transformers import OlmoConfig, OlmoForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    OlmoConfig,
    OlmoForCausalLM,
    variants={
        "clipped": {"clip_qkv": 0.5},
        "many-key-heads": {"num_key_value_heads": 4},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
    },
)


class TestOlmo(FamilyTests):
    tiny = TINY
