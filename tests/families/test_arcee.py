from __future__ import annotations

from transformers import ArceeConfig, ArceeForCausalLM

from tests.families.harness import FamilyTests, Tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

TINY = Tiny(
    ArceeConfig,
    ArceeForCausalLM,
    variants={
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        "yarn-rope": {"rope_scaling": YARN},
    },
)


class TestArcee(FamilyTests):
    tiny = TINY
