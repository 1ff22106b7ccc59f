from __future__ import annotations

from transformers import Glm4Config, Glm4ForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    Glm4Config,
    Glm4ForCausalLM,
    {"head_dim": 24},
    {
        "whole-heads-turn": {"partial_rotary_factor": 1.0},
        "no-biases": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestGlm4(FamilyTests):
    tiny = TINY
