from __future__ import annotations

from transformers import Cohere2Config, Cohere2ForCausalLM

from tests.families.harness import FamilyTests, Tiny

FULL, SLIDING = "full_attention", "sliding_attention"

TINY = Tiny(
    Cohere2Config,
    Cohere2ForCausalLM,
    {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]},
    {
        "large-logits": {"logit_scale": 0.5},
        "own-head": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
    },
)


class TestCohere2(FamilyTests):
    tiny = TINY
