from __future__ import annotations

from transformers import GlmConfig, GlmForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    GlmConfig,
    GlmForCausalLM,
    {"head_dim": 24},
    {
        "whole-heads-turn": {"partial_rotary_factor": 1.0},
        "no-biases": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestGlm(FamilyTests):
    tiny = TINY
