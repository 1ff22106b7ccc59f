from __future__ import annotations

from transformers import SeedOssConfig, SeedOssForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    SeedOssConfig,
    SeedOssForCausalLM,
    {"head_dim": 24, "attention_dropout": 0.0, "residual_dropout": 0.0},
    {
        "no-biases": {"attention_bias": False},
        "all-biases": {"attention_out_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
    },
)


class TestSeedOss(FamilyTests):
    tiny = TINY
