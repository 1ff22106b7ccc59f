from __future__ import annotations

from transformers import Olmo2Config, Olmo2ForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    Olmo2Config,
    Olmo2ForCausalLM,
    variants={
        "many-key-heads": {"num_key_value_heads": 4},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
    },
)


class TestOlmo2(FamilyTests):
    tiny = TINY
