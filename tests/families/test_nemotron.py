from __future__ import annotations

from transformers import NemotronConfig, NemotronForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    NemotronConfig,
    NemotronForCausalLM,
    variants={
        "biases": {"attention_bias": True, "mlp_bias": True},
        "whole-heads-turn": {"partial_rotary_factor": 1.0},
        "other-heads": {"head_dim": 24},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestNemotron(FamilyTests):
    tiny = TINY
