from __future__ import annotations

from transformers import GraniteConfig, GraniteForCausalLM

from tests.families.harness import FamilyTests, Tiny

MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}

TINY = Tiny(
    GraniteConfig,
    GraniteForCausalLM,
    MULTIPLIERS,
    {
        "plain-multipliers": dict.fromkeys(MULTIPLIERS, 1.0),
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
    },
)


class TestGranite(FamilyTests):
    tiny = TINY
