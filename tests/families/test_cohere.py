from __future__ import annotations

from transformers import CohereConfig, CohereForCausalLM

from tests.families.harness import FamilyTests, Tiny

TINY = Tiny(
    CohereConfig,
    CohereForCausalLM,
    variants={
        "many-key-heads": {"num_key_value_heads": 4},
        "head-norms": {"use_qk_norm": True},
        "large-logits": {"logit_scale": 0.5},
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
    },
)


class TestCohere(FamilyTests):
    tiny = TINY


class TestWideHeadNorms(FamilyTests):
    """Whose lines are long enough to be quantised, if they were matrices."""

    tiny = Tiny(CohereConfig, CohereForCausalLM, {"hidden_size": 256, "use_qk_norm": True})
