from __future__ import annotations

from transformers import ApertusConfig, ApertusForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    ApertusConfig,
    ApertusForCausalLM,
    variants={
        "plain-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "biases": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestApertus(FamilyTests):
    tiny = TINY
